"""Proves and measures the kernels on this machine's GPU, in one command of under nine minutes.

    python bench/gpu.py --output gpu-results                  (or: make gpu OUT=gpu-results)
    python bench/gpu.py --toy --device cpu --output DIR       a trial run without a GPU: its numbers mean nothing

Builds in place, runs the ops' tests on the card, measures whole training steps (gpu_steps.py), the two ceilings (copy
and matrix product) and then the cases of gpu_cases.py in the order of importance, as far as the time goes. The folder
gets results.json and results.md, both complete after every case, results.png, and what build, tests, steps and cases
said (*.log). Needs no network, and of Python packages torch, triton, numpy, pytest, ninja; matplotlib draws the plot
where it is there.
"""

import argparse
import faulthandler
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree

import gpu_report
import gpu_steps
from gpu_report import OURS

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 510  # for everything but the plot: ends in less than nine minutes
TEST_SECONDS = 180  # at most, for the tests
STEP_SECONDS = 200  # at most, for whole steps before the cases; those it cut off get what the cases leave
CASE_SECONDS = 150  # at most, for one case
PROVIDER_SECONDS = 45  # at most, until a provider is compiled
TIMING_SECONDS = 2.0  # for the rounds of one case
MOST_ROUNDS = 100


# --- build and tests ---------------------------------------------------------------------------------


def build(folder: Path) -> str:
    started = time.time()
    with (folder / "build.log").open("w") as log:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    return f"{'failed, see build.log' if done.returncode else 'done'}, {time.time() - started:.0f} s"


def test_files() -> list[Path]:
    """The tests of every op, and of all of them in a CUDA graph."""
    ops = sorted(ROOT.glob("dino_kernels/[a-z]*.py"))
    ops.remove(ROOT / "dino_kernels/multicrop.py")  # on the CPU alone, and beside Pillow
    files = [ROOT / "tests" / f"test_{op.stem}.py" for op in ops]
    return [file for file in files if file.is_file()] + [ROOT / "tests" / "test_gpu.py"]


