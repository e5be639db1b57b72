"""Measurements of one case for gpu.py: errors relative to float64, times of its providers and of launch variants."""

import gc
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import op_cases
import torch
from gpu_report import COMPILED, OURS
from gpu_run import Send, one_line
from setting import TOY, Case, Provider, Result, Sizes
from torch import Tensor

import dino_kernels

PROVIDER_SECONDS = 40  # limit for the compilation of a provider
TIMING_SECONDS = 1.5  # for the rounds of one case

Variant = Callable[[], AbstractContextManager[None]]  # context that changes the launch options of our kernels


def cases(toy: bool) -> dict[str, Callable[[str], Case]]:
    sizes = TOY if toy else Sizes()
    return op_cases.first_cases(sizes) | op_cases.late_cases(sizes)


def first(toy: bool) -> list[str]:
    """Names of the cases of every op, in bfloat16 at ViT-S."""
    return list(op_cases.first_cases(TOY if toy else Sizes()))


# --- timing ------------------------------------------------------------------------------------------


@contextmanager
def time_limit(seconds: float):
    """Raise TimeoutError in the body after this time, also during a compilation."""

    def stop(signum, frame):
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class HostTimer:
    """Times calls on the CPU, without launch queue, cache flush and memory statistics: for dry runs."""

    rounds = 2

    def synchronize(self) -> None:
        pass

    def milliseconds(self, call: Callable, host_ms: float) -> float:
        return host_milliseconds(call)

    def memory(self, call: Callable) -> dict:
        return {"peak_mib": None, "kept_mib": None}

    def waits(self, call: Callable) -> bool | None:
        return None


class DeviceTimer:
    """Times calls with CUDA events. `cuda` is torch.cuda, or a test double."""

    rounds = 100

    def __init__(self, cuda, device: str) -> None:
        self.cuda = cuda
        size = max(4 * cuda.get_device_properties(cuda.current_device()).L2_cache_size, 256 << 20)
        self.buffer = torch.zeros(size // 4, device=device)
        self.start, self.end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize = self.cuda.synchronize

    def milliseconds(self, call: Callable, host_ms: float) -> float:
        # The device sleeps (argument in cycles, at most 2 GHz) until the host has queued the whole call.
        self.cuda._sleep(int(2e6 * min(20, 0.2 + 1.5 * host_ms)))
        self.buffer.zero_()
        self.buffer.sum()  # read, so that no dirty L2 lines are written back during the call
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)

    def memory(self, call: Callable) -> dict:
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        results = call()
        self.cuda.synchronize()
        peak, kept = self.cuda.max_memory_allocated() - before, self.cuda.memory_allocated() - before
        del results
        return {"peak_mib": peak / 2**20, "kept_mib": kept / 2**20}

    def waits(self, call: Callable) -> bool | None:
        """Whether the call synchronizes the host with the device."""
        self.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            self.cuda.set_sync_debug_mode("default")
        return False


def timer_of(device: str) -> HostTimer | DeviceTimer:
    return DeviceTimer(torch.cuda, device) if device == "cuda" else HostTimer()


