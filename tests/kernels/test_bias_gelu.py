import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import bias_gelu, bias_gelu_reference


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    monkeypatch.setattr("dino_kernels.triton.bias_gelu._PROGRAMS", 6)  # several rounds a program even for few rows
    return use_backend(monkeypatch, "bias_gelu", request.param, ["forward", "backward"])


def inputs(tokens, channels, dtype=torch.float32, bias_dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(tokens + channels)
    x, bias = 2 * torch.randn(tokens, channels, generator=g), torch.randn(channels, generator=g)
    return x.to(device, dtype), bias.to(device, bias_dtype)


def run(op, x, bias, grad_out=None):
    x, bias = (t.detach().requires_grad_() for t in (x, bias))
    out = op(x, bias)
    if grad_out is None:
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device)
    return out.detach(), *torch.autograd.grad(out, (x, bias), grad_out.to(out.dtype))


@pytest.mark.parametrize("dtype, bias_dtype", [(d, torch.float32) for d in DTYPES] + [(d, d) for d in DTYPES[1:]])
@pytest.mark.parametrize("tokens, channels", [(37, 256), (199, 37), (1, 1), (507, 5), (20, 1100), (1, 3072)])
def test_against_float64(device, dtype, bias_dtype, tokens, channels):
    x, bias = inputs(tokens, channels, dtype, bias_dtype, device)
    actual, eager = run(bias_gelu, x, bias), run(bias_gelu_reference, x, bias)
    exact = run(bias_gelu_reference, x.double(), bias.double())
    assert [t.dtype for t in actual] == [dtype, dtype, bias_dtype]
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert ours.shape == truth.shape
        # 16 bit: Triton's interpreter cuts bfloat16 off where everything else rounds.
        floor = 2e-7 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
        assert_as_accurate(ours, theirs, truth, floor)


def test_the_whole_range(device):
    x = torch.linspace(-12, 12, 24_000, device=device).view(-1, 100)
    zero, ones = torch.zeros(100, device=device), torch.ones_like(x)
    out, grad, _ = run(bias_gelu, x, zero, ones)
    eager = run(bias_gelu_reference, x, zero, ones)
    exact = run(bias_gelu_reference, x.double(), zero.double(), ones)
    for ours, theirs, truth in zip((out, grad), eager, exact, strict=False):
        assert (ours - truth).abs().max() <= (theirs - truth).abs().max()  # closer than the form with erf
    tail = (x > -8) & (x < -0.1)  # there erf's form has lost all digits
    x = x.double()
    truth = x * torch.special.erfc(-x / 2**0.5) / 2
    assert (out[tail] / truth[tail] - 1).abs().max() < 2e-3


def test_identities(device):
    """gelu(x) - gelu(-x) = x; gelu'(x) + gelu'(-x) = 1; gelu(0) = 0 with slope 1/2."""
    x, _ = inputs(40, 60, device=device)
    zero, ones = torch.zeros(60, device=device), torch.ones_like(x)
    (up, up_slope, _), (down, down_slope, _) = (run(bias_gelu, sign * x, zero, ones) for sign in (1, -1))
    torch.testing.assert_close(up - down, x, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(up_slope + down_slope, ones, rtol=1e-6, atol=0)
    out, slope, _ = run(bias_gelu, torch.zeros_like(x), zero, ones)
    assert not out.any() and torch.equal(slope, ones / 2)


def test_a_bias_shifts_x_and_its_gradient_is_the_column_sum(device):
    x, bias = inputs(70, 50, device=device)
    out, grad_x, grad_bias = run(bias_gelu, x, bias)
    shifted, grad_shifted, _ = run(bias_gelu, x + bias, torch.zeros_like(bias))
    assert torch.equal(out, shifted) and torch.equal(grad_x, grad_shifted)
    torch.testing.assert_close(grad_bias, grad_x.sum(0), rtol=1e-5, atol=1e-5)


def test_huge_infinite_and_nan(device):
    x = torch.tensor([[1e30, -1e30, torch.inf, -torch.inf, torch.nan, 100.0, -100.0]], device=device)
    out, slope, _ = run(bias_gelu, x, torch.zeros(7, device=device), torch.ones_like(x))
    expected = torch.tensor([[1e30, 0, torch.inf, 0, torch.nan, 100.0, 0]], device=device)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14, equal_nan=True)
    assert slope[0, 4].isnan()
    slope[0, 4] = 0
    torch.testing.assert_close(slope, (x > 0).float(), rtol=0, atol=1e-12)


def test_repeats_bitwise_and_takes_an_expanded_upstream(device):
    x, bias = inputs(300, 70, device=device)
    assert all(torch.equal(a, b) for a, b in zip(run(bias_gelu, x, bias), run(bias_gelu, x, bias), strict=True))
    one = torch.ones((), device=device)
    expanded, full = (run(bias_gelu, x, bias, one.expand(x.shape)), run(bias_gelu, x, bias, torch.ones_like(x)))
    assert all(torch.equal(a, b) for a, b in zip(expanded, full, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    x = inputs(600, 50)
    expected = run(bias_gelu, *x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = run(bias_gelu, *x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-6, atol=1e-6)  # torch adds up the groups


def test_keeps_only_x_and_the_bias():
    x, bias = inputs(3, 4)
    out = bias_gelu(x.requires_grad_(), bias.requires_grad_())
    assert [t.data_ptr() for t in out.grad_fn.saved_tensors] == [x.data_ptr(), bias.data_ptr()]


def test_no_tokens(device):
    out, grad_x, grad_bias = run(bias_gelu, *inputs(0, 5, device=device))
    assert out.shape == grad_x.shape == (0, 5) and torch.equal(grad_bias, torch.zeros_like(grad_bias))


def test_opcheck_and_compile(device):
    x, bias = inputs(5, 9, torch.float16, device=device)
    args = (x.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.dino_kernels.bias_gelu.default, args)
    for again in (False, True):
        args = (torch.ones_like(x), x.detach(), bias.detach(), again)
        torch.library.opcheck(torch.ops.dino_kernels.bias_gelu_backward.default, args)

    def doubled(x, bias):
        return 3 * bias_gelu(2 * x, 2 * bias)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(run(compiled, x, bias), run(doubled, x, bias), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must have shape \[T, C\] with C >= 1 \(flatten.*\[2, 3, 4\]"),
        ({"x": torch.zeros(6, 0)}, "C >= 1"),
        ({"x": torch.zeros(6, 4).double()}, "dtype float32, float16 or bfloat16.*float64"),
        ({"x": torch.zeros(4, 6).T}, r"x must have.*contiguous.*strides \[1, 6\]"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \[4\].*got \[5\]"),
        ({"bias": torch.zeros(4).half()}, "dtype float32 or torch.float32.*got .*float16"),
        ({"bias": torch.zeros(8)[::2]}, r"be contiguous.*strides \[2\]"),
        ({"bias": torch.zeros(4, device="meta")}, "on cpu, got .*meta"),
    ],
)
def test_bad_input(change, message):
    x = {"x": torch.zeros(6, 4), "bias": torch.zeros(4)}
    bias_gelu(**x)
    with pytest.raises(ValueError, match=message):
        bias_gelu(**{**x, **change})
