import importlib

import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import attention, attention_reference
from dino_kernels._core.native import Products

LENGTHS = [37, 1, 0, 64, 37, 37, 65, 130]


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    return use_backend(monkeypatch, "attention", request.param, ["forward", "backward"])


def inputs(lengths, heads=2, channels=32, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(sum(lengths))
    qkv = torch.randn(sum(lengths), 3, heads, channels, generator=g).to(device, dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return qkv, bounds


def run(op, qkv, bounds, grad_out=None, **options):
    qkv = qkv.detach().requires_grad_()
    out = op(qkv, bounds, **options)
    if grad_out is None:
        g = torch.Generator().manual_seed(7)
        grad_out = torch.randn(out.shape, generator=g).to(out.device)
    return out.detach(), *torch.autograd.grad(out, qkv, grad_out.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 40])
def test_against_float64(device, dtype, channels):
    qkv, bounds = inputs(LENGTHS, channels=channels, dtype=dtype, device=device)
    eager = run(attention_reference, qkv, bounds)
    exact = run(attention_reference, qkv.double(), bounds)
    for ours, theirs, truth in zip(run(attention, qkv, bounds), eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        assert_as_accurate(ours, theirs, truth, floor=1e-6 if dtype == torch.float32 else 1e-3)


def test_the_lengths_of_the_reference_setting(device):
    qkv, bounds = inputs([197, 197, 37, 37, 37], heads=1, channels=64, device=device)
    exact = run(attention_reference, qkv.double(), bounds)
    for ours, truth in zip(run(attention, qkv, bounds), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "scale", [0.0, 0.3, -40.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (40.0, -0.3, 1e-40))]
)
def test_scale_and_large_logits(device, scale):
    """Of either sign and none; the second time, where all logits are below what exp2 has a number for, or above."""
    qkv, bounds = inputs([50, 70], device=device)
    for shift in (0.0, 0.5):
        x = qkv + shift * torch.tensor([1.0, -1.0, 0.0], device=device).view(3, 1, 1)
        eager = run(attention_reference, x, bounds, scale=scale)
        exact = run(attention_reference, x.double(), bounds, scale=scale)
        for groups in (None, [(1, 50), (1, 70)]):
            ours = run(attention, x, bounds, scale=scale, groups=groups)
            for mine, theirs, truth in zip(ours, eager, exact, strict=True):
                assert_as_accurate(mine, theirs, truth, floor=1e-5)


def test_probabilities_sum_to_one_and_order_of_keys_is_irrelevant(device):
    qkv, bounds = inputs([70], device=device)
    ones = qkv.clone()
    ones[:, 2] = 1
    torch.testing.assert_close(attention(ones, bounds), torch.ones_like(ones[:, 2]))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = torch.stack([qkv[:, 0], qkv[order, 1], qkv[order, 2]], dim=1)
    torch.testing.assert_close(attention(shuffled, bounds), attention(qkv, bounds), rtol=1e-5, atol=1e-6)


def test_sequences_do_not_see_each_other(device):
    qkv, bounds = inputs([40, 70, 37], device=device)
    changed = qkv.clone()
    changed[40:110] *= 3
    before, after = attention(qkv, bounds), attention(changed, bounds)
    assert torch.equal(before[:40], after[:40]) and torch.equal(before[110:], after[110:])
    assert not torch.equal(before[40:110], after[40:110])


def test_repeats_bitwise_and_reads_strided_input(device):
    qkv, bounds = inputs([33, 80, 33], device=device)
    first, second = run(attention, qkv, bounds), run(attention, qkv, bounds)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    wide = torch.full((146, 3, 5, 48), float("nan"), device=device)
    wide[:, :, 1:3, 8:40] = qkv
    sliced = run(attention, wide[:, :, 1:3, 8:40], bounds)
    assert all(torch.equal(a, b) for a, b in zip(first, sliced, strict=True))


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_lse_is_the_natural_logarithm_on_every_backend(device, scale):
    qkv, bounds = inputs([33, 80], device=device)
    _, lse = torch.ops.dino_kernels.attention(qkv, bounds, [], scale)
    sequences = qkv.double().split([33, 80])
    exact = [(scale * torch.einsum("ihd,jhd->hij", x[:, 0], x[:, 1])).logsumexp(dim=-1) for x in sequences]
    torch.testing.assert_close(lse.double(), torch.cat(exact, dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 96, 256])
def test_narrow_and_wide_heads(device, channels):
    qkv, bounds = inputs([40, 17], heads=1, channels=channels, device=device)
    exact = run(attention_reference, qkv.double(), bounds)
    for ours, truth in zip(run(attention, qkv, bounds), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=5e-6)


def test_no_tokens(device):
    qkv, bounds = inputs([0, 0], device=device)
    out, grad = run(attention, qkv, bounds)
    assert out.shape == (0, 2, 32) and grad.shape == (0, 3, 2, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in DTYPES[:2])])
