import pytest
import torch
from checks import DTYPES, assert_as_accurate, cuda_function
from launches import counted

from dino_kernels import linear, linear_reference
from dino_kernels._core.native import Products

# (tokens, inputs, outputs): few tokens, blocks of tokens and what is left, units beyond a chunk; weights beyond a
# second-level cache; two do not fit AMX.
SHAPES = [
    (1, 32, 32),
    (37, 64, 96),
    (64, 96, 32),
    (65, 32, 64),
    (199, 448, 64),
    (300, 32, 160),
    (150, 736, 736),
    (37, 33, 64),
    (5, 32, 7),
]


def inputs(tokens, width, outputs, dtype, transposed):
    g = torch.Generator().manual_seed(tokens + width + outputs)
    shape = (width, outputs) if transposed else (outputs, width)
    sizes = ((tokens, width), shape, (outputs,))
    return [torch.randn(size, generator=g).to(dtype) for size in sizes]


def run(op, x, weight, bias, **options):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = op(*leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens, width, outputs", SHAPES)
def test_against_float64(products, dtype, transposed, tokens, width, outputs):
    x = inputs(tokens, width, outputs, dtype, transposed)
    exact = run(linear_reference, *(t.double() for t in x), transposed=transposed)
    eager = run(linear_reference, *x, transposed=transposed)
    floor = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    if products == Products.amx and dtype == torch.float32:
        floor = 2e-6  # an AMX tile adds 736 products one after the other; torch's blocks err less on an EPYC
    for ours, theirs, truth in zip(run(linear, *x, transposed=transposed), eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == truth.shape
        assert_as_accurate(ours, theirs, truth, floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_bias_is_a_product_and_repeats_bitwise(products, dtype):
    x, weight, bias = inputs(130, 64, 96, dtype, False)
    out = linear(x, weight)
    assert torch.equal(out, linear(x, weight, torch.zeros_like(bias))) and torch.equal(out, linear(x, weight))
    assert torch.equal(linear(x[:70], weight), out[:70])  # a row is its own, whatever the block it is in
    assert torch.equal(linear(2 * x, weight), 2 * out)


def test_float32_of_any_magnitude_and_not_finite(products):
    """Each term as exact as float32 is, whatever those beside it; what is not finite stays in its row."""
    x, weight, bias = inputs(200, 96, 64, torch.float32, False)
    g = torch.Generator().manual_seed(5)
    x, weight = (t * torch.exp(8 * torch.randn(t.shape, generator=g)) for t in (x, weight))
    exact = linear_reference(x.double(), weight.double())
    error = (linear(x, weight) - exact).abs() / linear_reference(x.double().abs(), weight.double().abs())
    assert error.max() < 2e-6
    x[3, 5], x[150, 0] = float("inf"), float("nan")
    finite = linear(x, weight).isfinite()
    assert not finite[[3, 150]].any() and finite.sum() == 198 * 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_so_many_outputs_that_caches_are_passed(products, dtype):
    x, weight, bias = inputs(40, 64, 16416, dtype, False)
    torch.testing.assert_close(linear(x, weight, bias)[:, -96:], linear(x, weight[-96:], bias[-96:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [32, 7])
def test_a_strided_bias(products, dtype, outputs):
    x, weight, bias = inputs(70, 64, outputs, dtype, False)
    for strided in (torch.stack([bias, torch.full_like(bias, float("nan"))], 1)[:, 0], bias[:1].expand(outputs)):
        assert torch.equal(linear(x, weight, strided), linear(x, weight, strided.clone().contiguous()))


def test_strided_operands_no_tokens_and_opcheck(products):
    x, weight, bias = inputs(70, 64, 32, torch.bfloat16, False)
    wide = torch.full((70, 80), float("nan")).bfloat16()
    wide[:, 5:69] = x
    expected = linear(x, weight, bias)
    torch.testing.assert_close(linear(wide[:, 5:69], weight.t().contiguous().t(), bias), expected)
    assert linear(x[:0], weight, bias).shape == (0, 32)
    for dtype in DTYPES:  # a sum of nothing
        assert torch.equal(
            linear(torch.zeros(70, 0).to(dtype), torch.zeros(32, 0).to(dtype)), torch.zeros(70, 32).to(dtype)
        )
    for transposed, w in ((False, weight), (True, weight.t().contiguous())):
        torch.library.opcheck(torch.ops.dino_kernels.linear.default, (x, w, bias, transposed))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [64, 5000])
def test_on_cuda_a_long_sum_is_rounded_to_16_bit_once(monkeypatch, dtype, transposed, width):
    x, weight, bias = inputs(9, width, 32, dtype, transposed)
    exact = linear_reference(x.double(), weight.double(), bias.double(), transposed=transposed)
    run_cuda, products = cuda_function(monkeypatch, "linear")
    ours = run_cuda(x, weight, bias, transposed)
    assert ours.dtype == dtype and (ours - exact).abs().max() <= exact.abs().max() * max(1e-6, torch.finfo(dtype).eps)
    wide = width > 4096 and dtype != torch.float32
    assert products == ([("mm", dtype, torch.float32)] if wide else [])


@pytest.mark.parametrize("transposed", [False, True])
def test_on_cuda_the_weights_gradient_is_rounded_to_16_bit_once(transposed):
    """A sum over all tokens; so is the bias's."""
    x, weight, bias = (t.to("meta") for t in inputs(6000, 32, 64, torch.bfloat16, transposed))
    with counted() as launches:
        grads = run(linear, x, weight, bias, transposed=transposed)[1:]
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (x, weight, bias)]
    names = [name for _, name in launches]
    assert "aten::baddbmm" in names and "triton::_matrix_kernel" in names and "aten::sum" not in names


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(9, 6)}, r"shapes \[T, D\] and \[O, D\], got \[9, 6\] and \[4, 5\]"),
        ({"transposed": True}, r"shapes \[T, D\] and \[D, O\], got \[9, 5\] and \[4, 5\]"),
        ({"weight": torch.zeros(4)}, r"got \[9, 5\] and \[4\]"),
        ({"x": torch.zeros(9, 5).half()}, "dtype of x, torch.float16, got weight torch.float32"),
        ({"bias": torch.zeros(5)}, r"a bias \[4\] must have.* and bias torch.float32 \[5\]"),
    ],
)
def test_bad_input(change, message):
    x = {"x": torch.zeros(9, 5), "weight": torch.zeros(4, 5), "bias": torch.zeros(4)}
    linear(**x)
    with pytest.raises(ValueError, match=message):
        linear(**{**x, **change})
