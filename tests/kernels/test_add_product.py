import pytest
import torch
from checks import DTYPES, assert_as_accurate, cuda_function

from dino_kernels import add_product_, add_product_reference_


def inputs(tokens, outputs, width, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens + outputs + width)
    shapes = ((outputs, width), (tokens, outputs), (tokens, width))
    into, grad, x = (torch.randn(shape, generator=g) for shape in shapes)
    return into, grad.to(dtype), x.to(dtype)


def run(op, into, *operands):
    into = into.clone()
    op(into, *operands)
    return into


# The last four fit tiles: several groups of tokens, one and a few, none.
SHAPES = [(507, 199, 64), (37, 8, 16), (1, 1, 48), (193, 97, 112), (400, 20, 37), (0, 5, 16)]
SHAPES += [(1100, 96, 64), (513, 32, 160), (37, 64, 64), (0, 32, 32)]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, outputs, width", SHAPES)
def test_against_float64(dtype, tokens, outputs, width):
    tensors = inputs(tokens, outputs, width, dtype)
    exact = run(add_product_reference_, *(x.double() for x in tensors))
    ours, eager = (run(op, *tensors) for op in (add_product_, add_product_reference_))
    assert_as_accurate(ours, eager, exact, floor=2e-6)
    sums = []
    for op, kind in ((add_product_, None), (add_product_reference_, None), (add_product_reference_, torch.float64)):
        sums.append(torch.ones(outputs).to(kind))
        op(*(x.to(kind) for x in tensors), sums[-1])
    assert_as_accurate(*sums, floor=2e-6)


@pytest.mark.parametrize("shape", [(300, 200, 96), (1100, 64, 96)])
def test_adds_repeats_bitwise_and_is_the_same_for_any_number_of_threads(shape):
    into, grad, x = inputs(*shape)
    whole = run(add_product_, into, grad, x)
    zero = run(add_product_, torch.zeros_like(into), grad, x)
    torch.testing.assert_close(whole - into, zero, rtol=1e-5, atol=1e-4)
    before = torch.get_num_threads()
    for threads in (1, 3, before):
        torch.set_num_threads(threads)
        again = run(add_product_, into, grad, x)
        torch.set_num_threads(before)
        assert torch.equal(again, whole)


def test_a_buffer_on_no_border_and_opcheck():
    into, grad, x = inputs(50, 30, 32)
    shifted = torch.zeros(30 * 32 + 1)[1:].view(30, 32)
    add_product_(shifted, grad, x)
    torch.testing.assert_close(shifted, grad.t() @ x, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.dino_kernels.add_product_.default, (into, grad, x, torch.zeros(30)))
    torch.library.opcheck(torch.ops.dino_kernels.add_product_.default, (into, grad, x, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, outputs, width", [(507, 199, 64), (1100, 96, 64), (1, 1, 48), (37, 300, 16), (0, 5, 16)]
)
def test_on_cuda_sums_are_float32_and_added_in_place(monkeypatch, dtype, tokens, outputs, width):
    monkeypatch.setattr("dino_kernels.triton.column_sums._PROGRAMS", 6)  # several rounds a program even for few rows
    into, grad, x = inputs(tokens, outputs, width, dtype)
    bias = torch.ones(outputs)
    results = []
    for op, kind in ((add_product_reference_, torch.float32), (add_product_reference_, torch.float64)):
        results.append((into.to(kind), bias.to(kind)))
        op(results[-1][0], grad.to(kind), x.to(kind), results[-1][1])
    run_cuda, asked = cuda_function(monkeypatch, "add_product_")
    again = into.clone(), bias.clone()
    run_cuda(*again[:1], grad, x, again[1])
    run_cuda(into, grad, x, bias)
    assert torch.equal(into, again[0]) and torch.equal(bias, again[1])
    for ours, theirs, exact in zip((into, bias), *results, strict=True):
        assert_as_accurate(ours, theirs, exact, floor=2e-6)
    assert asked == ([("baddbmm", dtype, torch.float32)] * 2 if dtype != torch.float32 else [])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"into": torch.zeros(4, 6)}, r"\[O, I\], \[T, O\] and \[T, I\], got \[4, 6\], \[9, 4\] and \[9, 5\]"),
        ({"x": torch.zeros(8, 5)}, r"and \[8, 5\]"),
        ({"x": torch.zeros(9, 5).half()}, "grad and x of one dtype.*float32 and torch.float16"),
        ({"into": torch.zeros(4, 5).double()}, "into must be float32.*float64"),
        ({"grad": torch.zeros(4, 9).T}, r"grad must be contiguous .*strides \[1, 9\]"),
        ({"into_bias": torch.zeros(5)}, r"into_bias must have shape \[4\] and dtype float32, got \[5\]"),
        ({"x": torch.zeros(9, 5, device="meta")}, "x must be contiguous and on cpu as into, got .* on meta"),
    ],
)
def test_bad_input(change, message):
    x = {"into": torch.zeros(4, 5), "grad": torch.zeros(9, 4), "x": torch.zeros(9, 5)}
    add_product_(**x)
    with pytest.raises(ValueError, match=message):
        add_product_(**{**x, **change})