@pytest.mark.parametrize("channels", [64, *(pytest.param(n, marks=pytest.mark.slow) for n in (32, 128))])
def test_every_path_of_known_lengths(device, dtype, channels):
    """A block and less, several blocks by one program (up to 320 tokens), several programs; empty groups."""
    groups = [(1, 197), (3, 37), (0, 5), (2, 0), (2, 16), (1, 1), (1, 64), (1, 330)]
    lengths = [length for count, length in groups for _ in range(count)]
    qkv, bounds = inputs(lengths, heads=2 if channels == 32 else 1, channels=channels, dtype=dtype, device=device)
    eager = run(attention_reference, qkv, bounds)
    exact = run(attention_reference, qkv.double(), bounds)
    ours = run(attention, qkv, bounds, groups=groups)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_accurate(mine, theirs, truth, floor=1e-6 if dtype == torch.float32 else 1e-3)
    again = run(attention, qkv, bounds, groups=groups)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in DTYPES[:2])])
@pytest.mark.parametrize(
    "groups", [[], pytest.param([(1, 197), (3, 37), (2, 0), (1, 64), (1, 330)], marks=pytest.mark.slow_interpreted)]
)
def test_the_gradient_of_a_bias_is_added_to_what_is_there(device, dtype, groups):
    lengths = [length for count, length in groups for _ in range(count)] or LENGTHS
    qkv, bounds = inputs(lengths, heads=3, channels=40, dtype=dtype, device=device)
    flat, scale = [n for group in groups for n in group], 40**-0.5
    out, lse = torch.ops.dino_kernels.attention(qkv, bounds, flat, scale)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(device, dtype)
    arguments = grad_out, qkv, out, lse, bounds, flat, scale
    sums = torch.ones(3 * 3 * 40, device=device)
    grad = torch.ops.dino_kernels.attention_backward_(*arguments, sums)
    assert torch.equal(grad, torch.ops.dino_kernels.attention_backward_(*arguments, None))
    eager, exact = (1 + run(attention_reference, x, bounds, grad_out)[1].flatten(1).sum(0) for x in (qkv, qkv.double()))
    assert_as_accurate(sums, eager, exact, floor=1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("length", [65, 321, *(pytest.param(n, marks=pytest.mark.slow) for n in (145, 257, 320))])
def test_lengths_around_the_borders_of_the_paths(device, length):
    qkv, bounds = inputs([length, length], heads=1, channels=64, device=device)
    exact = run(attention_reference, qkv.double(), bounds)
    for ours, truth in zip(run(attention, qkv, bounds, groups=[(2, length)]), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6)


class TestCPU:
    """Around the borders of tiles and blocks; bfloat16 with AMX, by pairs and widened."""

    KINDS = [
        *((dtype, Products.amx) for dtype in DTYPES),
        (torch.bfloat16, Products.bf16_pairs),
        (torch.bfloat16, Products.f32),
    ]
    LENGTHS = [1, 15, 16, 17, 0, 33, 197, 330]

    @pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1].name}".removeprefix("torch."))
    def dtype(self, request, monkeypatch):
        dtype, products = request.param
        monkeypatch.setattr(importlib.import_module("dino_kernels.ops.attention"), "_BF16_PRODUCTS", products)
        return dtype

    @pytest.mark.parametrize("channels", [1, 37, 64, 96, 256])
    def test_against_float64_and_strided(self, dtype, channels):
        qkv, bounds = inputs(self.LENGTHS, channels=channels, dtype=dtype)
        eager = run(attention_reference, qkv, bounds)
        exact = run(attention_reference, qkv.double(), bounds)
        ours = run(attention, qkv, bounds)
        for mine, theirs, truth in zip(ours, eager, exact, strict=True):
            assert_as_accurate(mine, theirs, truth, floor=1e-6 if dtype == torch.float32 else 1e-3)
        wide = torch.full((len(qkv), 4, 5, channels + 9), float("nan"), dtype=dtype)
        sliced = wide[:, 1:, 1:3, 5:-4]
        sliced.copy_(qkv)
        assert all(torch.equal(a, b) for a, b in zip(ours, run(attention, sliced, bounds), strict=True))

    def test_the_number_of_threads_changes_nothing(self, dtype):
        qkv, bounds = inputs(self.LENGTHS, heads=3, channels=37, dtype=dtype)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                results.append(run(attention, qkv, bounds))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_not_a_number_stays_in_its_sequence_and_head(self, dtype):
        qkv, bounds = inputs([40, 17, 40], dtype=dtype)
        clean = run(attention, qkv, bounds)
        qkv[40, :, 1] = float("nan")
        for spoilt, fine in zip(run(attention, qkv, bounds), clean, strict=True):
            assert spoilt[40:57, ..., 1, :].isnan().all()
            spoilt[40:57, ..., 1, :] = fine[40:57, ..., 1, :]
            assert torch.equal(spoilt, fine)


