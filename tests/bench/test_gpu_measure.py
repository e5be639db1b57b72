"""Measurements of a case by `make gpu`: values, times and launch variants, with a timer that only records calls."""

import time
from functools import partial
from types import SimpleNamespace

import gpu_measure
import gpu_report
import pytest
import torch
from gpu_report import OURS
from setting import Case

X = torch.ones(3)


def case(providers):
    return Case("op", "[3]", "float32", 24, 0, ("out",), providers, exact=lambda: (X.double(),))


def test_a_provider_with_wrong_values_or_an_error_is_marked():
    def fails():
        raise ImportError("no such\nthing")

    def exhausts():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    providers = {OURS: lambda: (X,), "reference": lambda: ([X[:1], X[1:]],), "off": lambda: (1.01 * X,)}
    providers |= {"bad": fails, "large": exhausts, "last": lambda: (X,)}
    rows = gpu_measure.measure(lambda device: case(providers), "cpu", gpu_measure.HostTimer())
    notes = {row["provider"]: row["note"] for row in gpu_report.finish_rows(rows, None)}
    assert notes[OURS] == notes["reference"] == notes["last"] == ""
    assert notes["off"].startswith("wrong values: out off by 1.0e-02")
    assert notes["bad"] == "not available: ImportError: no such"
    assert notes["large"] == "not available: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert rows[0]["bitwise"] and len(rows[0]["errors"]) == 1


def test_only_selected_providers_are_measured():
    providers = {name: lambda: (X,) for name in (OURS, "reference", "compiled reference", "einsum")}
    made = {}
    for compiled in (False, True):
        wanted = {"compiled": compiled}
        cases = {"op": lambda device: case(providers)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_measure, "cases", lambda toy, cases=cases: cases)
            gpu_measure.measure_case(lambda record: made.update(record["cases"]), "op", "cpu", True, **wanted)
    assert {name: [row["provider"] for row in rows] for name, rows in made.items()} == {
        "op": [OURS, "reference", "einsum"],
        "op, compiled peers": [OURS, "reference", "compiled reference"],
    }


def test_a_check_compares_with_float64_and_repeats(monkeypatch):
    calls = []

    def unsteady():
        calls.append(None)
        return (X + 1e-3 * len(calls),)

    providers = {OURS: unsteady, "reference": lambda: (X,)}
    monkeypatch.setattr(gpu_measure, "cases", lambda toy: {"op": lambda device: case(providers)})
    sent = []
    gpu_measure.check(sent.append, "op", "cpu", True)
    (check,) = sent[0]["checks"].values()
    assert check["errors"]["out"] == pytest.approx(1e-3, rel=1e-3) and check["eager"] == {"out": 0}
    assert not check["bitwise"]
    assert gpu_report.check_note(check) == "wrong values: out off by 1.0e-03, not repeatable"


# --- launch variants ---------------------------------------------------------------------------------


def test_a_launch_variant_has_other_options_and_is_compared_with_the_default(monkeypatch):
    from triton.runtime.jit import JITFunction

    launches = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launches.append(options))

    def ours():
        JITFunction.run(None, X, grid=(1,), warmup=False, num_warps=8)
        JITFunction.run(None, X, grid=(1,), warmup=False)
        return (X * (1.5 if launches[-1].get("num_stages") == 4 else 1),)

    rows = gpu_measure.measure(
        lambda _: case({OURS: ours, "reference": lambda: (X,)}), "cpu", gpu_measure.HostTimer(),
        variants=gpu_measure.LAUNCHES,
    )  # fmt: skip
    options = {(o.get("num_warps"), o.get("num_stages")) for o in launches}
    assert options == {(8, None), (None, None), (4, None), (2, None), (16, None), (8, 2), (None, 2), (8, 4), (None, 4)}
    notes = {row["provider"]: row["note"] for row in gpu_report.finish_rows(rows, None)}
    assert notes.pop(f"{OURS}, 4 stages").startswith("wrong values: out off by 5.0e-01") and not any(notes.values())
    assert rows[2]["from_default"] == {"out": 0}
    assert JITFunction.run(None) is None and launches[-1] == {}  # restored


# --- timers ------------------------------------------------------------------------------------------


class FakeCuda:
    """The parts of torch.cuda that the timer uses. Memory in use comes from a list; each "event" takes 3 ms."""

    def __init__(self):
        self.diary, self.memory, self.mode = [], [], "default"

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=50 << 20)

    def current_device(self):
        return 0

    def Event(self, enable_timing):  # noqa: N802
        note = self.diary.append
        return SimpleNamespace(
            record=lambda: note("event"), synchronize=lambda: note("wait"), elapsed_time=lambda end: 3.0
        )

    def synchronize(self):
        self.diary.append("wait")

    def _sleep(self, cycles):
        self.diary.append(("sleep", cycles))

    def reset_peak_memory_stats(self):
        self.diary.append("reset")

    def memory_allocated(self):
        return self.memory.pop(0)

    def max_memory_allocated(self):
        return 10 << 20

    def set_sync_debug_mode(self, mode):
        self.mode = mode


def test_the_timer_of_a_gpu():
    cuda = FakeCuda()
    assert all(hasattr(torch.cuda, name) for name in vars(FakeCuda) if not name.startswith("__"))
    timer = gpu_measure.DeviceTimer(cuda, "cpu")
    assert timer.buffer.nbytes > 4 * (50 << 20)
    assert timer.milliseconds(lambda: cuda.diary.append("call"), host_ms=2.0) == 3.0
    assert cuda.diary == [("sleep", 6_400_000), "event", "call", "event", "wait"]
    cuda.memory = [1 << 20, 3 << 20]
    assert timer.memory(lambda: cuda.diary.append("again")) == {"peak_mib": 9.0, "kept_mib": 2.0}
    assert cuda.diary[-4:] == ["wait", "reset", "again", "wait"]

    def waits():
        assert cuda.mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    assert timer.waits(waits) is True and timer.waits(lambda: None) is False and cuda.mode == "default"
    with pytest.raises(ZeroDivisionError):
        timer.waits(lambda: 1 / 0)
    assert cuda.mode == "default"


def test_calls_alternate_until_the_time_limit(monkeypatch):
    monkeypatch.setattr(gpu_measure, "TIMING_SECONDS", 0.0)
    timer = SimpleNamespace(rounds=100, milliseconds=lambda call, host_ms: call())
    order = []
    calls = {name: partial(order.append, name) for name in "ab"}
    times = gpu_measure.alternate(calls, timer, {"a": 1, "b": 1})
    assert order == ["a", "b"] * 10 and len(times["a"]) == 10


def test_the_time_limit_interrupts_a_call():
    with pytest.raises(TimeoutError, match="not ready after 0 s"), gpu_measure.time_limit(0.05):
        time.sleep(10)
    with gpu_measure.time_limit(0.05):
        pass
    time.sleep(0.1)  # the timer was stopped


def test_a_wider_loss_takes_more_warps_and_leaves_kernels_without_lanes():
    assert gpu_measure.lanes(2, {"LANES": 4096, "num_warps": 16}) == {"LANES": 8192, "num_warps": 32}
    assert gpu_measure.lanes(0.5, {"BLOCK": 64, "num_warps": 16}) == {"BLOCK": 64, "num_warps": 16}
    assert len(gpu_measure.launches_of("dino_loss float16")) == len(gpu_measure.launches_of("mlp")) + 2
