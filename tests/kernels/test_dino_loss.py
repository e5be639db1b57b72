import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import dino_loss, dino_loss_reference


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    return use_backend(monkeypatch, "dino_loss", request.param, ["forward", "scale"])


def inputs(batch, views, outputs, dtype=torch.float32, device="cpu", scale=0.3):
    g = torch.Generator().manual_seed(batch * 1000 + outputs)
    student = torch.randn(views * batch, outputs, generator=g) * scale
    teacher = torch.randn(2 * batch, outputs, generator=g) * scale
    center = torch.randn(outputs, generator=g) * 0.1
    return student.to(device, dtype), teacher.to(device, dtype), center.to(device)


def run(op, student, teacher, center, upstream=1.0, **temps):
    student = student.detach().clone().requires_grad_()
    loss, batch_center = op(student, teacher, center, **temps)
    (loss * upstream).backward()
    return loss.detach(), batch_center, student.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, views, outputs", [(2, 10, 1024), (2, 2, 65), (3, 3, 37), (2, 5, 199), (5, 4, 507), (1, 10, 4133)]
)
def test_against_float64(device, dtype, batch, views, outputs):
    x = inputs(batch, views, outputs, dtype, device)
    actual = run(dino_loss, *x)
    eager = run(dino_loss_reference, *x)
    exact = run(dino_loss_reference, *(t.double() for t in x))
    assert actual[0].dtype == actual[1].dtype == torch.float32 and actual[2].dtype == dtype
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert ours.shape == truth.shape
        assert_as_accurate(ours, theirs, truth, floor=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradient_scales_the_stored_one(device, dtype):
    x = inputs(2, 4, 300, dtype, device)
    once = run(dino_loss, *x)[2]
    scaled = run(dino_loss, *x, upstream=-1.7)[2]
    # One rounding to the dtype apart: Triton's interpreter cuts bfloat16 off where everything else rounds.
    torch.testing.assert_close(scaled.float(), once.float() * -1.7, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_scaling_of_more_blocks_than_programs(device):
    wide = torch.randn(270, 5100, generator=torch.Generator().manual_seed(0)).to(device)
    expected = wide.clone()
    expected[:, :5000] *= -1.7
    for factor, truth in ((1.0, wide.clone()), (-1.7, expected)):
        torch.ops.dino_kernels.dino_loss_scale_(wide[:, :5000], torch.tensor(factor, device=device))
        assert torch.equal(wide, truth)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("outputs", [128, 262144])
def test_fewest_and_most_outputs(device, outputs):
    x = inputs(1, 3, outputs, device=device)
    exact = run(dino_loss_reference, *(t.double() for t in x))
    for ours, truth in zip(run(dino_loss, *x), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-8)


def assert_same(ours, truth, request):
    """Bitwise on the CPU; on a GPU rows of another stride may be summed in another order."""
    if request.node.callspec.params["device"] == "cpu":
        assert torch.equal(ours, truth)
    rounding = max(1e-5, torch.finfo(ours.dtype).eps)
    torch.testing.assert_close(ours, truth, rtol=rounding, atol=1e-6 * truth.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [333, 336])
def test_in_place_gives_the_same_in_the_memory_of_the_logits(device, request, dtype, columns):
    """Rows that begin at multiples of 16 elements, and rows that do not."""
    student, teacher, center = inputs(3, 4, columns, dtype, device)
    expected = run(dino_loss, student, teacher, center, upstream=-1.7)
    for stride in (columns, 400):
        wide = torch.ones(16 + 12 * stride, dtype=dtype, device=device)[16:].view(12, stride)
        wide[:, :columns] = student
        logits = wide[:, :columns].detach().requires_grad_()
        loss, batch_center = dino_loss(logits, teacher, center, inplace=True)
        (loss * -1.7).backward()
        for ours, truth in zip((loss.detach(), batch_center, logits.grad), expected, strict=True):
            if stride == columns:
                assert torch.equal(ours, truth)
            assert_same(ours, truth, request)
        assert torch.equal(wide[:, :columns], logits.grad) and (wide[:, columns:] == 1).all()


def test_in_place_is_refused_where_the_logits_are_still_needed(device):
    student, teacher, center = inputs(2, 3, 64, device=device)
    logits = student.requires_grad_().exp()  # its backward reads its result
    loss, _ = dino_loss(logits, teacher, center, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match=r"rows of student that do not overlap, got strides \[0, 1\]"):
        dino_loss(teacher[:1].expand(6, -1), teacher, center, inplace=True)


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
def test_flat_and_sharp_logits(device, scale):
    """Denormal, underflowing and one-hot probabilities."""
    x = inputs(2, 4, 1500, device=device, scale=scale)
    exact = run(dino_loss_reference, *(t.double() for t in x))
    for ours, truth in zip(run(dino_loss, *x), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6 * max(1, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_from_certain_to_tiny(device, dtype):
    """Probabilities of 2 (both views certain) down to 2^-33, where the student's are 0 and leave the targets alone."""
    teacher = torch.zeros(4, 65, device=device)
    teacher[0::2] = -0.02 * torch.tensor(2.0).log() * torch.arange(65, device=device)  # at 0.04 half as likely each two
    teacher[1::2, 0] = 10
    student = torch.zeros(6, 65, device=device)
    student[:, 64] = 100
    x = student.to(dtype), teacher.to(dtype), torch.zeros(65, device=device)
    ours, exact = run(dino_loss, *x)[2], run(dino_loss_reference, *(t.double() for t in x))[2]
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double()[:, :64], exact[:, :64], rtol=rounding, atol=2**-39)


def test_temperatures_as_floats_and_tensors(device):
    x = inputs(2, 3, 300, device=device)
    temps = {"student_temp": 0.2, "teacher_temp": 0.07}
    exact = run(dino_loss_reference, *(t.double() for t in x), **temps)
    as_tensors = {k: torch.tensor(v, device=device) for k, v in temps.items()}
    for given in (temps, as_tensors):
        for ours, truth in zip(run(dino_loss, *x, **given), exact, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, outputs", [(3, 199), (2, 1024), (1, 4133)])
def test_a_center_for_each_teacher_view(device, dtype, batch, outputs):
    student, teacher, center = inputs(batch, 4, outputs, dtype, device)
    x = student, teacher, torch.stack([center, 0.1 - 2 * center])
    exact = run(dino_loss_reference, *(t.double() for t in x))
    for ours, theirs, truth in zip(run(dino_loss, *x), run(dino_loss_reference, *x), exact, strict=True):
        assert ours.shape == truth.shape
        assert_as_accurate(ours, theirs, truth, floor=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    strided = torch.stack([x[2], x[2]], dim=2)[:, :, 0]
    for same in (center.expand(2, -1), strided[:1]):
        expected = run(dino_loss, student, teacher, same[0].clone())
        for ours, truth in zip(run(dino_loss, student, teacher, same), expected, strict=True):
            assert torch.equal(ours, truth)
    for ours, truth in zip(run(dino_loss, student, teacher, strided), run(dino_loss, *x), strict=True):
        assert torch.equal(ours, truth)


def test_with_the_logits_of_its_own_global_views_it_is_the_loss_of_swav(device):
    """Caron et al. 2020, section 3.2: each of the two assigned views against all others."""
    student, _, center = inputs(3, 5, 300, device=device)
    centers = torch.stack([center, -center])
    loss, _, grad = run(dino_loss, student, student[:6], centers, teacher_temp=0.05)
    scores = student.double().requires_grad_()
    views = scores.view(5, 3, 300)
    codes = ((views[:2].detach() - centers[:, None]) / 0.05).softmax(dim=-1)
    parts = [
        -(codes[i] * (views[v] / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean() / 4
        for i in range(2)
        for v in range(5)
        if v != i
    ]
    truth = sum(parts) / 2
    truth.backward()
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), scores.grad, rtol=1e-5, atol=1e-8)


def test_in_place_is_refused_over_a_teacher_in_the_same_memory(device):
    student, _, center = inputs(2, 3, 64, device=device)
    for teacher in (student[:4], student[2:], student.view(-1)[10:266].view(4, 64)):
        with pytest.raises(ValueError, match="inplace needs a teacher that shares no memory with student"):
            dino_loss(student, teacher, center, inplace=True)
        dino_loss(student, teacher, center)
    memory = torch.zeros(10, 64, device=device)  # one behind the other is not the same
    memory[:6], memory[6:] = student, student[:4]
    expected = dino_loss(student, student[:4], center)[0]
    assert torch.equal(dino_loss(memory[:6], memory[6:], center, inplace=True)[0], expected)


def test_gradient_rows_sum_to_zero_and_a_perfect_student_gets_none(device):
    student, teacher, center = inputs(2, 4, 800, device=device)
    _, _, grad = run(dino_loss, student, teacher, center)
    torch.testing.assert_close(grad.sum(dim=1), torch.zeros(8, device=device), rtol=0, atol=1e-5)
    # Two equal teacher views, and a student whose tempered softmax equals the teacher's: at the minimum.
    teacher = torch.cat([teacher[:2]] * 2)
    perfect = ((teacher - center) / 0.04 * 0.1).repeat(2, 1)
    _, _, grad = run(dino_loss, perfect, teacher, center)
    assert grad.abs().max() < 1e-6


def test_loss_is_ln_k_for_a_uniform_student(device):
    _, teacher, center = inputs(2, 2, 640, device=device)
    loss, batch_center, _ = run(dino_loss, torch.zeros(6, 640, device=device), teacher, center)
    torch.testing.assert_close(loss.cpu(), torch.tensor(640.0).log())
    torch.testing.assert_close(batch_center, teacher.mean(dim=0))


def test_repeats_bitwise_and_reads_strided_rows(device, request):
    student, teacher, center = inputs(3, 4, 333, device=device)
    wide = torch.full((12, 400), float("nan"), device=device)
    wide[:, 20:353] = student
    rows = torch.full((12, 333), float("nan"), device=device)
    rows[::2] = teacher
    first = run(dino_loss, student, teacher, center)
    again = run(dino_loss, student, teacher, center)
    assert all(torch.equal(ours, truth) for ours, truth in zip(again, first, strict=True))
    loss, batch_center = dino_loss(wide[:, 20:353], rows[::2], center.view(1, -1))
    assert_same(loss, first[0], request)
    assert_same(batch_center, first[1], request)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    x = inputs(2, 10, 5000)
    expected = run(dino_loss, *x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = run(dino_loss, *x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual[1], expected[1]) and torch.equal(actual[2], expected[2])
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-7, atol=0)


def test_keeps_one_tensor_for_backward_and_hands_it_over():
    student, teacher, center = inputs(2, 3, 64)
    student = student.requires_grad_()
    loss, _ = dino_loss(student, teacher, center)
    assert loss.grad_fn.grad.shape == student.shape and not loss.grad_fn.saved_tensors
    kept = loss.grad_fn.grad.data_ptr()
    loss.backward(retain_graph=True)
    assert student.grad.data_ptr() == kept
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_default_device_elsewhere_changes_nothing():
    x = inputs(2, 3, 64)
    expected = run(dino_loss, *x)
    with torch.device("meta"):
        actual = run(dino_loss, *x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_nan_reaches_the_loss(device):
    student, teacher, center = inputs(2, 3, 64, device=device)
    student[1, 5] = float("nan")
    assert dino_loss(student, teacher, center)[0].isnan()


def test_opcheck_and_compile(device):
    student, teacher, center = inputs(2, 4, 65, device=device)
    temps = (torch.tensor(0.1, device=device), torch.tensor(0.04, device=device))
    args = (student.requires_grad_(), teacher, center.expand(2, -1), *temps)
    torch.library.opcheck(torch.ops.dino_kernels.dino_loss.default, args)
    torch.library.opcheck(
        torch.ops.dino_kernels.dino_loss_scale_.default,
        (student.detach().clone(), torch.tensor(2.0, device=device)),
    )
    torch.library.opcheck(
        torch.ops.dino_kernels.dino_loss_.default,
        (student.detach().clone(), teacher, torch.stack([center, center + 1]), *temps),
    )

    def doubled(student, teacher, center, inplace=False):
        loss, batch_center = dino_loss(2 * student, teacher, center, inplace=inplace)
        return 3 * loss, batch_center

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    expected = run(doubled, student, teacher, center)
    for inplace in (False, True):
        for ours, truth in zip(run(compiled, student, teacher, center, inplace=inplace), expected, strict=True):
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"student": torch.zeros(7, 8)},
            r"student must have shape \[V\*B, K\] with V >= 2, B = 2 and K = 8.*\[7, 8\]",
        ),
        ({"student": torch.zeros(2, 8)}, "student must have shape"),
        ({"student": torch.zeros(8, 9)}, "student must have shape"),
        ({"student": torch.zeros(8, 8, dtype=torch.float64)}, "dtype float32, float16 or bfloat16.*float64"),
        ({"student": torch.zeros(8, 8).T}, r"adjacent columns \(stride 1\)"),
        ({"teacher": torch.zeros(3, 8)}, r"teacher must have shape \[2\*B, K\]"),
        ({"teacher": torch.zeros(8)}, "teacher must have shape"),
        ({"center": torch.zeros(9)}, r"center must have shape \[8\] or \[1, 8\] or \[2, 8\]"),
        ({"center": torch.zeros(4, 8)}, "center must have shape"),
        ({"center": torch.zeros(8, dtype=torch.float16)}, "dtype float32"),
        ({"center": torch.zeros(8, device="meta")}, "one device"),
        ({"student_temp": 0.0}, "student_temp must be > 0, got 0.0"),
        ({"teacher_temp": float("nan")}, "teacher_temp must be > 0"),
        ({"teacher_temp": torch.ones(2)}, "teacher_temp must be a float or a 0-d tensor"),
        ({"student_temp": torch.ones((), requires_grad=True)}, "without gradient"),
    ],
)
def test_bad_input(change, message):
    x = {"student": torch.zeros(8, 8), "teacher": torch.zeros(4, 8), "center": torch.zeros(8)}
    dino_loss(**x)
    with pytest.raises(ValueError, match=message):
        dino_loss(**{**x, **change})
