import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import adamw_ema_step_, adamw_ema_step_reference_
from dino_kernels.triton import flat_step

SIZES = [64, 1, 507, 37, 5000, 199, 16]  # odd ones: segments begin anywhere
HYPER = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "clip_norm": 3.0}


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    return use_backend(monkeypatch, "adamw_ema", request.param, ["step"])


def state(device="cpu", sizes=SIZES, dtype=torch.float32, frozen=(), grad_dtype=torch.float32):
    """Arguments of a step: random weights, every second segment decayed, bfloat16 and float16 copies."""
    offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    g = torch.Generator().manual_seed(len(sizes))
    x = {name: torch.randn(offsets[-1], generator=g) for name in ("student", "grad", "exp_avg", "teacher")}
    x["exp_avg_sq"] = torch.rand(offsets[-1], generator=g)
    x = {name: value.to(device, dtype) for name, value in x.items()}
    x["grad"] = x["grad"].to(grad_dtype if dtype == torch.float32 else dtype)
    count = len(sizes)
    return x | {
        "offsets": offsets,
        "steps": torch.arange(count, device=device),
        "decayed": torch.arange(count, device=device) % 2 == 0,
        "frozen": torch.tensor([i in frozen for i in range(count)], device=device),
        "nonfinite": torch.full((), 7, dtype=torch.int32, device=device),
        "student_16": torch.zeros(offsets[-1], dtype=torch.bfloat16, device=device),
        "teacher_16": torch.zeros(offsets[-1], dtype=torch.float16, device=device),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [(), (2,), (1, 2)])
def test_rows_of_a_weight_normed_layer(device, dtype, frozen):
    """K = 37 rows of 40 channels in segments of 48 and 1536, which both are padded; they are the new weights'."""
    x = state(device, [64, 48, 1536], frozen=frozen)
    plain = clone(x)
    rows = tuple(torch.full((37, 40), 7.0, dtype=dtype, device=device) for _ in range(2))
    adamw_ema_step_(**x, **HYPER, rows=rows)
    adamw_ema_step_(**plain, **HYPER)
    for name in ("student", "exp_avg", "exp_avg_sq", "teacher"):
        assert torch.equal(x[name][: 112 + 37 * 40], plain[name][: 112 + 37 * 40])
    assert torch.equal(x["student_16"][:112], plain["student_16"][:112])
    for out, net in zip(rows, ("student", "teacher"), strict=True):
        v = x[net][112 : 112 + 37 * 40].double().view(37, 40)
        exact = x[net][64 : 64 + 37].double().view(-1, 1) * v / v.norm(dim=1, keepdim=True)
        # Triton's interpreter cuts bfloat16 off.
        assert_as_accurate(out, exact.to(dtype), exact, floor=1e-3 if dtype == torch.bfloat16 else 3e-7)


@pytest.mark.parametrize("frozen", [(), (1,), (1, 2)])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_rows_that_fill_whole_blocks(device, monkeypatch, frozen, grad_dtype):
    """K = 256 rows of 32 channels in segments of their sizes: on a GPU the update writes the rows too."""
    launched = []
    forward = flat_step.forward_triton
    monkeypatch.setattr(flat_step, "forward_triton", lambda *args: launched.append(1) or forward(*args))
    for first in (64, 0):  # also without a segment before them
        x = state(device, [*[first][: first > 0], 256, 8192], frozen=frozen, grad_dtype=grad_dtype)
        plain = clone(x)
        rows = tuple(torch.full((256, 32), 7.0, device=device) for _ in range(2))
        adamw_ema_step_(**x, **HYPER, rows=rows, cleared=len(x["offsets"]) - 2)
        adamw_ema_step_(**plain, **HYPER, cleared=len(x["offsets"]) - 2)
        for name in ("student", "exp_avg", "exp_avg_sq", "teacher", "grad", "steps", "nonfinite"):
            torch.testing.assert_close(x[name], plain[name], rtol=1e-6, atol=1e-7)
        assert torch.equal(x["student_16"][: first + 256], plain["student_16"][: first + 256])
        for out, net in zip(rows, ("student", "teacher"), strict=True):
            v, g = x[net][first + 256 :].double().view(256, 32), x[net][first : first + 256].double().view(-1, 1)
            torch.testing.assert_close(out.double(), g * v / v.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
        before = clone(x) | {"rows": [row.clone() for row in rows]}
        x["grad"][-1] = float("nan")
        adamw_ema_step_(**x, **HYPER, rows=rows)
        assert x["nonfinite"] == (len(x["offsets"]) - 2 not in frozen)
        if x["nonfinite"]:
            assert all(torch.equal(a, b) for a, b in zip(rows, before["rows"], strict=True))
            assert torch.equal(x["student"], before["student"]) and torch.equal(x["steps"], before["steps"])
    assert not launched


def test_rows_stay_where_a_step_is_refused(device):
    x = state(device, [8, 16, 64])
    rows = tuple(torch.empty(16, 4, device=device) for _ in range(2))
    adamw_ema_step_(**x, **HYPER, rows=rows)
    before = [row.clone() for row in rows]
    x["grad"][3] = float("inf")
    adamw_ema_step_(**x, **HYPER, rows=rows)
    assert x["nonfinite"] == 1 and all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))