def test_opcheck_and_compile(device):
    qkv, bounds = inputs([5, 9, 5], device=device)
    qkv.requires_grad_()
    for groups in ([], [1, 5, 1, 9, 1, 5]):
        torch.library.opcheck(torch.ops.dino_kernels.attention.default, (qkv, bounds, groups, 0.2))
        out, lse = torch.ops.dino_kernels.attention(qkv.detach(), bounds, groups, 0.2)
        for sums in (None, torch.zeros(3 * 2 * 32, device=device)):
            args = (torch.randn_like(out), qkv.detach(), out, lse, bounds, groups, 0.2, sums)
            torch.library.opcheck(torch.ops.dino_kernels.attention_backward_.default, args)

    def doubled(qkv, bounds):
        return 3 * attention(2 * qkv, bounds, groups=[(1, 5), (1, 9), (1, 5)])

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(run(compiled, qkv, bounds), run(doubled, qkv, bounds), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("groups", [[(1, 5)], [(2, 3)], [(-1, 2), (3, 2)], [(1, 4), (1, 0)]])
def test_groups_that_do_not_fit(groups):
    with pytest.raises(ValueError, match="groups must be .number of sequences, tokens of each., together the 1 seq"):
        attention(torch.zeros(4, 3, 1, 8), torch.tensor([0, 4], dtype=torch.int32), groups=groups)


def test_groups_that_contradict_the_bounds():
    with pytest.raises(ValueError, match="are not the lengths that cu_seqlens says"):
        attention(torch.zeros(4, 3, 1, 8), torch.tensor([0, 1, 4], dtype=torch.int32), groups=[(2, 2)])


@pytest.mark.parametrize(
    "qkv, bounds, message",
    [
        (torch.zeros(4, 2, 1, 8), [0, 4], r"qkv must have shape \[T, 3, H, D\].*\[4, 2, 1, 8\]"),
        (torch.zeros(4, 3, 1, 300), [0, 4], "1 <= D <= 256"),
        (torch.zeros(4, 3, 1, 0), [0, 4], "1 <= D <= 256"),
        (torch.zeros(4, 3, 1, 8).double(), [0, 4], "dtype float32, float16 or bfloat16.*float64"),
        (torch.zeros(4, 3, 8, 2).transpose(2, 3), [0, 4], r"adjacent channels \(stride 1\)"),
        (torch.zeros(4, 3, 1, 8, device="meta"), [0, 4], "one device, got meta and cpu"),
        (torch.zeros(4, 3, 1, 8), [[0, 4]], r"cu_seqlens must have shape \[S\+1\], dtype int32"),
        (torch.zeros(4, 3, 1, 8), [0, 3], "cu_seqlens must rise from 0 to the number of tokens 4"),
        (torch.zeros(4, 3, 1, 8), [0], "must rise from 0 to the number of tokens 4, got no sequence"),
        (torch.zeros(4, 3, 1, 8), [1, 4], "must rise from 0"),
        (torch.zeros(4, 3, 1, 8), [0, 3, 2, 4], "must rise from 0"),
    ],
)
def test_bad_input(qkv, bounds, message):
    with pytest.raises(ValueError, match=message):
        attention(qkv, torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize(
    "bounds, message",
    [
        (torch.tensor([0, 4]), r"dtype int32 and stride 1, got \[2\], torch.int64"),
        (torch.tensor([0, 9, 4, 9], dtype=torch.int32)[::2], r"stride 1, got \[2\], torch.int32, strides \[2\]"),
    ],
)
def test_bounds_of_the_wrong_dtype_or_stride(bounds, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(4, 3, 1, 8), bounds)
