import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import dino_loss, patch_loss, patch_loss_reference


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    use_backend(monkeypatch, "dino_loss", request.param, ["forward", "scale"])
    return use_backend(monkeypatch, "patch_loss", request.param, ["forward"])


def inputs(rows, outputs, dtype=torch.float32, device="cpu", scale=0.3):
    g = torch.Generator().manual_seed(rows * 1000 + outputs)
    student, teacher = (torch.randn(rows, outputs, generator=g) * scale for _ in range(2))
    center, weights = torch.randn(outputs, generator=g) * 0.1, torch.rand(rows, generator=g) / rows
    weights[1::3] = 0
    return student.to(device, dtype), teacher.to(device, dtype), center.to(device), weights.to(device)


def run(op, student, teacher, center, weights, upstream=1.0, **options):
    student = student.detach().clone().requires_grad_()
    loss, batch_center = op(student, teacher, center, weights=weights, **options)
    (loss * upstream).backward()
    return loss.detach(), batch_center, student.grad


def rounding(dtype):
    return 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, outputs", [(7, 1024), (20, 37), (3, 507), (1, 2), (2, 4133)])
def test_against_float64(device, dtype, rows, outputs):
    x = inputs(rows, outputs, dtype, device)
    actual, eager = run(patch_loss, *x, upstream=-1.7), run(patch_loss_reference, *x, upstream=-1.7)
    exact = run(patch_loss_reference, *(t.double() for t in x), upstream=-1.7)
    assert actual[0].dtype == actual[1].dtype == torch.float32 and actual[2].dtype == dtype
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert ours.shape == truth.shape
        assert_as_accurate(ours, theirs, truth, floor=rounding(dtype))


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
def test_flat_and_sharp_logits(device, scale):
    """Denormal, underflowing and one-hot probabilities."""
    x = inputs(4, 1500, device=device, scale=scale)
    exact = run(patch_loss_reference, *(t.double() for t in x))
    for ours, truth in zip(run(patch_loss, *x), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6 * max(1, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_weight_zero_are_not_read(device, dtype):
    student, teacher, center, weights = inputs(11, 333, dtype, device)
    counted = weights != 0
    holes = [x.masked_fill(~counted[:, None], float("nan")) for x in (student, teacher)]
    expected = run(patch_loss, student[counted], teacher[counted], center, weights[counted])
    for inplace in (False, True):
        logits = holes[0].clone().requires_grad_()
        loss, batch_center = patch_loss(logits, holes[1], center, weights=weights, inplace=inplace)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(batch_center, expected[1], rtol=1e-5, atol=1e-7)
        assert torch.equal(logits.grad[counted], expected[2]) and not logits.grad[~counted].any()
    loss, batch_center, grad = run(patch_loss, *holes, center, torch.zeros_like(weights))
    assert loss == 0 and not batch_center.any() and not grad.any()


def test_no_rows(device):
    student, teacher, center, weights = (x[:0] if i != 2 else x for i, x in enumerate(inputs(2, 65, device=device)))
    for inplace in (False, True):
        loss, batch_center, grad = run(patch_loss, student * 1, teacher, center, weights, inplace=inplace)
        assert loss == 0 and not batch_center.any() and grad.shape == (0, 65)


def test_with_equal_weights_it_is_dino_loss_of_two_views(device):
    """Each view learns from the other one: rows of the teacher exchanged."""
    student, teacher, center, _ = inputs(8, 199, device=device)
    weights = torch.full((8,), 1 / 8, device=device)
    ours = run(patch_loss, student, teacher.roll(4, dims=0), center, weights, teacher_temp=0.04)
    leaf = student.clone().requires_grad_()
    loss, batch_center = dino_loss(leaf, teacher, center)
    loss.backward()
    torch.testing.assert_close(ours, (loss.detach(), batch_center, leaf.grad), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_chunks_are_those_of_the_whole(device, dtype):
    student, teacher, center, weights = inputs(10, 336, dtype, device)
    loss, batch_center, grad = run(patch_loss, student, teacher, center, weights)
    chunks = [
        run(patch_loss, *x[:2], center, x[2], inplace=True)
        for x in zip(*(x.split([4, 1, 5]) for x in (student * 1, teacher, weights)), strict=True)
    ]
    assert torch.equal(torch.cat([chunk[2] for chunk in chunks]), grad)
    torch.testing.assert_close(sum(chunk[0] for chunk in chunks), loss)


@pytest.mark.parametrize("columns", [333, 336])
def test_repeats_bitwise_in_place_and_with_strided_rows(device, columns):
    student, teacher, center, weights = inputs(6, columns, device=device)
    first = run(patch_loss, student, teacher, center, weights)
    wide = torch.ones(12, 400, device=device)
    wide[::2, 16 : columns + 16], rows = student, wide[::2, 16 : columns + 16]
    for logits, inplace in ((student, False), (student.clone(), True), (rows, False), (rows, True)):
        leaf = logits.detach().requires_grad_()
        loss, batch_center = patch_loss(leaf, teacher, center.view(1, -1), weights=weights, inplace=inplace)
        loss.backward()
        again = loss.detach(), batch_center, leaf.grad
        if logits.is_contiguous():
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-7)
    assert torch.equal(rows, leaf.grad) and (wide[1::2] == 1).all() and (wide[:, columns + 16 :] == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    x = inputs(9, 5000)
    expected = run(patch_loss, *x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = run(patch_loss, *x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_temperatures_as_floats_and_tensors(device):
    x = inputs(4, 300, device=device)
    temps = {"student_temp": 0.2, "teacher_temp": 0.05}
    exact = run(patch_loss_reference, *(t.double() for t in x), **temps)
    for given in (temps, {k: torch.tensor(v, device=device) for k, v in temps.items()}):
        for ours, truth in zip(run(patch_loss, *x, **given), exact, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)


def test_nan_reaches_the_loss(device):
    student, teacher, center, weights = inputs(6, 64, device=device)
    student[0, 5] = float("nan")
    assert patch_loss(student, teacher, center, weights=weights)[0].isnan()


def test_a_second_backward_and_logits_that_are_still_needed_are_refused():
    student, teacher, center, weights = inputs(6, 64)
    loss, _ = patch_loss(student.clone().requires_grad_(), teacher, center, weights=weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="patch_loss: second backward"):
        loss.backward()
    logits = student.clone().requires_grad_().exp()  # its backward reads its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        patch_loss(logits, teacher, center, weights=weights, inplace=True)[0].backward()
    with pytest.raises(ValueError, match=r"rows of student that do not overlap, got strides \[0, 1\]"):
        patch_loss(teacher[:1].expand(6, -1), teacher, center, weights=weights, inplace=True)
    with pytest.raises(ValueError, match="inplace needs a teacher that shares no memory with student"):
        patch_loss(student, student, center, weights=weights, inplace=True)


def test_opcheck_and_compile(device):
    student, teacher, center, weights = inputs(5, 65, device=device)
    temps = (torch.tensor(0.1, device=device), torch.tensor(0.07, device=device))
    args = (student.clone().requires_grad_(), teacher, center, weights, *temps)
    torch.library.opcheck(torch.ops.dino_kernels.patch_loss.default, args)
    torch.library.opcheck(
        torch.ops.dino_kernels.patch_loss_.default, (student.clone(), teacher, center, weights, *temps)
    )

    def doubled(student, teacher, center, weights, inplace=False):
        loss, batch_center = patch_loss(2 * student, teacher, center, weights=weights, inplace=inplace)
        return 3 * loss, batch_center

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    expected = run(doubled, student, teacher, center, weights)
    for inplace in (False, True):
        actual = run(compiled, student, teacher, center, weights, inplace=inplace)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student": torch.zeros(4)}, r"student must have shape \[M, K\].*got shape \[4\]"),
        ({"student": torch.zeros(4, 8, dtype=torch.float64)}, "dtype float32, float16 or bfloat16.*float64"),
        ({"student": torch.zeros(8, 4).T}, r"adjacent columns \(stride 1\)"),
        ({"student": torch.zeros(4, 0)}, "K >= 1"),
        ({"teacher": torch.zeros(5, 8)}, r"teacher must have shape .* that of student.*\[5, 8\].*\[4, 8\]"),
        ({"teacher": torch.zeros(4, 9)}, "teacher must have shape"),
        ({"center": torch.zeros(9)}, r"center must have shape \[8\] or \[1, 8\]"),
        ({"center": torch.zeros(2, 8)}, "center must have shape"),
        ({"weights": torch.zeros(5)}, r"weights must have shape \[4\], dtype float32.*got \[5\]"),
        ({"weights": torch.zeros(4, 1)}, "weights must have shape"),
        ({"weights": torch.zeros(4, dtype=torch.float64)}, "weights must .*float64"),
        ({"weights": torch.zeros(8)[::2]}, "be contiguous, got .*strides"),
        ({"weights": torch.zeros(4, device="meta")}, "one device, got student on cpu.*weights on meta"),
        ({"student_temp": 0.0}, "student_temp must be > 0, got 0.0"),
        ({"teacher_temp": torch.ones(2)}, "teacher_temp must be a float or a 0-d tensor"),
    ],
)
def test_bad_input(change, message):
    x = {"student": torch.zeros(4, 8), "teacher": torch.zeros(4, 8), "center": torch.zeros(8), "weights": torch.ones(4)}
    patch_loss(**x)
    with pytest.raises(ValueError, match=message):
        patch_loss(**{**x, **change})
