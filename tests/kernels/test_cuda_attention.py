"""attention over short sequences, on the compiled CUDA C++ kernels."""

import pytest
import torch
from checks import assert_as_accurate
from cuda_emulated import PROVE, QUICK, emulated, needs_nvcc, use_cuda
from ptx import launch
from test_attention import inputs, run

from dino_kernels import attention, attention_reference
from dino_kernels.cuda.attention import fits_cuda

HALVES = [torch.float16, torch.bfloat16]
pytestmark = [needs_nvcc, pytest.mark.ptx]


def use(monkeypatch, arch):
    use_cuda(monkeypatch, "attention", arch)


@pytest.fixture(params=QUICK)
def quick(request, monkeypatch):
    use(monkeypatch, request.param)


@pytest.fixture(params=PROVE)
def prove(request, monkeypatch):
    use(monkeypatch, request.param)


def check(groups, dtype, heads=2, qkv=None, **options):
    random, bounds = inputs([n for count, n in groups for _ in range(count)], heads, 64, dtype)
    qkv = random if qkv is None else qkv
    assert fits_cuda(qkv, [n for group in groups for n in group], options.get("scale", 0.125))
    eager = run(attention_reference, qkv, bounds, **options)
    exact = run(attention_reference, qkv.double(), bounds, **options)
    actual = run(attention, qkv, bounds, groups=groups, **options)
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        assert_as_accurate(ours, theirs, truth, floor=1e-3)
    return actual


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("groups", [[(1, 197), (2, 37)], [(1, 256)], [(2, 1), (0, 5), (1, 16), (1, 17), (1, 64)]])
def test_against_float64(quick, dtype, groups):
    check(groups, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "length", [2, 15, 31, 32, 33, 48, 63, 65, 127, 128, 129, 145, 160, 200, 208, 209, 240, 241, 255]
)
def test_lengths_around_the_edges_of_blocks(prove, dtype, length):
    check([(2, length)], dtype, heads=1)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 5.0])
def test_scale_and_large_logits(prove, scale):
    check([(1, 50), (1, 70)], torch.float16, scale=scale)


def test_logits_far_below_zero(quick):
    """All of them: a maximum of zero, which the padding's would be, leaves no probability."""
    qkv, _ = inputs([19], 1, 64, torch.bfloat16)
    qkv[:, 0], qkv[:, 1] = 4.0, -4.0
    check([(1, 19)], torch.bfloat16, heads=1, qkv=qkv)


def test_strided_queries_keys_and_values(prove):
    """Heads, parts and tokens lie apart, with what must not be read or written between them."""
    qkv, _ = inputs([40, 40], 2, 64, torch.bfloat16)
    wide = torch.full((80, 2, 4, 72), float("nan"), dtype=torch.bfloat16)
    strided = wide[:, :, :3, :64].transpose(1, 2)
    strided.copy_(qkv)
    actual, expected = check([(2, 40)], torch.bfloat16, qkv=strided), check([(2, 40)], torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_any_order_of_execution_gives_the_same_in_a_launch_a_group(monkeypatch):
    use(monkeypatch, "90a")
    launches, results = emulated("90a").launches, []
    qkv, bounds = inputs([70, 70, 37], 2, 64, torch.bfloat16)
    for launch.options.seed in range(3):
        del launches[:]
        results.append(run(attention, qkv, bounds, groups=[(2, 70), (1, 37)]))
        assert len(launches) == 4
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_they_do_not_take_is_left_to_triton():
    qkv, groups, shifted = torch.zeros(5, 3, 2, 64).half(), [1, 5], torch.zeros(5 * 384 + 1).half()[1:]
    assert fits_cuda(qkv, groups, 0.125) and fits_cuda(qkv, [1, 256, 9, 37], 0.125)
    assert not fits_cuda(qkv.float(), groups, 0.125)
    assert not fits_cuda(qkv[..., :32], groups, 0.125)
    assert not fits_cuda(qkv, [], 0.125) and not fits_cuda(qkv, [1, 256, 1, 257], 0.125)
    assert not fits_cuda(qkv, groups, 0.0) and not fits_cuda(qkv, groups, -1.0)
    assert not fits_cuda(torch.zeros(5, 3, 2, 65).half()[..., :64], groups, 0.125)
    assert not fits_cuda(shifted.view(5, 3, 2, 64), groups, 0.125) and not fits_cuda(qkv, groups, 0.125, shifted)
