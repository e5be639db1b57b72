import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import dino_head_loss, dino_head_loss_reference, dino_loss


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    use_backend(monkeypatch, "dino_loss", request.param, ["forward", "scale"])
    return use_backend(monkeypatch, "dino_head_loss", request.param, ["forward"])


def inputs(batch, views, channels, outputs, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(batch * 1000 + outputs)
    sizes = (views * batch, 2 * batch, outputs, outputs)
    rows = [F.normalize(torch.randn(n, channels, generator=g), dim=-1).to(device, dtype) for n in sizes]
    return *rows, (torch.randn(outputs, generator=g) * 0.02).to(device)


def run(op, student_z, teacher_z, weight, weight_teacher, center, upstream=1.0, **options):
    student_z, weight = (x.detach().clone().requires_grad_() for x in (student_z, weight))
    loss, batch_center = op(student_z, teacher_z, weight, weight_teacher, center, **options)
    (loss * upstream).backward()
    return loss.detach(), batch_center, student_z.grad, weight.grad


def skip_float32_on_a_gpu(dtype, device):
    if dtype == torch.float32 and device == "cuda":
        pytest.skip("float32 on a GPU needs store_logits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, views, channels, outputs",
    [
        *[(2, 10, 256, 1024), (2, 2, 64, 65), (3, 3, 37, 199), (1, 5, 16, 507), (7, 4, 100, 33)],
        pytest.param(40, 2, 8, 1500, marks=pytest.mark.slow),
    ],
)
def test_against_float64(device, dtype, batch, views, channels, outputs):
    skip_float32_on_a_gpu(dtype, device)
    x = inputs(batch, views, channels, outputs, dtype, device)
    actual = run(dino_head_loss, *x)
    eager = run(dino_head_loss_reference, *x)
    exact = run(dino_head_loss_reference, *(t.double() for t in x))
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert actual[2].dtype == actual[3].dtype == dtype
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert ours.shape == truth.shape
        # Triton's interpreter cuts bfloat16 off where hardware rounds.
        assert_as_accurate(ours, theirs, truth, floor=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_storing_the_logits_changes_no_more_than_rounding(device, dtype):
    x = inputs(3, 4, 64, 300, dtype, device)
    eager = run(dino_head_loss_reference, *x)
    exact = run(dino_head_loss_reference, *(t.double() for t in x))
    for ours, theirs, truth in zip(run(dino_head_loss, *x, store_logits=True), eager, exact, strict=True):
        assert_as_accurate(ours, theirs, truth, floor=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_gradients_through_weight_norm_are_exact():
    """W_k = g_k v_k / |v_k| as torch forms it: dg and dv in float32 against float64."""
    student_z, teacher_z, weight, weight_teacher, center = inputs(2, 4, 32, 129)
    v, g = weight * torch.rand(129, 1).add(0.5), torch.rand(129, 1).add(0.5)

    def grads(op, *tensors):
        v, g, *others = tensors
        v, g = (x.detach().requires_grad_() for x in (v, g))
        loss, _ = op(others[0], others[1], torch._weight_norm(v, g, 0), *others[2:])
        return torch.autograd.grad(loss, (v, g))

    tensors = (v, g, student_z, teacher_z, weight_teacher, center)
    exact = grads(dino_head_loss_reference, *(x.double() for x in tensors))
    eager = grads(dino_head_loss_reference, *tensors)
    for ours, theirs, truth in zip(grads(dino_head_loss, *tensors), eager, exact, strict=True):
        assert_as_accurate(ours, theirs, truth, floor=1e-6)


def test_gradients_of_all_outputs_cancel_and_the_center_is_the_mean_of_the_logits(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    student_z, teacher_z, weight, weight_teacher, center = inputs(4, 3, 32, 200, dtype, device)
    _, batch_center, grad_z, _ = run(dino_head_loss, student_z, teacher_z, weight, weight_teacher, center)
    logits = teacher_z.double() @ weight_teacher.double().T
    torch.testing.assert_close(
        batch_center.double(), logits.mean(dim=0), rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-4
    )
    # With all rows of W the same every logit of a row is the same, whatever z: no gradient.
    same = weight[:1].expand(200, -1).contiguous()
    _, _, none, _ = run(dino_head_loss, student_z, teacher_z, same, weight_teacher, center)
    assert none.abs().max() < 1e-3 * grad_z.abs().max()


def test_temperatures_and_upstream_gradient(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    x = inputs(2, 3, 32, 300, dtype, device)
    temps = {"student_temp": 0.2, "teacher_temp": 0.07}
    exact = run(dino_head_loss_reference, *(t.double() for t in x), upstream=-1.7, **temps)
    as_tensors = {k: torch.tensor(v, device=device) for k, v in temps.items()}
    for given in (temps, as_tensors):
        for ours, truth in zip(run(dino_head_loss, *x, upstream=-1.7, **given), exact, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-3
            torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


def test_repeats_bitwise(device):
    x = inputs(3, 4, 64, 333, torch.bfloat16, device)
    first, second = run(dino_head_loss, *x), run(dino_head_loss, *x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    x = inputs(2, 10, 32, 5000)
    expected = run(dino_head_loss, *x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = run(dino_head_loss, *x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_unaligned_weights_are_read_where_they_are():
    student_z, teacher_z, weight, weight_teacher, center = inputs(2, 3, 16, 100)
    expected = run(dino_head_loss, student_z, teacher_z, weight, weight_teacher, center)
    flat = torch.empty(100 * 16 + 1)
    shifted = flat[1:].view(100, 16).copy_(weight_teacher)
    actual = run(dino_head_loss, student_z, teacher_z, weight, shifted, center)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_frozen_last_layer_gets_no_gradient_and_the_rows_the_same(device):
    x = inputs(2, 4, 64, 129, torch.float16, device)
    expected = run(dino_head_loss, *x)
    student_z = x[0].clone().requires_grad_()
    loss, _ = dino_head_loss(student_z, *x[1:])
    assert not len(loss.grad_fn.grads[1])  # not even computed
    loss.backward()
    assert torch.equal(student_z.grad, expected[2])
    with torch.no_grad():
        assert torch.equal(dino_head_loss(*x)[0], expected[0])


def test_agrees_with_dino_loss_on_its_logits_and_refuses_a_second_backward():
    student_z, teacher_z, weight, weight_teacher, center = inputs(2, 5, 64, 500)
    loss, batch_center = dino_head_loss(student_z, teacher_z, weight.requires_grad_(), weight_teacher, center)
    expected, expected_center = dino_loss(student_z @ weight.T, teacher_z @ weight_teacher.T, center)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(batch_center, expected_center, rtol=1e-5, atol=1e-7)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_nan_reaches_the_loss(device):
    x = inputs(2, 3, 16, 64, torch.float16, device)
    x[0][1, 5] = float("nan")
    assert dino_head_loss(*x)[0].isnan()


def test_opcheck_and_compile(device):
    x = inputs(2, 4, 16, 65, torch.float16, device)
    temps = (torch.tensor(0.1, device=device), torch.tensor(0.04, device=device))
    for weight_grad in (False, True):
        args = (x[0].clone().requires_grad_(), x[1], x[2].clone().requires_grad_(weight_grad), *x[3:], *temps)
        torch.library.opcheck(torch.ops.dino_kernels.dino_head_loss.default, (*args, weight_grad))

    def doubled(student_z, teacher_z, weight, weight_teacher, center, **options):
        loss, batch_center = dino_head_loss(student_z, teacher_z, weight, weight_teacher, center, **options)
        return 3 * loss, batch_center

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for options in ({}, {"store_logits": True}):
        expected = run(doubled, *x, **options)
        for ours, truth in zip(run(compiled, *x, **options), expected, strict=True):
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student_z": torch.zeros(7, 4)}, r"student_z must have shape \[V\*B, D\] with V >= 2, B = 2.*got \[7, 4\]"),
        ({"student_z": torch.zeros(8, 5)}, r"D = 4 as in weight_student, got \[8, 5\]"),
        ({"student_z": torch.zeros(4, 8).T}, "student_z must be a contiguous matrix"),
        ({"teacher_z": torch.zeros(3, 4)}, r"teacher_z must have shape \[2\*B, D\]"),
        ({"teacher_z": torch.zeros(4, 4).half()}, "teacher_z must be.*of the dtype of student_z, got.*float16"),
        ({"weight_student": torch.zeros(9, 4)}, r"one shape \[K, D\] with 1 <= D <= 256, got \[9, 4\] and \[6, 4\]"),
        ({"weight_teacher": torch.zeros(6, 4).double()}, "weight_teacher must be a contiguous matrix of float32"),
        ({"center": torch.zeros(5)}, r"center must have shape \[6\] or \[1, 6\]"),
        ({"center": torch.zeros(6, device="meta")}, "on one device"),
        ({"student_temp": 0.0}, "student_temp must be > 0, got 0.0"),
        ({"teacher_temp": torch.ones(2)}, "teacher_temp must be a float or a 0-d tensor"),
    ],
)
def test_bad_input(change, message):
    x = {"student_z": torch.zeros(8, 4), "teacher_z": torch.zeros(4, 4), "center": torch.zeros(6)}
    x |= {"weight_student": torch.zeros(6, 4), "weight_teacher": torch.zeros(6, 4)}
    dino_head_loss(**x)
    with pytest.raises(ValueError, match=message):
        dino_head_loss(**{**x, **change})