def host_milliseconds(call: Callable) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def alternate(calls: Mapping[str, Callable], timer, host_ms: dict[str, float]) -> dict[str, list[float]]:
    """Milliseconds of every call, in alternating rounds, so that clock drift affects all calls equally."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(timer.rounds):
        if done >= 10 and time.perf_counter() - started > TIMING_SECONDS:
            break
        for name, call in calls.items():
            times[name].append(timer.milliseconds(call, host_ms[name]))
    return times


def ceilings(send: Send, device: str, toy: bool) -> None:
    size, n = (1 << 22, 256) if toy else (1 << 30, 8192)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = alternate(calls, timer_of(device), dict.fromkeys(calls, 0.1))
    copy, product = (statistics.median(times[name]) / 1e3 for name in calls)
    send({"ceilings": {"copy_bytes_per_s": 2 * size / copy, "bf16_flops_per_s": 2 * n**3 / product}})


# --- values ------------------------------------------------------------------------------------------


def joined(result: Result) -> Tensor:
    """A result as one vector."""
    return result.flatten() if isinstance(result, Tensor) else torch.cat([x.flatten() for x in result])


def relative_errors(names, results, exact) -> dict[str, float]:
    """|x - exact| / |exact| of every result, in L2 norms."""
    errors = {}
    for name, result, truth in zip(names, results, exact, strict=True):
        truth = joined(truth).double()
        errors[name] = float((joined(result).double() - truth).norm() / truth.norm().clamp_min(1e-30))
    return errors


def repeats(build_case: Callable[[str], Case], device: str) -> bool:
    first, second = (build_case(device).providers[OURS]() for _ in range(2))
    return all(bool((joined(a) == joined(b)).all()) for a, b in zip(first, second, strict=True))


def check(send: Send, name: str, device: str, toy: bool) -> None:
    """First check on a GPU: values at the reference sizes, and whether they are bitwise repeatable."""
    build_case = cases(toy)[name]
    case = build_case(device)
    exact, row = case.exact(), {}
    for key, provider in (("errors", OURS), ("eager", "reference")):
        row[key] = relative_errors(case.results, case.providers[provider](), exact)
    del case, exact
    send({"checks": {name: {**row, "bitwise": repeats(build_case, device)}}})


# --- times -------------------------------------------------------------------------------------------


def prepare(case: Case, call: Provider, exact, default, timer) -> dict:
    """The row of a provider without its times: compile, compare with the exact values, warm up."""
    results = call()
    row: dict[str, Any] = {"errors": relative_errors(case.results, results, exact)}
    if default is not None:
        row["from_default"] = relative_errors(case.results, results, default)
    del results
    call()
    timer.synchronize()
    row["host_ms"] = host_milliseconds(call)
    timer.synchronize()
    return {**row, **timer.memory(call)}


def measure(
    build_case: Callable[[str], Case],
    device: str,
    timer,
    wanted: Callable[[str], bool] = lambda provider: True,
    variants: Mapping[str, Variant] | None = None,
) -> list[dict]:
    """The rows of the selected providers of a case, including providers that fail.

    With variants: rows of ours with each variant instead of the peers, compared with the default launch.
    """
    case, rows = build_case(device), []
    exact, default = case.exact(), None
    providers = {name: call for name, call in case.providers.items() if wanted(name)}
    if variants:
        default = [joined(x).clone() for x in build_case(device).providers[OURS]()]
        providers = {OURS: providers[OURS], "reference": providers["reference"]} | {
            name: partial(called, variant, build_case(device).providers[OURS]) for name, variant in variants.items()
        }
    for provider, call in providers.items():
        row = {key: getattr(case, key) for key in ("op", "shape", "dtype", "bytes", "flops")} | {"provider": provider}
        row |= {"errors": {}, "host_ms": None, "peak_mib": None, "kept_mib": None, "waits": None, "bitwise": None}
        rows.append({**row, "times": [], "note": ""})
        try:
            with time_limit(PROVIDER_SECONDS):
                rows[-1] |= prepare(case, call, exact, default if variants and provider in variants else None, timer)
            if provider == OURS and not variants:
                rows[-1] |= {"waits": timer.waits(call), "bitwise": repeats(build_case, device)}
        except Exception as error:
            rows[-1]["note"] = f"not available: {one_line(error)}"
        if device == "cuda":  # also memory held by the traceback of an error
            gc.collect()
            torch.cuda.empty_cache()
    del exact, default
    ready = {row["provider"]: row for row in rows if not row["note"]}
    calls = {provider: providers[provider] for provider in ready}
    times = alternate(calls, timer, {provider: row["host_ms"] for provider, row in ready.items()})
    for provider, row in ready.items():
        row["times"] = times[provider]
    return rows


def is_compiled(provider: str) -> bool:
    return provider.startswith("compiled")


def measure_case(send: Send, name: str, device: str, toy: bool, compiled: bool) -> None:
    """Measure ours and either the peers that use torch.compile or the others."""
    wanted = (lambda p: p in (OURS, "reference") or is_compiled(p)) if compiled else lambda p: not is_compiled(p)
    rows = measure(cases(toy)[name], device, timer_of(device), wanted)
    send({"cases": {f"{name}{COMPILED}" if compiled else name: rows}})


# --- other launches of ours --------------------------------------------------------------------------


@contextmanager
def launches(change: Callable[[dict[str, Any]], dict[str, Any]]):
    """Triton launches use the options (keyword arguments) returned by `change`."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    JITFunction.run = lambda self, *args, **options: run(self, *args, **change(options))
    try:
        yield
    finally:
        JITFunction.run = run


@contextmanager
def backend(name: str):
    dino_kernels.set_backend(name)
    try:
        yield
    finally:
        dino_kernels.set_backend(None)


def warps(factor: float, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "num_warps": min(32, max(1, int(factor * options.get("num_warps", 4))))}


def stages(count: int, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "num_stages": count}


def lanes(factor: float, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the loss kernel over the student logits: columns per iteration, and with them warps."""
    wider = {"LANES": int(factor * options["LANES"])} if "LANES" in options else {}
    return warps(factor, options) | wider if wider else options


LAUNCHES: dict[str, Variant] = {
    f"{OURS}, half the warps": partial(launches, partial(warps, 0.5)),
    f"{OURS}, twice the warps": partial(launches, partial(warps, 2)),
    f"{OURS}, 2 stages": partial(launches, partial(stages, 2)),
    f"{OURS}, 4 stages": partial(launches, partial(stages, 4)),
}
OF_THE_LOSS: dict[str, Variant] = {
    f"{OURS}, half as wide": partial(launches, partial(lanes, 0.5)),
    f"{OURS}, twice as wide": partial(launches, partial(lanes, 2)),
}
IN_CUDA = ("dino_loss", "ema_update", "adamw_ema", "attention 197", "attention 37", "attention packed")


def launches_of(name: str) -> dict[str, Variant]:
    return LAUNCHES | (OF_THE_LOSS if name.startswith("dino_loss") else {})


def called(variant: Variant, call: Provider) -> Any:
    with variant():
        return call()


def measure_variants(send: Send, name: str, device: str, toy: bool) -> None:
    variants = launches_of(name)
    if name.startswith(IN_CUDA):
        variants[f"{OURS}, CUDA C++"] = partial(backend, "cuda")
    rows = measure(cases(toy)[name], device, timer_of(device), variants=variants)
    send({"variants": {name: rows}})
