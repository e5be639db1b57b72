import pytest
import torch
from checks import DTYPES, assert_as_accurate, cuda_function, use_backend

from dino_kernels import (
    weight_norm_,
    weight_norm_product_backward_,
    weight_norm_product_backward_reference_,
    weight_norm_reference_,
)
from dino_kernels.ops.weight_norm import weight_norm_backward_reference_

weight_norm_backward_ = torch.ops.dino_kernels.weight_norm_backward_


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    return use_backend(monkeypatch, "weight_norm", request.param, ["forward", "backward"])


def inputs(outputs, channels, dtype=torch.float32, device="cpu"):
    """v, g, gradient of w, gradients that are there already."""
    g = torch.Generator().manual_seed(outputs + channels)
    v, grad_w, grad_v = (torch.randn(outputs, channels, generator=g) for _ in range(3))
    norms, grad_g = torch.rand(outputs, 1, generator=g) + 0.5, torch.randn(outputs, 1, generator=g)
    return [x.to(device) for x in (v, norms, grad_w.to(dtype), grad_v, grad_g)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs, channels", [(37, 199), (300, 256), (1, 1), (507, 3), (2, 2500)])
def test_against_float64(device, dtype, outputs, channels):
    v, g, grad_w, grad_v, grad_g = inputs(outputs, channels, dtype, device)
    exact = weight_norm_reference_(torch.empty_like(v).double(), v.double(), g.double())
    eager = weight_norm_reference_(torch.empty_like(grad_w), v, g)
    # 16 bit: Triton's interpreter cuts bfloat16 off where everything else rounds.
    floor = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_as_accurate(weight_norm_(torch.empty_like(grad_w), v, g), eager, exact, floor)
    results = []
    for op, kind in (
        (weight_norm_backward_, None),
        (weight_norm_backward_reference_, None),
        (weight_norm_backward_reference_, torch.float64),
    ):
        into = [x.clone().to(kind) for x in (grad_v, grad_g)]
        op(*into, grad_w.to(kind), v.to(kind), g.to(kind))
        results.append(into)
    for ours, theirs, truth in zip(*results, strict=True):
        assert_as_accurate(ours, theirs, truth, 1e-6)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("tokens, outputs, channels", [(40, 96, 64), (37, 8192 + 64, 32), (1, 32, 256), (7, 199, 37)])
def test_gradients_from_those_of_logits(dtype, overwrite, tokens, outputs, channels):
    v, g, _, grad_v, grad_g = inputs(outputs, channels)
    make = torch.Generator().manual_seed(tokens)
    grad, x = (torch.randn(tokens, n, generator=make).to(dtype) for n in (outputs, channels))
    results = []
    for op, kind in (
        (weight_norm_product_backward_, None),
        (weight_norm_product_backward_reference_, None),
        (weight_norm_product_backward_reference_, torch.float64),
    ):
        into = [t.clone().to(kind) for t in (grad_v, grad_g)]
        op(*into, *(t.to(kind) for t in (grad, x, v, g)), overwrite=overwrite)
        results.append(into)
    for ours, theirs, truth in zip(*results, strict=True):
        assert_as_accurate(ours, theirs, truth, 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    without = grad_v.clone()
    weight_norm_product_backward_(without, None, grad, x, v, g, overwrite=overwrite)
    assert torch.equal(without, results[0][0])
    op = torch.ops.dino_kernels.weight_norm_product_backward_.default
    torch.library.opcheck(op, (grad_v, grad_g, grad, x, v, g, overwrite))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("outputs, channels", [(96, 64), (8192 + 64, 32), (199, 37), (3, 2500)])
def test_on_cuda_the_product_is_one_of_float32(monkeypatch, dtype, overwrite, outputs, channels):
    v, g, _, grad_v, grad_g = inputs(outputs, channels)
    make = torch.Generator().manual_seed(3)
    grad, x = (torch.randn(40, n, generator=make).to(dtype) for n in (outputs, channels))
    results = []
    for kind in (torch.float32, torch.float64):
        results.append([t.clone().to(kind) for t in (grad_v, grad_g)])
        weight_norm_product_backward_reference_(
            *results[-1], *(t.to(kind) for t in (grad, x, v, g)), overwrite=overwrite
        )
    if overwrite:
        grad_v.fill_(float("nan"))  # overwritten, whatever was there
    without = grad_v.clone()
    run_cuda, asked = cuda_function(monkeypatch, "weight_norm_product_backward_")
    run_cuda(grad_v, grad_g, grad, x, v, g, overwrite)
    run_cuda(without, None, grad, x, v, g, overwrite)
    assert torch.equal(without, grad_v)
    for ours, theirs, truth in zip((grad_v, grad_g), *results, strict=True):
        assert_as_accurate(ours, theirs, truth, 1e-6)
    assert asked == [("mm", dtype, torch.float32)] * 2


def test_gradients_from_those_of_logits_bad_input():
    v, g, _, grad_v, grad_g = inputs(6, 4)
    grad, x = torch.zeros(3, 6), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"shapes \[T, 6\] and \[T, 4\].*got \[3, 5\]"):
        weight_norm_product_backward_(grad_v, grad_g, grad[:, 1:], x, v, g)
    with pytest.raises(ValueError, match=r"grad and x must be contiguous, got strides \[1, 3\]"):
        weight_norm_product_backward_(grad_v, grad_g, torch.zeros(6, 3).t(), x, v, g)
    with pytest.raises(ValueError, match="grad_v"):
        weight_norm_product_backward_(grad_v.double(), grad_g, grad, x, v, g)


def test_gradients_are_those_of_autograd(device):
    v, g, grad_w, _, _ = inputs(20, 30, device=device)
    leaves = [v.double().requires_grad_(), g.double().requires_grad_()]
    truth = torch.autograd.grad(torch._weight_norm(*leaves, 0), leaves, grad_w.double())
    ours = torch.zeros_like(v), torch.zeros_like(g)
    weight_norm_backward_(*ours, grad_w, v, g)
    for mine, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)