def run_tests(files: list[Path], folder: Path, seconds: float) -> list[dict]:
    """Each file in a pytest of its own, all at once: one that breaks the device or hangs spoils no other."""
    # The project's pytest options name plugins that need not be installed; CPU kernels are tested elsewhere.
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-k", "not cpu", "--tb", "short"]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    started, processes = time.time(), {}
    for file in files:
        command = [sys.executable, "-m", "pytest", "-v", *options, f"--junitxml={folder / file.stem}.xml", str(file)]
        with (folder / f"{file.stem}.log").open("w") as log:
            processes[file] = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
    rows = []
    for file, process in processes.items():
        try:
            process.wait(max(0, started + seconds - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: nobody else's process
            process.wait()
        rows.append(test_row(file, folder / f"{file.stem}.xml", time.time() - started))
    return rows


def test_row(file: Path, report: Path, seconds: float) -> dict:
    row = {"file": file.name, "passed": 0, "failed": 0, "skipped": 0, "seconds": seconds, "problems": []}
    if not report.is_file():
        return {**row, "failed": 1, "problems": [f"no report after {seconds:.0f} s, see {file.stem}.log"]}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    report.unlink()
    assert suite is not None
    total, skipped, *bad = (int(suite.get(key, 0)) for key in ("tests", "skipped", "failures", "errors"))
    row |= {"passed": total - skipped - sum(bad), "failed": sum(bad), "skipped": skipped}
    row["seconds"] = float(suite.get("time", seconds))
    for test in suite.iter("testcase"):
        for problem in [*test.findall("failure"), *test.findall("error")]:
            row["problems"].append(f"{test.get('name')}: {problem.get('message', '')[:200]}")
    return row


# --- timing ------------------------------------------------------------------------------------------


@contextmanager
def time_limit(seconds: float):
    """TimeoutError in the body after that long, also in the middle of a compilation."""

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
    """Times calls on the CPU, where there is no queue, no cache to empty and no allocator to ask."""

    def synchronize(self) -> None:
        pass

    def milliseconds(self, call: Callable, host_ms: float) -> float:
        return host_milliseconds(call)

    def memory(self, call: Callable) -> dict:
        return {"peak_mib": None, "kept_mib": None}

    def waits(self, call: Callable) -> bool | None:
        return None


class DeviceTimer:
    """Times calls with CUDA events. `cuda` is torch.cuda; a test has its own."""

    def __init__(self, cuda, device: str) -> None:
        import torch

        self.cuda = cuda
        size = max(4 * cuda.get_device_properties(cuda.current_device()).L2_cache_size, 256 << 20)
        self.buffer = torch.zeros(size // 4, device=device)
        self.start, self.end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize = self.cuda.synchronize

    def milliseconds(self, call: Callable, host_ms: float) -> float:
        # The device sleeps (in cycles, at most 2 GHz) until the host has launched the whole call.
        self.cuda._sleep(int(2e6 * min(20, 0.2 + 1.5 * host_ms)))
        self.buffer.zero_()
        self.buffer.sum()  # what is left in L2 after reading need not be written back at the call's expense
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
        """Whether the call makes the host wait for the device."""
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


def host_milliseconds(call: Callable) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def alternate(calls: dict[str, Callable], timer, host_ms: dict[str, float]) -> dict[str, list[float]]:
    """Milliseconds of every call, a round after the other: a drift of the clock meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= 10 and time.perf_counter() - started > TIMING_SECONDS:
            break
        for name, call in calls.items():
            times[name].append(timer.milliseconds(call, host_ms[name]))
    return times


def measure_ceilings(timer, device: str, toy: bool) -> dict:
    import torch

    size, n = (1 << 22, 256) if toy else (1 << 30, 8192)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = alternate(calls, timer, dict.fromkeys(calls, 0.1))
    copy, product = (statistics.median(times[name]) / 1e3 for name in calls)
    return {"copy_bytes_per_s": 2 * size / copy, "bf16_flops_per_s": 2 * n**3 / product}


# --- a case ------------------------------------------------------------------------------------------


def joined(result):
    """A result as one vector."""
    import torch

    return result.flatten() if isinstance(result, torch.Tensor) else torch.cat([x.flatten() for x in result])


def relative_errors(names, results, exact) -> dict[str, float]:
    """|x - exact| / |exact| of every result, in L2 norms."""
    errors = {}
    for name, result, truth in zip(names, results, exact, strict=True):
        truth = joined(truth)
        errors[name] = float((joined(result).double() - truth).norm() / truth.norm().clamp_min(1e-30))
    return errors


def prepare(case, provider: str, exact, timer) -> dict:
    """The row of a provider that works, but for its times: compiled, compared with the exact values, warm."""
    call = case.providers[provider]
    row = {"errors": relative_errors(case.results, call(), exact)}
    call()
    timer.synchronize()
    row["host_ms"] = host_milliseconds(call)
    timer.synchronize()
    return {**row, **timer.memory(call), "waits": timer.waits(call) if provider == OURS else None}


def measure(build_case: Callable, device: str, timer) -> list[dict]:
    """The rows of a case: all its providers, also those that do not work."""
    case, rows = build_case(device), []
    exact = case.exact()
    for provider in case.providers:
        row = {key: getattr(case, key) for key in ("op", "shape", "dtype", "bytes", "flops")} | {"provider": provider}
        row |= {"errors": {}, "host_ms": None, "peak_mib": None, "kept_mib": None, "waits": None, "bitwise": None}
        rows.append({**row, "times": [], "note": ""})
        try:
            with time_limit(PROVIDER_SECONDS):
                rows[-1] |= prepare(case, provider, exact, timer)
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0][:200]
            rows[-1]["note"] = f"not available: {type(error).__name__}: {first_line}"
    del exact
    ready = {row["provider"]: row for row in rows if not row["note"]}
    if OURS in ready:
        first, second = (build_case(device).providers[OURS]() for _ in range(2))
        ready[OURS]["bitwise"] = all(bool((joined(a) == joined(b)).all()) for a, b in zip(first, second, strict=True))
    calls = {provider: case.providers[provider] for provider in ready}
    times = alternate(calls, timer, {provider: row["host_ms"] for provider, row in ready.items()})
    for provider, row in ready.items():
        row["times"] = times[provider]
    return rows


def work(folder: Path, device: str, toy: bool, deadline: float) -> None:
    """Measures the cases that results.json does not have yet, in a process of its own: see `run_cases`."""
    import gpu_cases
    import gpu_setting
    import torch

    results = json.loads((folder / "results.json").read_text())
    cases = gpu_cases.all_cases(gpu_setting.TOY if toy else gpu_setting.Sizes())
    timer = DeviceTimer(torch.cuda, device) if device == "cuda" else HostTimer()
    if device == "cuda":
        results["header"]["gpu"] = torch.cuda.get_device_name()
    if results["ceilings"] is None:
        results["ceilings"] = measure_ceilings(timer, device, toy)
    for name, build_case in cases.items():
        if name in results["cases"]:
            continue
        case = results["cases"][name] = {"rows": [], "problem": "skipped: the time was spent"}
        left = deadline - time.time()
        if left < 10:
            continue
        # Kills this process, also while it waits for the device.
        faulthandler.dump_traceback_later(min(CASE_SECONDS, left), exit=True)
        case["problem"] = "the process died in this case or ran out of time, see cases.log"
        gpu_report.write(folder, results)
        try:
            case["rows"] = gpu_report.finish_rows(measure(build_case, device, timer), results["ceilings"])
            case["problem"] = ""
        except Exception as error:
            case["problem"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        faulthandler.cancel_dump_traceback_later()
        print(f"{max(0, deadline - time.time()):4.0f} s left, measured: {name} {case['problem']}", flush=True)
        gpu_report.write(folder, results)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        timer.synchronize()  # raises where a kernel has broken the device for this process
    results["complete"] = True
    gpu_report.write(folder, results)


def environment() -> dict[str, str]:
    """In which this tree's packages are found."""
    paths = [str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_cases(folder: Path, arguments: list[str], deadline: float) -> None:
    """In a process of their own, and the rest in another where one breaks the device, hangs or dies."""
    command = [sys.executable, __file__, "--output", str(folder), "--deadline", str(deadline), *arguments]
    env, before = environment(), -1
    while True:
        results = json.loads((folder / "results.json").read_text())
        if "complete" in results or len(results["cases"]) == before:  # the latter: dies before the next case
            return
        before = len(results["cases"])
        with (folder / "cases.log").open("a") as log, suppress(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=ROOT, env=env, stderr=log, timeout=max(0, deadline - time.time()) + 15)


# --- the run -----------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """What a command prints, or "unknown"."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(device: str, toy: bool) -> dict:
    """The header. The device is not touched here: only the processes that work on it hold a context."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: torch finds no CUDA device here. A trial run without one: --toy --device cpu")
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "device": device,
        "gpu": "none" if device == "cpu" else "not asked yet",
        "driver": "none" if device == "cpu" else driver,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "toy": toy,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json, results.md, results.png")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes: only shows that everything runs")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # given to the process that measures
    options = parser.parse_args()
    folder = options.output.resolve()
    if options.deadline:
        work(folder, options.device, options.toy, options.deadline)
        return 0
    started = time.time()
    header = describe(options.device, options.toy)
    folder.mkdir(parents=True, exist_ok=True)
    for log in ("cases.log", "steps.log"):
        (folder / log).write_text("")
    results = {"header": header, "build": "skipped: on a GPU only", "tests": [], "ceilings": None}
    results |= {"cases": {}, "steps": {}}
    if options.device == "cuda":
        results["build"] = build(folder)
        gpu_report.write(folder, results)
        print(f"build: {results['build']}", flush=True)
        if results["build"].startswith("failed"):
            return 1
        results["tests"] = run_tests(test_files(), folder, TEST_SECONDS)
        print(*gpu_report.test_lines(results["tests"]), sep="\n", flush=True)
    gpu_report.write(folder, results)
    deadline = started + TOTAL_SECONDS
    gpu_steps.measure_steps(folder, results, min(deadline, time.time() + STEP_SECONDS), environment())
    run_cases(folder, ["--device", options.device, *["--toy"] * options.toy], deadline)
    results = json.loads((folder / "results.json").read_text())
    gpu_steps.measure_steps(folder, results, deadline, environment())
    print(*gpu_report.target_lines(results), sep="\n")
    print(f"{time.time() - started:.0f} s; results: {folder}; {gpu_report.plot(folder / 'results.png', results)}")
    return int(any(test["failed"] for test in results["tests"]) or "complete" not in results)


if __name__ == "__main__":
    sys.exit(main())
