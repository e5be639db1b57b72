"""Tests and measures the kernels and the trainer on the GPU of this machine, in one command of at most nine minutes.

    python bench/gpu/gpu.py --output gpu-results                  (or: make gpu OUT=gpu-results)
    python bench/gpu/gpu.py --toy --device cpu --output DIR       a dry run without a GPU: its numbers are not valid

The most important items (ITEMS) come first. Each task runs in a separate process: if one fails, hangs or crashes, this
is recorded and the others continue. Writes results.json and results.md (complete after every task), results.png and
log.txt. Needs no network; needs the Python packages torch, triton, numpy, Pillow and pytest.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATHS = [
    str(Path(__file__).resolve().parents[2] / part) for part in ("bench/gpu", "bench/cases", "bench", "", "python_api")
]
sys.path[:0] = PATHS  # no installation needed

import gpu_report  # noqa: E402
from gpu_report import COMPILED, OURS, PLAIN  # noqa: E402
from gpu_run import Task, prepare, run_tasks  # noqa: E402
from machine import ROOT, output_of  # noqa: E402

BUILD_SECONDS = 75


@dataclass
class Options:
    folder: Path
    device: str
    toy: bool
    arch: int  # 90 for compute capability 9.0
    scratch: str  # a folder for images and a run

    @property
    def where(self) -> tuple[str, bool]:
        return self.device, self.toy


# --- items, in order of execution --------------------------------------------------------------------


def compile_tasks(o: Options) -> list[Task]:
    import gpu_compile
    import gpu_measure

    names = [f"{gpu_compile.STEP}ViT-S/16", *gpu_measure.cases(o.toy), f"{gpu_compile.STEP}ViT-B/16"]
    peers = gpu_compile.peers_to_compile(o.toy)
    if o.toy:  # compilation takes as long as for a GPU: one case is enough for a dry run
        names, peers = ["ema_update ViT-S"], peers[:1]
    tasks = [Task(f"stock, {net}", "gpu_compile.stock_step", (net, *o.where)) for net in ("ViT-S/16", "ViT-B/16")]
    ours = [Task(name, "gpu_compile.ours", (name, o.arch, o.toy)) for name in names]
    theirs = [Task(f"peers of {name}", "gpu_compile.peers", (name, *o.where)) for name in peers]
    return [*tasks[: 1 if o.toy else 2], *ours, *theirs]  # the first take longest


def check_tasks(o: Options) -> list[Task]:
    import gpu_measure

    return [Task(name, "gpu_measure.check", (name, *o.where)) for name in gpu_measure.first(o.toy)]


def step_tasks(net: str, *providers: str) -> Callable[[Options], list[Task]]:
    return lambda o: [
        Task(f"{net}, {name}", "gpu_steps.measure_step", (net, name, *o.where), 100) for name in providers
    ]


def profile_tasks(o: Options) -> list[Task]:
    return [Task("profile", "gpu_steps.profile", o.where)]


def training_tasks(o: Options) -> list[Task]:
    return [Task(part, "gpu_train.run", (part, o.scratch, *o.where)) for part in ("start", "resume")]


def peer_tasks(o: Options) -> list[Task]:
    import gpu_measure

    cases = [Task(name, "gpu_measure.measure_case", (name, *o.where, False)) for name in gpu_measure.first(o.toy)]
    return [Task("ceilings", "gpu_measure.ceilings", o.where), *cases]


def variant_tasks(o: Options) -> list[Task]:
    import gpu_counters

    names = gpu_counters.CASES[: 1 if o.toy else None]
    return [Task(f"variants of {name}", "gpu_measure.measure_variants", (name, *o.where)) for name in names]


def counter_tasks(o: Options) -> list[Task]:
    return [Task("counters", "gpu_counters.measure", o.where)]


def compiled_tasks(o: Options) -> list[Task]:
    import gpu_compile

    names = gpu_compile.peers_to_compile(o.toy)[: 2 if o.toy else None]
    return [Task(f"{name}{COMPILED}", "gpu_measure.measure_case", (name, *o.where, True)) for name in names]


def late_tasks(o: Options) -> list[Task]:
    import gpu_measure

    names = list(gpu_measure.cases(o.toy))[len(gpu_measure.first(o.toy)) :]
    cases = [Task(name, "gpu_measure.measure_case", (name, *o.where, False)) for name in names]
    return [*step_tasks("ViT-B/16", OURS, *() if o.toy else ("reference", "stock"))(o), *cases]


def test_tasks(o: Options) -> list[Task]:
    import gpu_tests

    return [Task(file.name, "gpu_tests.run", (str(file),)) for file in gpu_tests.test_files(o.toy)]


@dataclass
class Item:
    """Tasks with a common time limit, extended by the time that earlier items did not use."""

    name: str
    seconds: float
    tasks: Callable[[Options], Sequence[Task]]
    at_once: int = 1  # concurrent tasks; timed tasks run alone on the GPU
    ordered: bool = False  # one after the other also in a dry run


CORES = len(os.sched_getaffinity(0))
ITEMS = [
    Item("1 compile", 80, compile_tasks, CORES),
    Item("2 values of every op", 30, check_tasks, min(CORES, 8)),
    Item("3 ViT-S, plain calls and one graph", 60, step_tasks("ViT-S/16", PLAIN, OURS)),
    Item("4 profile", 12, profile_tasks),
    Item("5 a real run, stopped and resumed", 45, training_tasks, ordered=True),
    Item("6 every op and its peers", 60, peer_tasks),
    Item("6 other launches", 25, variant_tasks),
    Item("7 hardware counters", 50, counter_tasks),
    Item("8 the peers' steps", 60, step_tasks("ViT-S/16", "reference", "stock")),
    Item("9 compiled peers", 30, compiled_tasks),
    Item("9 ViT-B and float16", 35, late_tasks),
    Item("9 tests", 35, test_tasks, min(CORES, 8)),
]


# --- the run -----------------------------------------------------------------------------------------


def describe(device: str, toy: bool) -> dict[str, Any]:
    """The header of the results. Creates no CUDA context: only the processes of tasks have one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: torch finds no CUDA device. For a dry run without one: --toy --device cpu")
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = "not installed"
    code = "import torch; print(*torch.cuda.get_device_capability(), torch.cuda.get_device_name())"
    major, minor, name = output_of(sys.executable, "-c", code).split(" ", 2) if device == "cuda" else ("9", "0", "none")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "device": device,
        "gpu": name,
        "compute capability": f"{major}.{minor}",
        "driver": "none" if device == "cpu" else driver,
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "toy": toy,
    }


