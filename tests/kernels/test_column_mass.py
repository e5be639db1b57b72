import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import (
    column_mass,
    column_mass_reference,
    dino_loss,
    dino_loss_reference,
    sinkhorn_center,
    sinkhorn_center_reference,
)

SHAPES = [(8, 1024), (37, 199), (1, 7), (5, 1), (130, 65), pytest.param(300, 1500, marks=pytest.mark.slow), (3, 9001)]


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    return use_backend(monkeypatch, "column_mass", request.param, ["forward"])


def inputs(rows, outputs, dtype=torch.float32, device="cpu", scale=0.3):
    g = torch.Generator().manual_seed(rows * 1000 + outputs)
    logits = torch.randn(rows, outputs, generator=g) * scale
    return logits.to(device, dtype), (torch.randn(outputs, generator=g) * scale).to(device)


def assignments(logits, temp, iterations=3):
    """q [R, K] by the iterations of Caron et al. 2020, section 3.1: rows and columns are divided in turns."""
    q = (logits.double() / temp).exp().t()
    q = q / q.sum()
    outputs, rows = q.shape
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / outputs
        q = q / q.sum(dim=0, keepdim=True) / rows
    return (q * rows).t()


def softmax(logits, center, temp):
    return ((logits.double() - center.double()) / temp).softmax(dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, outputs", SHAPES)
def test_against_float64(device, dtype, rows, outputs):
    logits, center = inputs(rows, outputs, dtype, device)
    for given in (None, center):
        wide = None if given is None else given.double()
        exact = column_mass_reference(logits.double(), wide, temp=0.05)
        eager = column_mass_reference(logits, given, temp=0.05)
        actual = column_mass(logits, given, temp=0.05)
        assert actual.dtype == torch.float32 and actual.shape == exact.shape
        assert torch.equal(actual[0].double(), exact[0])
        assert_as_accurate(actual[1], eager[1], exact[1], floor=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temp, scale", [(0.05, 0.06), (0.02, 0.06), (0.04, 2.0)])
def test_the_center_against_float64(device, dtype, temp, scale):
    """Cosines at SwAV's temperature and below it, and logits that overflow the iterations in float32."""
    logits, _ = inputs(40, 700, dtype, device, scale)
    exact = sinkhorn_center_reference(logits.double(), temp=temp)
    center = sinkhorn_center(logits, temp=temp)
    assert center.dtype == torch.float32 and center.shape == (700,)
    torch.testing.assert_close(softmax(logits, center, temp), softmax(logits, exact, temp), rtol=0, atol=3e-6)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_a_softmax_with_the_center_is_the_iterations(device, iterations):
    logits, _ = inputs(12, 37, device=device)
    truth = assignments(logits, 0.05, iterations)
    exact = sinkhorn_center_reference(logits.double(), temp=0.05, iterations=iterations)
    torch.testing.assert_close(softmax(logits, exact, 0.05), truth, rtol=0, atol=1e-14)
    center = sinkhorn_center(logits, temp=0.05, iterations=iterations)
    torch.testing.assert_close(softmax(logits, center, 0.05), truth, rtol=0, atol=2e-6)


@pytest.mark.slow_interpreted
def test_of_many_iterations_every_output_gets_the_same_mass(device):
    logits, _ = inputs(24, 6, device=device)
    mass = softmax(logits, sinkhorn_center(logits, temp=0.1, iterations=30), 0.1).sum(dim=0)
    torch.testing.assert_close(mass, torch.full_like(mass, 24 / 6), rtol=1e-4, atol=0)


def test_what_changes_the_assignments_and_what_does_not(device):
    logits, column = inputs(12, 37, device=device)
    row, temp = torch.linspace(0, 1, 12, device=device)[:, None], 0.05

    def q(logits):
        return softmax(logits, sinkhorn_center(logits, temp=temp), temp)

    truth = q(logits)
    torch.testing.assert_close(q(logits + 3), truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(q(logits + column), truth, rtol=0, atol=1e-5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(q(logits[order]), truth[order], rtol=0, atol=1e-6)
    # A constant of a row weighs it in the first division of the columns: to subtract each row's maximum is no remedy
    # for overflow.
    assert (q(logits + row) - truth).abs().max() > 1e-2


def test_processes_together_are_as_one(device):
    logits, _ = inputs(30, 199, device=device)
    temp, parts = 0.05, logits.split([3, 17, 10])

    def together(sweeps):
        top = sweeps[:, 0].amax(dim=0)
        return torch.stack([top, (sweeps[:, 1] * ((sweeps[:, 0] - top) / temp).exp()).sum(dim=0)])

    counted = torch.zeros(3, dtype=torch.bool, device=device)  # a process without rows that count
    center = None
    for _ in range(3):
        sweeps = [column_mass(part, center, temp=temp) for part in parts]
        sweeps.append(column_mass(parts[0], center, temp=temp, counted=counted))
        top, mass = together(torch.stack(sweeps))
        center = (0 if center is None else center) + top + temp * mass.log()
    expected = sinkhorn_center(logits, temp=temp)
    torch.testing.assert_close(center, expected, rtol=0, atol=1e-6)

    def combine(sweep):
        return torch.stack([sweep[0], 5 * sweep[1]])  # five processes with these rows

    more = sinkhorn_center(logits, temp=temp, combine=combine)
    torch.testing.assert_close(softmax(logits, more, temp), softmax(logits, expected, temp), rtol=0, atol=1e-6)


def test_great_logits_and_outputs_that_no_row_prefers_are_finite(device):
    logits, _ = inputs(6, 300, torch.float16, device, scale=20)
    logits = logits.clamp(-60, 60)
    logits[:, 7], logits[0, 8] = -60, 60
    center = sinkhorn_center(logits, temp=0.05)
    assert center.isfinite().all()
    torch.testing.assert_close(
        softmax(logits, center, 0.05).sum(dim=1), torch.ones(6, dtype=torch.float64, device=device)
    )
    far = torch.zeros(300, device=device)
    far[7] = 1000.0
    mass = column_mass(logits, far, temp=0.05)[1]
    assert mass[7] < 1e-30 and mass.sum() > 5.99


@pytest.mark.parametrize("outputs", [199, pytest.param(9001, marks=pytest.mark.slow)])
def test_rows_that_do_not_count_are_not_read(device, outputs):
    logits, center = inputs(21, outputs, device=device)
    counted = torch.arange(21, device=device) % 3 == 1
    holes = logits.masked_fill(~counted[:, None], float("nan"))
    for given in (None, center):
        exact = column_mass_reference(logits.double()[counted], given, temp=0.05)
        torch.testing.assert_close(
            column_mass(holes, given, temp=0.05, counted=counted).double(), exact, rtol=1e-5, atol=1e-7
        )
        nothing = column_mass(holes, given, temp=0.05, counted=torch.zeros_like(counted))
        assert (nothing[0] == (float("-inf") if given is None else 0)).all() and not nothing[1].any()
        everything = column_mass(logits, given, temp=0.05, counted=torch.ones_like(counted))
        assert torch.equal(everything, column_mass(logits, given, temp=0.05))
    expected = sinkhorn_center(logits[counted], temp=0.05)
    torch.testing.assert_close(sinkhorn_center(holes, temp=0.05, counted=counted), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outputs", [333, pytest.param(9001, marks=pytest.mark.slow)])
def test_repeats_bitwise_and_reads_strided_rows(device, outputs):
    logits, center = inputs(13, outputs, device=device)
    wide = torch.full((26, outputs + 40), float("nan"), device=device)
    wide[::2, 20:-20] = logits
    for given in (None, center):
        first = column_mass(logits, given, temp=0.05)
        assert torch.equal(column_mass(logits, given, temp=0.05), first)
        torch.testing.assert_close(column_mass(wide[::2, 20:-20], given, temp=0.05), first, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    logits, center = inputs(70, 5000)
    expected = [column_mass(logits, given, temp=0.05) for given in (None, center)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = [column_mass(logits, given, temp=0.05) for given in (None, center)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_temperature_as_a_tensor(device):
    logits, center = inputs(9, 65, device=device)
    temp = torch.tensor(0.05, device=device)
    for given in (None, center):
        ours = column_mass(logits, given, temp=temp)
        torch.testing.assert_close(ours, column_mass(logits, given, temp=0.05), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sinkhorn_center(logits, temp=temp), sinkhorn_center(logits, temp=0.05))


def test_it_is_a_center_for_the_loss():
    logits, _ = inputs(8, 65)
    centers = torch.stack([sinkhorn_center(view, temp=0.05) for view in logits.split(4)])
    exact = torch.stack([sinkhorn_center_reference(view.double(), temp=0.05) for view in logits.split(4)])
    loss, _ = dino_loss(logits, logits, centers, teacher_temp=0.05)
    truth, _ = dino_loss_reference(logits.double(), logits.double(), exact, teacher_temp=0.05)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


def test_gives_no_gradient():
    logits, center = inputs(4, 9)
    assert not column_mass(logits.requires_grad_(), center.requires_grad_(), temp=0.05).requires_grad
    assert not sinkhorn_center(logits, temp=0.05).requires_grad


def test_opcheck_and_compile(device):
    logits, center = inputs(5, 65, device=device)
    counted = torch.arange(5, device=device) > 1
    for args in ((logits, None, None), (logits, center, counted)):
        torch.library.opcheck(torch.ops.dino_kernels.column_mass.default, (*args, torch.tensor(0.05, device=device)))
    compiled = torch.compile(lambda x: sinkhorn_center(x, temp=0.05), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), sinkhorn_center(logits, temp=0.05))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(8)}, r"logits must have shape \[R, K\].*got shape \[8\]"),
        ({"logits": torch.zeros(0, 8)}, "R >= 1 and K >= 1"),
        ({"logits": torch.zeros(4, 0)}, "R >= 1 and K >= 1"),
        ({"logits": torch.zeros(4, 8, dtype=torch.float64)}, "dtype float32, float16 or bfloat16.*float64"),
        ({"logits": torch.zeros(8, 4).T}, r"adjacent columns \(stride 1\)"),
        ({"center": torch.zeros(9)}, r"center must have shape \[8\], dtype torch.float32.*got \[9\]"),
        ({"center": torch.zeros(8, dtype=torch.float16)}, "center must have shape"),
        ({"center": torch.zeros(8, device="meta")}, "on cpu, got .* meta"),
        ({"counted": torch.ones(8, dtype=torch.bool)}, r"counted must have shape \[4\], dtype torch.bool"),
        ({"counted": torch.ones(4)}, "counted must have shape"),
        ({"temp": 0.0}, "temp must be > 0, got 0.0"),
        ({"temp": torch.ones(2)}, "temp must be a float or a 0-d tensor"),
    ],
)
def test_bad_input(change, message):
    x = {"logits": torch.zeros(4, 8), "center": torch.zeros(8), "temp": 0.05}
    column_mass(**x)
    with pytest.raises(ValueError, match=message):
        column_mass(**{**x, **change})


def test_at_least_one_iteration():
    with pytest.raises(ValueError, match="iterations must be >= 1, got 0"):
        sinkhorn_center(torch.zeros(4, 8), temp=0.05, iterations=0)
