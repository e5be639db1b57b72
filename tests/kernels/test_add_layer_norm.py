import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import add_layer_norm, add_layer_norm_reference
from dino_kernels._core.registry import without_autograd

# 16 bit: Triton's interpreter cuts bfloat16 off where everything else rounds.
FLOORS = {d: 1e-6 if d == torch.float32 else torch.finfo(d).eps for d in DTYPES}
NAMES = ("total", "normed", "x", "branch", "weight", "bias")

ROWS = {
    "some": lambda tokens: range(1, tokens, 3),
    "others": lambda tokens: [i for i in range(tokens) if i % 5 < 3],
    "one": lambda tokens: [tokens // 2],
    "none": lambda tokens: [],
}


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    monkeypatch.setattr("dino_kernels.triton.add_layer_norm._PROGRAMS", 3)  # several rounds a program even for few rows
    return use_backend(monkeypatch, "add_layer_norm", request.param, ["forward", "backward"])


def inputs(tokens, channels, dtypes=(torch.float32, torch.float32), device="cpu", offset=1.0):
    g = torch.Generator().manual_seed(tokens + channels)
    x, branch = (torch.randn(tokens, channels, generator=g) + offset for _ in dtypes)
    weight, bias = 1 + torch.randn(2, channels, generator=g) / 2
    scale = (torch.rand(tokens, generator=g) < 0.7) / 0.7
    x, branch = x.to(device, dtypes[0]), branch.to(device, dtypes[1])
    return x, branch, weight.to(device), bias.to(device), scale.to(device)


def numbers(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def run(op, x, branch, weight, bias, scale=None, upstream=(True, True), **options):
    """Both outputs, then the gradients from a random upstream on those outputs that are named."""
    leaves = [t.detach().requires_grad_() for t in (x, branch, weight, bias)]
    outs = op(*leaves, scale=scale, **options)
    g = torch.Generator().manual_seed(7)
    grads = [torch.randn(out.shape, generator=g).to(out.device, out.dtype) for out in outs]
    used, grads = (tuple(t for t, use in zip(ts, upstream, strict=True) if use) for ts in (outs, grads))
    return *(out.detach() for out in outs), *torch.autograd.grad(used, leaves, grads, allow_unused=True)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, channels",
    [(37, 384), (1, 7), (13, 507), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in [(300, 37), (3, 4096)])],
)
@pytest.mark.parametrize("scaled", [True, False])
def test_against_float64(device, x_dtype, branch_dtype, tokens, channels, scaled):
    *x, scale = inputs(tokens, channels, (x_dtype, branch_dtype), device)
    scale = scale if scaled else None
    actual, eager = run(add_layer_norm, *x, scale), run(add_layer_norm_reference, *x, scale)
    exact = run(add_layer_norm_reference, *(t.double() for t in x), scale)
    assert [t.dtype for t in actual] == [x_dtype, branch_dtype] * 2 + [torch.float32] * 2
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert ours.shape == truth.shape
        # All but the total follow the rounded total.
        assert_as_accurate(ours, theirs, truth, floor=max(FLOORS[ours.dtype], FLOORS[x_dtype]))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("chosen", ["some", None])
def test_sums_of_the_branchs_gradient_are_added_and_change_nothing_else(device, dtypes, scaled, chosen):
    x, branch, weight, bias, scale = inputs(300, 37, dtypes, device)
    rows = None if chosen is None else numbers(ROWS[chosen](300), device)
    branch, scale = (t[: 300 if rows is None else len(rows)] for t in (branch, scale))
    drop_path = scale if scaled else None, rows, None
    total, normed, mean, rstd = without_autograd("add_layer_norm")(x, branch, weight, bias, *drop_path, 1e-6)
    results = []
    for sums in (None, torch.full((37,), 2.0, device=device)):
        into = [torch.ones(37, device=device) for _ in range(2)]
        arguments = total, normed, total, mean, rstd, weight, *drop_path, *into, sums
        results.append([*without_autograd("add_layer_norm_backward_")(*arguments), *into])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    grad_x, grad_branch, *_ = results[0]
    summed = grad_branch if grad_branch.ndim == 2 else grad_x
    # The branch's gradient is rounded after it is summed.
    tolerance = {} if dtypes[1] == torch.float32 else {"rtol": 2e-2, "atol": 0.5}
    torch.testing.assert_close(sums - 2, summed.float().sum(0), **({"rtol": 1e-5, "atol": 1e-4} | tolerance))


def test_rows_have_the_bias_as_mean_and_the_weight_as_deviation(device):
    x, branch, *_ = inputs(20, 199, device=device, offset=50.0)
    weight, bias = (torch.full((199,), value, device=device) for value in (1.7, -0.3))
    _, normed = add_layer_norm(x, branch, weight, bias)
    torch.testing.assert_close(normed.mean(1), bias[:20], rtol=0, atol=1e-4)
    torch.testing.assert_close(normed.std(1, correction=0), weight[:20], rtol=1e-4, atol=0)