def build(log: Path) -> str:
    started = time.time()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with log.open("a") as said:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=said, stderr=said, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            return f"failed: not complete after {BUILD_SECONDS} s, see log.txt"
    return f"{'failed, see log.txt' if done.returncode else 'done'}, {time.time() - started:.0f} s"


def merge(into: dict[str, Any], record: dict[str, Any]) -> None:
    for key, value in record.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def run(options: Options, results: dict[str, Any], deadline: float) -> None:
    def take(record: dict[str, Any]) -> None:
        merge(results, record)
        gpu_report.finish(results, record)
        gpu_report.write(options.folder, results)

    for item in ITEMS:
        deadline += item.seconds
        began = time.time()
        at_once = CORES if options.toy and not item.ordered else item.at_once
        log = options.folder / "log.txt"
        problems = run_tasks(item.tasks(options), at_once=at_once, deadline=deadline, log=log, take=take)
        take({"items": {item.name: {"seconds": time.time() - began, "problems": problems}}})
        gpu_report.plot(options.folder, results)
        print(f"{time.time() - began:4.0f} s: {item.name}", flush=True)
        for task, problem in problems.items():
            print(f"        {task}: {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json, .md, .png and log.txt")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes: only to check that everything runs")
    given = parser.parse_args()
    started, folder = time.time(), given.output.resolve()
    header = describe(given.device, given.toy)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    log.write_text("")
    results: dict[str, Any] = gpu_report.empty(header)
    if given.device == "cuda":
        results["build"] = build(log)
        print(f"build: {results['build']}", flush=True)
    gpu_report.write(folder, results)
    if results["build"].startswith("failed"):
        return 1
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    prepare(given.device, log)
    scratch = tempfile.mkdtemp()
    try:
        arch = int(header["compute capability"].replace(".", ""))
        run(Options(folder, given.device, given.toy, arch, scratch), results, started)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(*gpu_report.target_lines(results), f"{time.time() - started:.0f} s; results: {folder}", sep="\n")
    return int(gpu_report.failed(results))


if __name__ == "__main__":
    sys.exit(main())