def clone(x, dtype=None):
    wide = {name for name, value in x.items() if isinstance(value, torch.Tensor) and value.dtype == torch.float32}
    return {
        name: value.clone().to(dtype if dtype and (name in wide or name == "grad") else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in x.items()
    }


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [SIZES, [4096, 16, 8192 + 32], [7 * i % 13 + 1 for i in range(70)]], ids=["odd", "aligned", "many"]
)
def test_against_float64(device, grad_dtype, sizes):
    ours = state(device, sizes, frozen=(1,), grad_dtype=grad_dtype)
    eager, exact = clone(ours), clone(ours, torch.float64)
    for step in range(3):
        hyper = HYPER | {"lr": 0.01 * (step + 1), "momentum": 0.9 + 0.03 * step}
        adamw_ema_step_(**ours, **hyper)
        adamw_ema_step_reference_(**eager, **hyper)
        adamw_ema_step_reference_(**exact, **hyper)
    for name in ("student", "exp_avg", "exp_avg_sq", "teacher"):
        assert_as_accurate(ours[name], eager[name], exact[name], floor=3e-7)
    assert torch.equal(ours["steps"], exact["steps"]) and ours["nonfinite"] == 0
    # The copies round the new weights; Triton's interpreter cuts bfloat16 off.
    torch.testing.assert_close(ours["student_16"].float(), ours["student"], rtol=2**-7, atol=1e-30)
    torch.testing.assert_close(ours["teacher_16"], ours["teacher"].half(), rtol=0, atol=0)


def by_segment(count, device="cpu"):
    """A rate and one of two interleaved clip groups for each segment."""
    scale = torch.linspace(0, 1, count, device=device)
    return {"lr_scale": scale, "clip_groups": -(torch.arange(count, device=device) % 2)}


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_rates_and_clip_groups_of_segments_against_float64(device, grad_dtype):
    """The frozen segment's gradient, whatever it is, is in no group's norm; a rate of 0 changes moments alone."""
    ours = state(device, SIZES, frozen=(3,), grad_dtype=grad_dtype) | by_segment(len(SIZES), device)
    ours["grad"][ours["offsets"][3]] = float("nan")
    before, eager, exact = clone(ours), clone(ours), clone(ours, torch.float64)
    for _ in range(2):
        adamw_ema_step_(**ours, **HYPER)
        adamw_ema_step_reference_(**eager, **HYPER)
        adamw_ema_step_reference_(**exact, **HYPER)
    for name in ("student", "exp_avg", "exp_avg_sq", "teacher"):
        assert_as_accurate(ours[name], eager[name], exact[name], floor=3e-7)
    assert torch.equal(ours["student"][:64], before["student"][:64]) and ours["nonfinite"] == 0
    assert not torch.equal(ours["exp_avg"][:64], before["exp_avg"][:64])