def test_the_norms_gradient_is_orthogonal_to_shifts_and_scalings_of_a_row(device):
    x, branch, weight, bias, scale = inputs(20, 199, device=device)
    total, _, grad, *_ = run(add_layer_norm, x, branch, weight, bias, scale, upstream=(False, True))
    zero = torch.zeros(20, device=device)
    torch.testing.assert_close(grad.sum(1), zero, rtol=0, atol=2e-5)
    torch.testing.assert_close((grad * total).sum(1), zero, rtol=0, atol=2e-4)


def test_dropped_rows_keep_x_and_give_the_branch_no_gradient(device):
    x, branch, weight, bias, scale = inputs(50, 40, device=device)
    dropped = scale == 0
    assert dropped.any() and not dropped.all()
    total, _, _, grad_branch, *_ = run(add_layer_norm, x, branch, weight, bias, scale)
    assert torch.equal(total[dropped], x[dropped]) and not grad_branch[dropped].any()
    assert not torch.equal(total[~dropped], x[~dropped]) and grad_branch[~dropped].all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("rows, normed_rows", [("some", "others"), ("none", "some"), ("one", None), (None, "one")])
@pytest.mark.parametrize("upstream", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("scaled", [True, False])
def test_rows_that_are_skipped_against_float64(device, dtypes, rows, normed_rows, upstream, scaled):
    x, branch, weight, bias, scale = inputs(300, 37, dtypes, device)
    options = {
        name: numbers(ROWS[choice](300), device)
        for name, choice in (("rows", rows), ("normed_rows", normed_rows))
        if choice is not None
    }
    count = len(options.get("rows", x))
    arguments = x, branch[:count], weight, bias
    scale = scale[:count] if scaled else None
    actual, eager = (
        run(op, *arguments, scale, upstream, **options) for op in (add_layer_norm, add_layer_norm_reference)
    )
    exact = run(add_layer_norm_reference, *(t.double() for t in arguments), scale, upstream, **options)
    assert [len(t) for t in actual[:2]] == [300, len(options.get("normed_rows", x))]
    for name, ours, theirs, truth in zip(NAMES, actual, eager, exact, strict=True):
        assert (ours is None) == (truth is None), name
        if truth is not None and truth.numel():
            assert ours.shape == truth.shape
            assert_as_accurate(ours, theirs, truth, floor=FLOORS[ours.dtype])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16])
def test_skipping_rows_equals_multiplying_them_by_zero(device, branch_dtype, threads):
    """Bitwise: the same sums of the same numbers, but for the branch's rows that are not there."""
    x, branch, weight, bias, scale = inputs(1000, 60, (torch.float32, branch_dtype), device)
    kept = scale > 0
    rows = kept.nonzero().flatten().int()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        multiplied = run(add_layer_norm, x, branch, weight, bias, scale)
        skipped = run(add_layer_norm, x, branch[kept], weight, bias, scale[kept], rows=rows)
        total, normed = add_layer_norm(x, branch, weight, bias, scale=scale, normed_rows=rows)
    finally:
        torch.set_num_threads(before)
    for name, ours, expected in zip(NAMES, skipped, multiplied, strict=True):
        assert torch.equal(ours, expected[kept] if name == "branch" else expected), name
    assert torch.equal(total, multiplied[0]) and torch.equal(normed, multiplied[1][kept])


@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.float16])
def test_no_scale_equals_ones_and_a_column_a_vector(device, branch_dtype):
    *x, scale = inputs(30, 65, (torch.float32, branch_dtype), device)
    for one, other in ((None, torch.ones_like(scale)), (scale, scale[:, None])):
        for a, b in zip(run(add_layer_norm, *x, one), run(add_layer_norm, *x, other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)])
@pytest.mark.parametrize("upstream", [(True, False), (False, True)])
def test_either_upstream_may_be_missing(device, dtypes, scaled, upstream):
    *x, scale = inputs(30, 65, dtypes, device)
    scale = scale if scaled else None
    actual = run(add_layer_norm, *x, scale, upstream)
    eager = run(add_layer_norm_reference, *x, scale, upstream)
    exact = run(add_layer_norm_reference, *(t.double() for t in x), scale, upstream)
    for name, ours, theirs, truth in zip(NAMES, actual, eager, exact, strict=True):
        assert (ours is None) == (truth is None), name
        if truth is not None:
            assert_as_accurate(ours, theirs, truth, floor=FLOORS[ours.dtype])


def test_one_channel_is_all_mean(device):
    *x, scale = inputs(30, 1, device=device)
    total, normed, grad_x, _, grad_weight, _ = run(add_layer_norm, *x, scale, (False, True), eps=0.1)
    torch.testing.assert_close(normed, x[3].expand(30, 1))
    for zero in (grad_x, grad_weight):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-6)


def test_large_means_and_eps(device):
    """The variance is that of the centered row, not a difference of squares."""
    *x, scale = inputs(10, 300, device=device, offset=500.0)
    for eps in (1e-6, 0.5):
        actual, eager = (run(op, *x, scale, eps=eps) for op in (add_layer_norm, add_layer_norm_reference))
        exact = run(add_layer_norm_reference, *(t.double() for t in x), scale, eps=eps)
        for ours, theirs, truth in zip(actual, eager, exact, strict=True):
            assert_as_accurate(ours, theirs, truth, floor=1e-6)