def test_rows_have_norm_g_and_gradients_no_part_along_them(device):
    v, g, grad_w, _, _ = inputs(50, 40, device=device)
    torch.testing.assert_close(weight_norm_(torch.empty_like(v), v, g).norm(dim=1, keepdim=True), g)
    grad_v = torch.zeros_like(v)
    weight_norm_backward_(grad_v, None, grad_w, v, g)
    assert ((grad_v * v).sum(dim=1).abs() < 1e-4).all() and grad_v.abs().max() > 0.1


def test_repeats_bitwise_and_takes_no_rows(device):
    v, g, grad_w, grad_v, grad_g = inputs(130, 70, device=device)
    first, second = (weight_norm_(torch.empty_like(v), v, g) for _ in range(2))
    assert torch.equal(first, second)
    results = [(grad_v.clone(), grad_g.clone()) for _ in range(2)]
    for into in results:
        weight_norm_backward_(*into, grad_w, v, g)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    weight_norm_backward_(*(x[:0] for x in (grad_v, grad_g, grad_w, v, g)))
    assert weight_norm_(torch.empty(0, 70, device=v.device), v[:0], g[:0]).shape == (0, 70)


def test_opcheck(device):
    v, g, grad_w, grad_v, grad_g = inputs(5, 9, torch.bfloat16, device)
    torch.library.opcheck(torch.ops.dino_kernels.weight_norm_.default, (grad_w, v, g))
    for norms in (grad_g, None):
        torch.library.opcheck(torch.ops.dino_kernels.weight_norm_backward_.default, (grad_v, norms, grad_w, v, g))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"v": torch.zeros(6)}, r"v must have shape \[K, D\] with 1 <= D <= 4096, got \[6\]"),
        ({"v": torch.zeros(6, 0)}, "1 <= D <= 4096"),
        ({"v": torch.zeros(4, 6).T}, r"v must be contiguous, of shape \[6, 4\].*strides \[1, 6\]"),
        ({"v": torch.zeros(6, 4).half()}, "v must be .*dtype float32, got .*float16"),
        ({"g": torch.zeros(6)}, r"g must be contiguous, of shape \[6, 1\].*got shape \[6\]"),
        ({"g": torch.zeros(6, 1, device="meta")}, "g must be .* on cpu.* on meta"),
        ({"grad_v": torch.zeros(6, 5)}, r"grad_v must be contiguous, of shape \[6, 4\].*\[6, 5\]"),
        ({"grad_g": torch.zeros(6)}, r"grad_g must be contiguous, of shape \[6, 1\]"),
    ],
)
def test_bad_input(change, message):
    rows = {"v": torch.zeros(6, 4), "g": torch.zeros(6, 1)}
    gradients = {"grad_v": torch.zeros(6, 4), "grad_g": torch.zeros(6, 1)}
    with pytest.raises(ValueError, match=message):
        if change.keys() <= rows.keys():
            weight_norm_(torch.zeros(6, 4), **{**rows, **change})
        weight_norm_product_backward_(grad=torch.zeros(3, 6), x=torch.zeros(3, 4), **{**rows, **gradients, **change})


def test_bad_out():
    with pytest.raises(ValueError, match="out must be contiguous"):
        weight_norm_(torch.zeros(6, 5), torch.zeros(6, 4), torch.zeros(6, 1))