def test_rates_of_one_and_a_group_for_each_change_nothing(device):
    plain, ours = state(device), state(device)
    count = len(SIZES)
    adamw_ema_step_(**plain, **HYPER)
    options = {"lr_scale": torch.ones(count, device=device), "clip_groups": torch.arange(count, device=device)}
    adamw_ema_step_(**ours, **HYPER, **options)
    for name in ("student", "exp_avg", "exp_avg_sq", "teacher"):
        if device == "cpu":  # elsewhere the order of the sums differs
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-6, atol=1e-7)


def test_rates_and_clip_groups_are_those_of_torch(device):
    """AdamW with a group of parameters for each rate, and clip_grad_norm_ for each clip group."""
    sizes, factors = [50, 300, 7], [0.25, 1.0, 0.5]
    x = state(device, sizes) | {"steps": torch.zeros(3, dtype=torch.int64, device=device)}
    x["exp_avg"].zero_()
    x["exp_avg_sq"].zero_()
    x |= {"lr_scale": torch.tensor(factors, device=device), "clip_groups": torch.tensor([5, 5, 2], device=device)}
    parameters = [p.clone().double().requires_grad_() for p in x["student"].split(sizes)]
    groups = [
        {"params": [p], "weight_decay": 0.1 * flag} for p, flag in zip(parameters, x["decayed"].tolist(), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        x["grad"].copy_(torch.randn(sum(sizes), generator=g))
        for p, grad, group, factor in zip(
            parameters, x["grad"].double().split(sizes), optimizer.param_groups, factors, strict=True
        ):
            p.grad, group["lr"] = grad.clone(), 0.01 * (step + 1) * factor
        for members in (parameters[:2], parameters[2:]):
            torch.nn.utils.clip_grad_norm_(members, 3.0)
        optimizer.step()
        adamw_ema_step_(**x, **(HYPER | {"lr": 0.01 * (step + 1)}))
        for p, ours in zip(parameters, x["student"].split(sizes), strict=True):
            torch.testing.assert_close(ours.double(), p.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cleared", [3, len(SIZES)])
def test_clears_the_gradient_of_the_first_segments_also_of_a_refused_step(device, cleared):
    for bad in (0.0, float("nan")):
        x = state(device, frozen=(1,))
        x["grad"][-1] += bad
        before, end = x["grad"].clone(), x["offsets"][cleared]
        plain = clone(x)
        adamw_ema_step_(**x, **HYPER, cleared=cleared)
        adamw_ema_step_(**plain, **HYPER)
        assert not x["grad"][:end].any() and torch.equal(plain["grad"].nan_to_num(), before.nan_to_num())
        assert torch.equal(x["grad"][end:].nan_to_num(), before[end:].nan_to_num())
        assert all(torch.equal(x[name], plain[name]) for name in ("student", "teacher", "steps", "nonfinite"))


def test_against_torchs_adamw_clip_and_ema(device):
    """Separate tensors on schedules, as main_dino.py trains them; the last is frozen for two steps and counts then."""
    sizes = [50, 300, 7]
    x = state(device, sizes) | {"steps": torch.zeros(3, dtype=torch.int64, device=device)}
    x["exp_avg"].zero_()
    x["exp_avg_sq"].zero_()
    x["decayed"] = torch.tensor([True, False, True], device=device)
    parameters = [p.clone().double().requires_grad_() for p in x["student"].split(sizes)]
    teachers = [t.clone().double() for t in x["teacher"].split(sizes)]
    groups = [{"params": [parameters[0], parameters[2]], "weight_decay": 0.1}, {"params": [parameters[1]]}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    for step in range(5):
        g = torch.Generator().manual_seed(step)
        x["grad"].copy_(torch.randn(sum(sizes), generator=g))
        x["frozen"][2] = step < 2
        for p, grad in zip(parameters, x["grad"].double().split(sizes), strict=True):
            p.grad = grad * (3.0 / (grad.norm() + 1e-6)).clamp(max=1)
        if step < 2:
            parameters[2].grad = None
            x["grad"][-7:] = float("nan")  # whatever is there is ignored
        lr, weight_decay, momentum = 0.01 * (step + 1), 0.1 + 0.05 * step, 0.9 + 0.02 * step
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = weight_decay
        optimizer.step()
        adamw_ema_step_(**x, **(HYPER | {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}))
        for p, t, ours, ours_t in zip(
            parameters, teachers, x["student"].split(sizes), x["teacher"].split(sizes), strict=True
        ):
            t.mul_(momentum).add_((1 - momentum) * p.detach())
            torch.testing.assert_close(ours.double(), p.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours_t.double(), t, rtol=1e-5, atol=1e-6)
    assert x["steps"].tolist() == [5, 5, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_norm_that_is_not_finite_changes_nothing_but_the_flag(device, bad):
    x = state(device)
    x["grad"][100] = bad  # the square of 1e30 is infinite in float32
    before = clone(x)
    adamw_ema_step_(**x, **HYPER)
    assert x["nonfinite"] == 1
    for name, value in before.items():
        if isinstance(value, torch.Tensor) and name not in ("nonfinite", "grad"):
            assert torch.equal(x[name], value), name
    x["grad"][100] = 0.0
    adamw_ema_step_(**x, **HYPER)
    assert x["nonfinite"] == 0 and not torch.equal(x["student"], before["student"])


def test_clips_only_what_is_too_long(device):
    x = state(device, [100, 100])
    x["grad"][:100] *= 100 / x["grad"][:100].norm()
    x["grad"][100:] *= 0.5 / x["grad"][100:].norm()
    free, clipped = clone(x), clone(x)
    adamw_ema_step_(**free, **(HYPER | {"clip_norm": None}))
    adamw_ema_step_(**clipped, **HYPER)
    assert torch.equal(free["exp_avg"][100:], clipped["exp_avg"][100:])
    moved = clipped["exp_avg"][:100] - 0.9 * x["exp_avg"][:100]
    torch.testing.assert_close(moved.norm().item(), 0.1 * 3.0, rtol=1e-4, atol=0)


def test_momentum_one_keeps_the_teacher_and_frozen_weights_still_reach_it(device):
    x = state(device, frozen=range(len(SIZES)))
    before = clone(x)
    adamw_ema_step_(**x, **(HYPER | {"momentum": 1.0}))
    assert torch.equal(x["teacher"], before["teacher"]) and torch.equal(x["student"], before["student"])
    adamw_ema_step_(**x, **(HYPER | {"momentum": 0.0}))
    assert torch.equal(x["teacher"], before["student"]) and torch.equal(x["steps"], before["steps"])
    assert torch.equal(x["exp_avg"], before["exp_avg"]) and torch.equal(x["exp_avg_sq"], before["exp_avg_sq"])


def test_settings_as_tensors_and_without_copies(device):
    x = state(device) | {"student_16": None, "teacher_16": None}
    given = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.996}
    as_tensors = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in given.items()}
    first, second = clone(x), clone(x)
    adamw_ema_step_(**first, **given)
    adamw_ema_step_(**second, **as_tensors)
    for name in ("student", "exp_avg", "teacher"):
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("groups", [None, [0, 0, 1]])
def test_a_segment_of_more_blocks_than_are_summed_at_once(device, monkeypatch, groups):
    block = 512  # not less than two elements a thread: of those that share one, some may read what another wrote
    monkeypatch.setattr(flat_step, "_BLOCK", block)
    flat_step.table.cache_clear()
    ours = state(device, [3, block * 1030 + 5, 2])
    ours["grad"][block * 1030 :] *= 1000  # what the last blocks hold decides how much is clipped
    ours["clip_groups"] = groups if groups is None else torch.tensor(groups, device=device)
    eager = clone(ours)
    adamw_ema_step_(**ours, **HYPER)
    adamw_ema_step_reference_(**eager, **HYPER)
    torch.testing.assert_close(ours["exp_avg"], eager["exp_avg"], rtol=1e-5, atol=1e-7)


def test_repeats_bitwise(device):
    first = state(device)
    second = clone(first)
    for x in (first, second):
        adamw_ema_step_(**x, **HYPER)
    for name, value in first.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, second[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    expected, actual = (state(sizes=[200_000, 70_001, 3]) for _ in range(2))
    adamw_ema_step_(**expected, **HYPER)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        adamw_ema_step_(**actual, **HYPER)
    finally:
        torch.set_num_threads(before)
    for name in ("student", "exp_avg", "exp_avg_sq", "teacher", "student_16", "teacher_16"):
        assert torch.equal(actual[name], expected[name])
    assert torch.equal(actual["student_16"], actual["student"].bfloat16())


def test_opcheck_and_compile(device):
    x = state(device, [5, 16])
    args = [x[name] for name in ("student", "grad", "exp_avg", "exp_avg_sq", "teacher", "student_16", "teacher_16")]
    args += [torch.empty(2, 4, device=device), torch.empty(2, 4, device=device)]  # rows: segments of 5 and 16 hold them
    args += [x[name] for name in ("offsets", "steps", "decayed", "frozen", "nonfinite")]
    settings = [torch.tensor(value, device=device) for value in (0.01, 0.1, 0.9)]
    op, numbers = torch.ops.dino_kernels.adamw_ema_step_.default, (3.0, 0.9, 0.999, 1e-8, 1)
    for last in ((None, None), by_segment(2, device).values()):
        torch.library.opcheck(op, (*args, *settings, *numbers, *last))
    eager, compiled = state(device, [5, 16]), state(device, [5, 16])
    adamw_ema_step_(**eager, **HYPER)
    torch.compile(adamw_ema_step_, fullgraph=True, backend="aot_eager")(**compiled, **HYPER)
    assert torch.equal(eager["student"], compiled["student"]) and torch.equal(eager["teacher"], compiled["teacher"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student": torch.zeros(9).half()}, "student must be contiguous.*dtype float32, got.*float16"),
        ({"grad": torch.zeros(8)}, r"grad must be contiguous, of shape \[9\].*got shape \[8\]"),
        ({"grad": torch.zeros(9).double()}, "float32 or float16 or bfloat16.*float64"),
        ({"exp_avg": torch.zeros(18)[::2]}, r"exp_avg must be contiguous.*strides \[2\]"),
        ({"teacher": torch.zeros(9, device="meta")}, "teacher must be on cpu as student, got meta"),
        ({"student_16": torch.zeros(9)}, "student_16 must be.*float16 or bfloat16"),
        ({"offsets": [0, 5]}, r"offsets must rise from 0 to the number of elements 9, got \[0, 5\]"),
        ({"offsets": [0, 7, 5, 9]}, "offsets must rise"),
        ({"offsets": [0, 4, 4, 9]}, "offsets must rise"),
        ({"steps": torch.zeros(2)}, r"steps must have shape \[2\], dtype int64"),
        ({"frozen": torch.zeros(3, dtype=torch.bool)}, r"frozen must have shape \[2\], dtype bool.*got \[3\]"),
        ({"nonfinite": torch.zeros((), dtype=torch.bool)}, r"nonfinite must have shape \[\], dtype int32"),
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"weight_decay": torch.zeros(2)}, "weight_decay must be a float or a 0-d tensor"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0 or None, got 0.0"),
        ({"lr_scale": torch.zeros(2).double()}, r"lr_scale must have shape \[2\], dtype float32"),
        ({"clip_groups": torch.zeros(3).long()}, r"clip_groups must have shape \[2\], dtype int64.*got \[3\]"),
        ({"clip_groups": torch.zeros(2).long(), "clip_norm": None}, "clip_groups needs a clip_norm, got None"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"rows": (torch.zeros(5, 1),) * 2}, r"the lengths of the last two segments, 4 and 5; got \[\(\[5, 1\]"),
        ({"rows": (torch.zeros(4, 1), torch.zeros(3, 1))}, "rows must be two contiguous tensors"),
        ({"cleared": 3}, "cleared must be from 0 to 2 segments, got 3"),
        ({"rows": (torch.zeros(4, 1),) * 2, "cleared": 2}, "cleared must be from 0 to 1 segments, got 2"),
    ],
)
def test_bad_input(change, message):
    x = state(sizes=[4, 5]) | HYPER
    adamw_ema_step_(**x)
    with pytest.raises(ValueError, match=message):
        adamw_ema_step_(**{**x, **change})