def test_repeats_bitwise_and_takes_an_expanded_upstream(device):
    *x, scale = inputs(300, 70, device=device)
    first, second = run(add_layer_norm, *x, scale), run(add_layer_norm, *x, scale)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x[0].requires_grad_()
    total, normed = add_layer_norm(*x, scale=scale)
    (expanded,) = torch.autograd.grad(total.sum() + normed.sum(), x[0], retain_graph=True)
    ones = torch.ones_like(total)
    assert torch.equal(expanded, *torch.autograd.grad((total, normed), x[0], (ones, ones)))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    x = inputs(600, 50)
    expected = run(add_layer_norm, *x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = run(add_layer_norm, *x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual[:4], expected[:4], strict=True))
    for ours, truth in zip(actual[4:], expected[4:], strict=True):  # torch adds up the groups
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-5)


def test_no_tokens(device):
    shapes = [t.shape for t in run(add_layer_norm, *inputs(0, 5, device=device))]
    assert shapes == [(0, 5)] * 4 + [(5,)] * 2


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("skipping", [True, False])
def test_opcheck_and_compile(device, scaled, skipping):
    *x, scale = inputs(5, 9, (torch.float32, torch.float16), device)
    rows, normed_rows = (numbers([0, 3], device), numbers([2, 3, 4], device)) if skipping else (None, None)
    x[1], scale = (t[:2] if skipping else t for t in (x[1], scale))
    drop_path = (scale if scaled else None, rows, normed_rows)
    torch.library.opcheck(
        torch.ops.dino_kernels.add_layer_norm.default, (*(t.requires_grad_() for t in x), *drop_path, 1e-6)
    )
    total, normed, mean, rstd = torch.ops.dino_kernels.add_layer_norm(*(t.detach() for t in x), *drop_path, 1e-6)
    for grad_total in (total, None):
        args = (grad_total, normed, total, mean, rstd, x[2].detach(), *drop_path, *torch.ones(2, 9, device=device))
        for sums in (None, torch.ones(9, device=device)):
            torch.library.opcheck(torch.ops.dino_kernels.add_layer_norm_backward_.default, (*args, sums))

    def doubled(x, branch, weight, bias, **options):
        total, normed = add_layer_norm(2 * x, 2 * branch, weight, bias, **options)
        return 3 * total, 3 * normed

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    options = {"rows": rows, "normed_rows": normed_rows}
    for upstream in ((True, True), (False, True)):
        results = (run(f, *x, drop_path[0], upstream, **options) for f in (compiled, doubled))
        for ours, truth in zip(*results, strict=True):
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must have shape \[T, C\] with C >= 1 \(flatten.*\[2, 3, 4\]"),
        ({"x": torch.zeros(4, 6).T}, r"x must have.*contiguous.*strides \[1, 6\]"),
        ({"branch": torch.zeros(6, 4).double()}, "dtype float32, float16 or bfloat16.*float64"),
        ({"branch": torch.zeros(6, 5)}, r"branch must have the shape and device of x"),
        ({"x": torch.zeros(1, 5000), "branch": torch.zeros(1, 5000)}, r"at most 4096 channels, got shape \[1, 5000\]"),
        ({"weight": torch.zeros(5)}, r"weight must have shape \[4\], dtype float32.*got \[5\]"),
        ({"bias": torch.zeros(4).half()}, "bias must have.*dtype float32.*float16"),
        ({"bias": torch.zeros(8)[::2]}, r"be contiguous.*strides \[2\]"),
        ({"weight": torch.zeros(4, device="meta")}, "weight must be on cpu as x, got meta"),
        ({"scale": torch.zeros(4)}, r"scale must have shape \[6\] or \[6, 1\].*got \[4\]"),
        ({"scale": torch.zeros(6, requires_grad=True)}, r"need no gradient \(detach it\)"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"rows": torch.arange(6)}, "rows must have one dimension, dtype int32.*int64"),
        ({"rows": numbers([0, 1])}, r"branch must have a row for each of rows, .*\[2, 4\] on cpu, got \[6, 4\]"),
        ({"rows": numbers([0, 1, 2, 3, 4, 6])}, "rows must rise from at least 0 to below the 6 tokens.*6 at place 5"),
        ({"normed_rows": numbers([2, 1])}, "normed_rows must rise.*got 1 at place 1"),
        ({"normed_rows": numbers([-1])}, "normed_rows must rise.*got -1 at place 0"),
        ({"normed_rows": torch.zeros(0, 2, dtype=torch.int32)}, r"normed_rows must have one dimension.*\[0, 2\]"),
    ],
)
def test_bad_input(change, message):
    x = {name: torch.zeros(6, 4) for name in ("x", "branch")} | {name: torch.zeros(4) for name in ("weight", "bias")}
    add_layer_norm(**x)
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{**x, **change})
