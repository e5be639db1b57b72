import math

import pytest
import test_adamw_ema
import torch
from checks import DTYPES, assert_as_accurate, use_backend
from test_adamw_ema import SIZES, clone

from dino_kernels import sgd_ema_step_, sgd_ema_step_reference_
from dino_kernels.triton import flat_step

HYPER = {"lr": 2.0, "weight_decay": 0.1, "momentum": 0.9, "clip_norm": 3.0}
BUFFERS = ("student", "momentum_buffer", "teacher")
OPTIMIZERS = ["sgd", "lars", "larc"]


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    return use_backend(monkeypatch, "sgd_ema", request.param, ["step"])


def state(optimizer="lars", device="cpu", sizes=SIZES, **options):
    """Arguments of a step: random weights, every second segment decayed. SGD adapts no segment, LARS those that are
    decayed, LARC all."""
    x = test_adamw_ema.state(device, sizes, **options)
    x["momentum_buffer"] = x.pop("exp_avg")
    del x["exp_avg_sq"], x["steps"]
    all_or_none = torch.full_like(x["decayed"], optimizer == "larc")
    return x | {"adapted": x["decayed"].clone() if optimizer == "lars" else all_or_none, "larc": optimizer == "larc"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SIZES, [4096, 16, 8192 + 32]], ids=["odd", "aligned"])
@pytest.mark.parametrize("clip_norm", [3.0, None])
def test_against_float64(device, optimizer, grad_dtype, sizes, clip_norm):
    ours = state(optimizer, device, sizes, frozen=(1,), grad_dtype=grad_dtype)
    eager, exact = clone(ours), clone(ours, torch.float64)
    for step in range(3):
        hyper = HYPER | {"lr": 0.3 * (step + 1), "momentum": 0.9 + 0.03 * step, "clip_norm": clip_norm}
        sgd_ema_step_(**ours, **hyper)
        sgd_ema_step_reference_(**eager, **hyper)
        sgd_ema_step_reference_(**exact, **hyper)
    for name in BUFFERS:
        assert_as_accurate(ours[name], eager[name], exact[name], floor=3e-7)
    assert ours["nonfinite"] == 0
    # The copies round the new weights; Triton's interpreter cuts bfloat16 off.
    torch.testing.assert_close(ours["student_16"].float(), ours["student"], rtol=2**-7, atol=1e-30)
    torch.testing.assert_close(ours["teacher_16"], ours["teacher"].half(), rtol=0, atol=0)


class Plain:
    """Loops over separate float64 tensors: torch.optim.SGD for the momentum, of gradients that LARS or LARC changed."""

    def __init__(self, optimizer, student, teacher, decayed, adapted):
        self.name, self.decayed, self.adapted, self.teacher = optimizer, decayed, adapted, teacher
        self.parameters = [p.clone().requires_grad_() for p in student]
        self.sgd = torch.optim.SGD([{"params": [p]} for p in self.parameters], lr=0.0, momentum=0.9)

    @torch.no_grad()
    def step(self, grads, lr, weight_decay, momentum, clip_norm):
        for i, (p, g) in enumerate(zip(self.parameters, grads, strict=True)):
            group, decay = self.sgd.param_groups[i], weight_decay if self.decayed[i] else 0.0
            group |= {"lr": lr, "weight_decay": decay if self.name == "sgd" else 0.0}
            p.grad = None if g is None else g * min(1, clip_norm / (g.norm() + 1e-6))
            if g is None or self.name == "sgd":
                continue
            scale = 1.0
            if self.adapted[i]:
                by_parts = p.grad.norm() + decay * p.norm() + 1e-8
                scale = 0.001 * p.norm() / ((p.grad + decay * p).norm() if self.name == "lars" else by_parts)
            p.grad = (p.grad + decay * p) * scale
        self.sgd.step()
        for t, p in zip(self.teacher, self.parameters, strict=True):
            t.copy_(momentum * t + (1 - momentum) * p)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_against_torchs_sgd_and_plain_loops(device, optimizer):
    """On schedules; the last tensor is frozen for two steps."""
    sizes = [50, 300, 7]
    x = state(optimizer, device, sizes)
    x["momentum_buffer"].zero_()
    students, teachers = ([p.clone() for p in x[name].double().split(sizes)] for name in ("student", "teacher"))
    plain = Plain(optimizer, students, teachers, x["decayed"], x["adapted"])
    for step in range(5):
        x["grad"].copy_(torch.randn(sum(sizes), generator=torch.Generator().manual_seed(step)))
        x["frozen"][2] = step < 2
        grads = list(x["grad"].double().split(sizes))
        if step < 2:
            grads[2], x["grad"][-7:] = None, float("nan")  # whatever is there is ignored
        hyper = {"lr": 0.05 * (step + 1), "weight_decay": 0.1 + 0.05 * step, "momentum": 0.9 + 0.02 * step}
        if optimizer != "sgd":
            hyper["lr"] *= 100
        plain.step(grads, **hyper, clip_norm=3.0)
        sgd_ema_step_(**x, **hyper, clip_norm=3.0)
        for name, expected in (("student", plain.parameters), ("teacher", teachers)):
            expected = torch.cat([p.detach() for p in expected])
            assert (x[name].double() - expected).norm() <= 1e-6 * expected.norm(), (name, step)


