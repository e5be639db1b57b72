import pytest
import torch
from checks import DTYPES, assert_as_accurate, cuda_function

from dino_kernels import mlp, mlp_reference
from dino_kernels._core.registry import without_autograd

pytestmark = pytest.mark.usefixtures("products")
# (tokens, channels, hidden): blocks of tokens and what is left, units beyond one chunk; one that does not fit tiles;
# several groups and chunks of tokens, fewer hidden channels; weights beyond a second-level cache.
SHAPES = [(1, 32, 32), (37, 32, 128), (128, 64, 64), (260, 96, 448), (50, 33, 40), (1101, 64, 32), (200, 384, 768)]


def inputs(tokens, channels, hidden, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens + channels + hidden)
    weights = torch.randn(hidden, channels, generator=g), torch.randn(channels, hidden, generator=g)
    weight1, weight2 = (w.div(w.shape[1] ** 0.5).to(dtype) for w in weights)
    bias1, bias2 = torch.randn(hidden, generator=g), torch.randn(channels, generator=g)
    return torch.randn(tokens, channels, generator=g).to(dtype), weight1, bias1, weight2, bias2


def run(op, *x):
    leaves = [t.detach().requires_grad_() for t in x]
    out = op(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, channels, hidden", SHAPES)
def test_against_float64(dtype, tokens, channels, hidden):
    x = inputs(tokens, channels, hidden, dtype)
    exact, eager = run(mlp_reference, *(t.double() for t in x)), run(mlp_reference, *x)
    floor = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for ours, theirs, truth, given in zip(run(mlp, *x), eager, exact, (x[0], *x), strict=True):
        assert ours.dtype == given.dtype and ours.shape == truth.shape
        assert_as_accurate(ours, theirs, truth, floor)


def test_a_backward_adds_and_needs_no_output_kept():
    x, weight1, bias1, weight2, bias2 = inputs(150, 64, 96, torch.bfloat16)
    out, hidden = without_autograd("mlp")(x, weight1, bias1, weight2, bias2, True)
    with torch.no_grad():
        assert torch.equal(mlp(x, weight1, bias1, weight2, bias2), out)
    grads = [torch.zeros(t.shape) for t in (weight1, bias1, weight2, bias2)]
    added = [torch.ones_like(grad) for grad in grads]
    backward_ = without_autograd("mlp_backward_")
    first = backward_(out, x, hidden, weight1, bias1, weight2, *grads)
    again = backward_(out, x, hidden, weight1, bias1, weight2, *added)
    assert torch.equal(first, again)
    for grad, more in zip(grads, added, strict=True):
        torch.testing.assert_close(more - 1, grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, channels, hidden", [(37, 32, 128), (300, 33, 40), (1, 64, 96), (130, 96, 136)])
def test_on_cuda_against_float64(monkeypatch, dtype, tokens, channels, hidden):
    x = inputs(tokens, channels, hidden, dtype)
    exact, eager = run(mlp_reference, *(t.double() for t in x)), run(mlp_reference, *x)
    grad = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    forward, _ = cuda_function(monkeypatch, "mlp")
    backward_, _ = cuda_function(monkeypatch, "mlp_backward_")
    out, kept = forward(*x, True)
    assert torch.equal(out, forward(*x, False)[0])
    into = [torch.ones(t.shape) for t in x[1:]]
    ours = [out, backward_(grad, x[0], kept, *x[1:4], *into), *(t - 1 for t in into)]
    floor = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_accurate(mine, theirs, truth, floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_last_bias_of_the_dtype_of_x_and_without_its_gradient(dtype):
    x, weight1, bias1, weight2, bias2 = inputs(150, 64, 96, dtype)
    bias2 = bias2.to(dtype)
    narrow, wide = run(mlp, x, weight1, bias1, weight2, bias2), run(mlp, x, weight1, bias1, weight2, bias2.float())
    assert narrow[-1].dtype == dtype and torch.equal(narrow[-1], wide[-1].to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(narrow[:-1], wide[:-1], strict=True))
    _, hidden = without_autograd("mlp")(x, weight1, bias1, weight2, bias2, True)
    results = []
    for last in (torch.zeros(64), None):
        grads = [torch.zeros(t.shape) for t in (weight1, bias1, weight2)]
        results.append([without_autograd("mlp_backward_")(x, x, hidden, weight1, bias1, weight2, *grads, last), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gelu_lies_between():
    """With identities around it, and with a bias that opens or shuts it."""
    x = inputs(70, 32, 32)[0]
    eye, zero = torch.eye(32), torch.zeros(32)
    torch.testing.assert_close(mlp(x, eye, zero, eye, zero), torch.nn.functional.gelu(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mlp(x, eye, zero + 30, eye, zero), x + 30)
    torch.testing.assert_close(mlp(x, eye, zero - 30, eye, zero + 2), torch.full_like(x, 2), rtol=1e-6, atol=1e-6)


def test_no_tokens_opcheck_and_compile():
    x = inputs(40, 32, 64, torch.bfloat16)
    assert mlp(x[0][:0], *x[1:]).shape == (0, 32)
    torch.library.opcheck(torch.ops.dino_kernels.mlp.default, (*x, True))
    hidden = torch.ops.dino_kernels.mlp(*x, True)[1]
    grads = [torch.zeros(t.shape) for t in x[1:]]
    torch.library.opcheck(torch.ops.dino_kernels.mlp_backward_.default, (x[0], x[0], hidden, *x[1:4], *grads))
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, *x), run(mlp, *x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(9, 6)}, r"shapes \[T, C\] and \[H, C\], got \[9, 6\] and \[4, 5\]"),
        ({"weight2": torch.zeros(4, 5)}, r"shapes \[4\], \[5, 4\] and \[5\], got \[4\], \[4, 5\] and \[5\]"),
        ({"bias1": torch.zeros(5)}, r"got \[5\], \[5, 4\] and \[5\]"),
        ({"x": torch.zeros(9, 5).half()}, "of one dtype.*float16, torch.float32 and torch.float32"),
        (
            {"bias2": torch.zeros(5).half()},
            "bias1 must be float32, bias2 float32 or torch.float32, got torch.float32 and torch.float16",
        ),
        ({"x": torch.zeros(5, 9).T}, r"x must be contiguous .*got strides \[1, 9\]"),
        ({"bias1": torch.ones(1).expand(4)}, r"bias1 must be contiguous .*got strides \[0\]"),
        ({"bias2": torch.zeros(5, device="meta")}, "bias2 must be .* on cpu as x, got .* on meta"),
    ],
)
def test_bad_input(change, message):
    x = {"x": torch.zeros(9, 5), "weight1": torch.zeros(4, 5), "bias1": torch.zeros(4)}
    x |= {"weight2": torch.zeros(5, 4), "bias2": torch.zeros(5)}
    mlp(**x)
    with pytest.raises(ValueError, match=message):
        mlp(**{**x, **change})
