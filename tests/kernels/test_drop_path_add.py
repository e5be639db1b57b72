import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import drop_path_add, drop_path_add_reference


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    return use_backend(monkeypatch, "drop_path_add", request.param, ["forward", "backward"])


def inputs(tokens, channels, dtypes=(torch.float32, torch.float32), device="cpu"):
    g = torch.Generator().manual_seed(tokens + channels)
    x, branch = (torch.randn(tokens, channels, generator=g).to(device, dtype) for dtype in dtypes)
    scale = (torch.rand(tokens, generator=g) < 0.7) / 0.7
    return x, branch, scale.to(device)


def run(op, x, branch, scale):
    x, branch = (t.detach().requires_grad_() for t in (x, branch))
    out = op(x, branch, scale)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    return out.detach(), *torch.autograd.grad(out, (x, branch), grad_out)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize("tokens, channels", [(37, 199), (20, 128), (1, 1), (507, 3), (2, 2500)])
def test_against_float64(device, x_dtype, branch_dtype, tokens, channels):
    x, branch, scale = inputs(tokens, channels, (x_dtype, branch_dtype), device)
    actual = run(drop_path_add, x, branch, scale)
    eager = run(drop_path_add_reference, x, branch, scale)
    exact = run(drop_path_add_reference, x.double(), branch.double(), scale.double())
    assert [t.dtype for t in actual] == [x_dtype, x_dtype, branch_dtype]
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert ours.shape == truth.shape
        # 16 bit: Triton's interpreter cuts bfloat16 off where everything else rounds.
        floor = 0 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
        assert_as_accurate(ours, theirs, truth, floor)


def test_dropped_rows_keep_x_and_give_no_gradient(device):
    x, branch, scale = inputs(50, 40, device=device)
    dropped = scale == 0
    assert dropped.any() and not dropped.all()
    out, _, grad_branch = run(drop_path_add, x, branch, scale)
    assert torch.equal(out[dropped], x[dropped]) and not grad_branch[dropped].any()
    assert not torch.equal(out[~dropped], x[~dropped]) and grad_branch[~dropped].all()


def test_ones_add_and_the_sum_is_linear_in_the_branch(device):
    x, branch, scale = inputs(50, 40, device=device)
    assert torch.equal(drop_path_add(x, branch, torch.ones_like(scale)), x + branch)
    half = drop_path_add(x, branch / 2, scale)
    torch.testing.assert_close(drop_path_add(half, branch / 2, scale), drop_path_add(x, branch, scale))


def test_the_upstream_gradient_reaches_x_without_a_copy(device):
    x, branch, scale = inputs(5, 4, (torch.float32, torch.bfloat16), device)
    out = drop_path_add(x.requires_grad_(), branch.requires_grad_(), scale)
    grad_out = torch.randn_like(out)
    grad_x, _ = torch.autograd.grad(out, (x, branch), grad_out)
    assert grad_x.data_ptr() == grad_out.data_ptr()


def test_scale_as_a_column_repeats_bitwise_and_an_expanded_upstream(device):
    x, branch, scale = inputs(33, 70, device=device)
    first = run(drop_path_add, x, branch, scale)
    assert all(torch.equal(a, b) for a, b in zip(first, run(drop_path_add, x, branch, scale[:, None]), strict=True))
    out = drop_path_add(x, branch.requires_grad_(), scale)
    (grad,) = torch.autograd.grad(out.sum(), branch)
    assert torch.equal(grad, scale[:, None].expand(-1, 70))


def test_no_tokens(device):
    assert [t.shape for t in run(drop_path_add, *inputs(0, 5, device=device))] == [(0, 5)] * 3


def test_opcheck_and_compile(device):
    x, branch, scale = inputs(5, 9, (torch.float32, torch.bfloat16), device)
    args = (x.requires_grad_(), branch.requires_grad_(), scale)
    torch.library.opcheck(torch.ops.dino_kernels.drop_path_add.default, args)
    torch.library.opcheck(torch.ops.dino_kernels.drop_path_add_backward.default, (x.detach(), scale, torch.bfloat16))

    def doubled(x, branch, scale):
        return 3 * drop_path_add(2 * x, 2 * branch, scale)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(run(compiled, *args), run(doubled, *args), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must have shape \[T, C\] with C >= 1 \(flatten.*\[2, 3, 4\]"),
        ({"x": torch.zeros(6, 0)}, "C >= 1"),
        ({"x": torch.zeros(6, 4).double()}, "dtype float32, float16 or bfloat16.*float64"),
        ({"branch": torch.zeros(4, 6).T}, r"branch must have shape.*contiguous.*strides \[1, 6\]"),
        ({"branch": torch.zeros(6, 5)}, r"branch must have the shape and device of x, \[6, 4\] on cpu, got \[6, 5\]"),
        ({"branch": torch.zeros(6, 4, device="meta")}, "on cpu, got .* on meta"),
        ({"scale": torch.zeros(4)}, r"scale must have shape \[6\] or \[6, 1\].*got \[4\]"),
        ({"scale": torch.zeros(6).half()}, "dtype float32.*float16"),
        ({"scale": torch.zeros(12)[::2]}, r"contiguous, got \[6\], torch.float32, strides \[2\]"),
        ({"scale": torch.zeros(6, device="meta")}, "scale must be on cpu as x"),
        ({"scale": torch.zeros(6, requires_grad=True)}, r"need no gradient \(detach it\)"),
    ],
)
def test_bad_input(change, message):
    x = {"x": torch.zeros(6, 4), "branch": torch.zeros(6, 4), "scale": torch.zeros(6)}
    drop_path_add(**x)
    with pytest.raises(ValueError, match=message):
        drop_path_add(**{**x, **change})