def test_what_is_not_adapted_where_a_norm_is_zero(device):
    """LARS and LARC leave the gradient of zero weights as it is. Without a gradient LARS decays, LARC does nothing."""
    for optimizer in ("lars", "larc"):
        x = state(optimizer, device, [16, 32])
        x["decayed"][:] = x["adapted"][:] = True
        x["student"][:16] = x["grad"][16:] = x["momentum_buffer"][:] = 0
        before = clone(x)
        sgd_ema_step_(**x, lr=2.0, weight_decay=0.1, momentum=0.9)
        torch.testing.assert_close(x["student"][:16], -2 * x["grad"][:16])
        kept = 1 - 2 * 0.001 if optimizer == "lars" else 1
        torch.testing.assert_close(x["student"][16:], kept * before["student"][16:])


@pytest.mark.parametrize("sizes, shape", [([64, 48, 1536], (37, 40)), ([64, 256, 8192], (256, 32))], ids=["odd", "fit"])
@pytest.mark.parametrize("frozen", [(), (1, 2)])
def test_rows_of_a_weight_normed_layer(device, sizes, shape, frozen):
    """In segments that are padded, and in such that a GPU's update writes the rows of too."""
    x = state("lars", device, sizes, frozen=frozen)
    plain, end = clone(x), sizes[0] + sizes[1]
    rows = tuple(torch.full(shape, 7.0, device=device) for _ in range(2))
    sgd_ema_step_(**x, **HYPER, rows=rows, cleared=2)
    sgd_ema_step_(**plain, **HYPER, cleared=2)
    for name in (*BUFFERS, "grad"):
        used = end + math.prod(shape)
        torch.testing.assert_close(x[name][:used], plain[name][:used], rtol=1e-6, atol=1e-6)
    assert torch.equal(x["student_16"][:end], plain["student_16"][:end])
    for out, net in zip(rows, ("student", "teacher"), strict=True):
        v, g = x[net][end:].double()[: math.prod(shape)].view(shape), x[net][sizes[0] :].double()[: shape[0], None]
        torch.testing.assert_close(out.double(), g * v / v.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cleared", [3, len(SIZES)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_norm_that_is_not_finite_changes_nothing_but_the_flag(device, bad, cleared):
    x = state(device=device)
    x["grad"][-1] = bad  # the square of 1e30 is infinite in float32
    before = clone(x)
    sgd_ema_step_(**x, **HYPER, cleared=cleared)
    assert x["nonfinite"] == 1 and not x["grad"][: x["offsets"][cleared]].any()
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and name not in ("nonfinite", "grad"):
            assert torch.equal(x[name], value), name
    x["grad"].zero_()
    sgd_ema_step_(**x, **HYPER)
    assert x["nonfinite"] == 0 and not torch.equal(x["student"], before["student"])


def test_momentum_one_keeps_the_teacher_and_frozen_weights_still_reach_it(device):
    x = state(device=device, frozen=range(len(SIZES)))
    before = clone(x)
    sgd_ema_step_(**x, **(HYPER | {"momentum": 1.0}))
    assert torch.equal(x["teacher"], before["teacher"]) and torch.equal(x["student"], before["student"])
    sgd_ema_step_(**x, **(HYPER | {"momentum": 0.0}))
    assert torch.equal(x["teacher"], before["student"])
    assert torch.equal(x["momentum_buffer"], before["momentum_buffer"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_settings_as_tensors_and_without_copies(device, optimizer):
    x = state(optimizer, device) | {"student_16": None, "teacher_16": None}
    given = {"lr": 0.5, "weight_decay": 0.1, "momentum": 0.996}
    as_tensors = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in given.items()}
    first, second = clone(x), clone(x)
    sgd_ema_step_(**first, **given)
    sgd_ema_step_(**second, **as_tensors)
    for name in BUFFERS:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow_interpreted
def test_a_segment_of_more_blocks_than_are_summed_at_once(device, monkeypatch):
    block = 512  # not less than two elements a thread: of those that share one, some may read what another wrote
    monkeypatch.setattr(flat_step, "_BLOCK", block)
    flat_step.table.cache_clear()
    ours = state("lars", device, [3, block * 1030 + 5, 2])
    ours["adapted"][:] = True
    ours["grad"][block * 1030 :] *= 1000  # what the last blocks hold decides how much is clipped
    eager = clone(ours)
    sgd_ema_step_(**ours, **HYPER)
    sgd_ema_step_reference_(**eager, **HYPER)
    torch.testing.assert_close(ours["momentum_buffer"], eager["momentum_buffer"], rtol=1e-5, atol=1e-7)
    flat_step.table.cache_clear()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_repeats_bitwise(device, optimizer):
    first = state(optimizer, device)
    second = clone(first)
    for x in (first, second):
        sgd_ema_step_(**x, **HYPER)
    for name, value in first.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, second[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    expected, actual = (state(sizes=[200_000, 70_001, 3]) for _ in range(2))
    sgd_ema_step_(**expected, **HYPER)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        sgd_ema_step_(**actual, **HYPER)
    finally:
        torch.set_num_threads(before)
    for name in (*BUFFERS, "student_16", "teacher_16"):
        assert torch.equal(actual[name], expected[name])


def test_opcheck_and_compile(device):
    x = state("lars", device, [5, 16])
    args = [x[name] for name in ("student", "grad", "momentum_buffer", "teacher", "student_16", "teacher_16")]
    args += [torch.empty(2, 4, device=device), torch.empty(2, 4, device=device)]  # rows: segments of 5 and 16 hold them
    args += [x[name] for name in ("offsets", "decayed", "adapted", "frozen", "nonfinite")]
    settings = [torch.tensor(value, device=device) for value in (0.01, 0.1, 0.9)]
    op = torch.ops.dino_kernels.sgd_ema_step_.default
    torch.library.opcheck(op, (*args, *settings, 3.0, 0.9, False, 0.001, 1e-8, 1))
    eager, compiled = state("larc", device, [5, 16]), state("larc", device, [5, 16])
    sgd_ema_step_(**eager, **HYPER)
    torch.compile(sgd_ema_step_, fullgraph=True, backend="aot_eager")(**compiled, **HYPER)
    assert torch.equal(eager["student"], compiled["student"]) and torch.equal(eager["teacher"], compiled["teacher"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"momentum_buffer": torch.zeros(9).half()}, "momentum_buffer must be contiguous.*dtype float32, got.*float16"),
        ({"momentum_buffer": torch.zeros(18)[::2]}, r"momentum_buffer must be contiguous.*strides \[2\]"),
        ({"adapted": torch.zeros(2)}, r"adapted must have shape \[2\], dtype bool"),
        ({"decayed": torch.zeros(3, dtype=torch.bool)}, r"decayed must have shape \[2\], dtype bool.*got \[3\]"),
        ({"momentum_sgd": 1.0}, r"momentum_sgd must be in \[0, 1\), eta > 0 and eps >= 0, got 1.0, 0.001 and 1e-08"),
        ({"eta": 0.0}, "eta > 0"),
        ({"eps": -1.0}, "eps >= 0"),
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0 or None, got 0.0"),
        ({"cleared": 3}, "cleared must be from 0 to 2 segments, got 3"),
        ({"rows": (torch.zeros(4, 1), torch.zeros(3, 1))}, "rows must be two contiguous tensors"),
    ],
)
def test_bad_input(change, message):
    x = state(sizes=[4, 5]) | HYPER
    sgd_ema_step_(**x)
    with pytest.raises(ValueError, match=message):
        sgd_ema_step_(**{**x, **change})
