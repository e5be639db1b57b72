"""A dry run of gpu.py without a GPU and without optional libraries, with tasks that fail; and a killed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_failures
import gpu_measure
import gpu_report
import gpu_run
import gpu_targets
import pytest
import torch
from bare import ROOT, environment
from gpu_report import COMPILED, OURS, PLAIN

from dino_kernels._core.backends import compiled_archs

FILES = {"results.json", "results.md", "results.png", "log.txt"}
GPU_ONLY = ("SDPA cudnn", "SDPA efficient", "varlen_attn", "add + Liger layer norm")
CUDA_CPP = f"{OURS}, CUDA C++"
FAILURES = {
    "crash": "died of SIGABRT, see the log",
    "hang": "no result within 4 s, see the log",
    "exhaust": "RuntimeError: [enforce fail at alloc_cpu.cpp",
    "killed_by_the_host": "died of SIGKILL (perhaps the host's memory ran out), see the log",
}

pytestmark = pytest.mark.slow


def command(folder: Path, *options: str) -> list[str]:
    program = str(ROOT / "tests/helpers/gpu_failures.py")
    return [sys.executable, program, "--toy", "--device", "cpu", "--output", str(folder / "new"), *options]


def environ(folder: Path) -> dict[str, str]:
    return environment(folder) | {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": "0"}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """results.json of a complete dry run."""
    folder = tmp_path_factory.mktemp("dry_run")
    done = subprocess.run(command(folder), capture_output=True, text=True, env=environ(folder))
    assert done.returncode == 1, done.stderr[-3000:]  # because tasks fail
    assert {file.name for file in (folder / "new").iterdir()} == FILES
    results = json.loads((folder / "new/results.json").read_text())
    assert (folder / "new/results.md").read_text() == gpu_report.text(results)
    print(done.stdout)
    return results


def test_failures_are_recorded_and_the_other_tasks_run(dry_run):
    problems = {name: item["problems"] for name, item in dry_run["items"].items() if item["problems"]}
    for task, expected in FAILURES.items():
        assert problems["fails"][task].startswith(expected), problems["fails"][task]
    assert "before the crash" in dry_run["checks"]
    ncu = problems.pop("7 hardware counters", {})
    assert set(problems) == {"fails"}, problems
    assert ncu in ({}, {"counters": "RuntimeError: Nsight Compute (ncu) is not on this machine: no hardware counters"})
    names = [item.name for item in gpu.ITEMS]
    assert list(dry_run["items"]) == [*names[:4], "fails", *names[4:]]


def test_every_case_is_checked_and_measured(dry_run):
    cases = gpu_measure.cases(toy=True)
    assert set(dry_run["checks"]) == {*gpu_measure.first(True), "before the crash"}
    assert not any(map(gpu_report.check_note, dry_run["checks"].values()))
    with_compiler = {name for name in dry_run["cases"] if name.endswith(COMPILED)}
    assert {name.removesuffix(COMPILED) for name in with_compiler} == {"dino_loss bfloat16", "dino_head_loss bfloat16"}
    assert set(dry_run["cases"]) - with_compiler == set(cases)
    for rows in [*dry_run["cases"].values(), *dry_run["variants"].values()]:
        assert rows[0]["provider"] == OURS and "reference" in [row["provider"] for row in rows]
        for row in rows:
            if row["provider"] in GPU_ONLY or (row["provider"] == CUDA_CPP and not compiled_archs()):
                assert row["note"].startswith("not available: ")
            else:
                assert not row["note"] and row["ms"] > 0, row
                assert max(row["errors"].values()) < 0.05, row  # 16-bit dtypes compared with float64
    assert all(rows[0]["bitwise"] for rows in dry_run["cases"].values())
    (variants,) = dry_run["variants"].values()
    assert [row["provider"] for row in variants] == [OURS, "reference", *gpu_measure.launches_of("dino_loss"), CUDA_CPP]


def test_whole_steps_and_their_profile(dry_run):
    steps = dry_run["steps"]
    assert set(steps["ViT-S/16"]) == {PLAIN, OURS, "reference", "stock"} and OURS in steps["ViT-B/16"]
    for row in [*steps["ViT-S/16"].values(), *steps["ViT-B/16"].values()]:
        assert len(row["losses"]) == 12 and row["ms"] > 0 and not row["note"]
    captured = {provider for provider, row in steps["ViT-S/16"].items() if row["captured"]}
    assert captured == {OURS} and steps["ViT-S/16"][OURS]["from_plain"] < 1e-6  # on the test double of a GPU
    assert any(row["kernel"] == "dino_kernels::adamw_ema_step_" for row in dry_run["profile"]["rows"])


def test_the_trainer_is_stopped_and_resumed(dry_run):
    start, resume = dry_run["training"]["start"], dry_run["training"]["resume"]
    assert 14 <= start["steps"] < 20 and resume["steps"] == 30
    assert min(start["images_per_s"], resume["images_per_s"]) > 0
    assert [e["step"] for e in start["evaluations"] + resume["evaluations"]] == [0, 10, 20, 30]
    assert "knn10" in start["evaluations"][0]


def test_kernels_are_compiled_first_and_tests_run_last(dry_run):
    assert dry_run["compiled"]["ema_update ViT-S"]["kernels"] >= 1
    assert {"stock, ViT-S/16", "peers of dino_loss bfloat16"} < set(dry_run["compiled"])
    outcomes = {file: {t["outcome"] for t in tests.values()} for file, tests in dry_run["tests"].items()}
    assert outcomes == {"test_bias_gelu.py": {"passed"}, "test_gpu.py": {"skipped"}}


def test_every_target_names_a_case_and_providers_that_exist(dry_run):
    results = json.loads(json.dumps(dry_run))  # as if measured on a GPU
    results["header"] |= {"device": "cuda", "toy": False, "gpu": "NVIDIA H200"}
    results["steps"]["ViT-B/16"] = {**results["steps"]["ViT-S/16"], **results["steps"]["ViT-B/16"]}
    first, second = (f"dino_loss {dtype}{COMPILED}" for dtype in ("bfloat16", "float16"))
    results["cases"][second] = results["cases"][first]
    for rows in results["cases"].values():
        for row in rows:
            row |= {"peak_mib": 2.0, "kept_mib": 1.0, "waits": False}
    for part in gpu_targets.target_parts(list(results["cases"])):
        assert gpu_targets.verdict(part, results)[1] in ("met", "not met"), part


def test_items_take_nine_minutes_at_most():
    assert sum(item.seconds for item in gpu.ITEMS) + 15 <= 9 * 60


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_keeps_its_results_and_leaves_no_process(tmp_path, signum):
    run = subprocess.Popen(command(tmp_path, "only-hang"), stdout=subprocess.DEVNULL, env=environ(tmp_path))
    log = tmp_path / "new/log.txt"
    waited(lambda: log.exists() and "hangs: " in log.read_text())
    run.send_signal(signum)
    run.wait()
    child = int(log.read_text().partition("hangs: ")[2].split()[0])
    waited(lambda: not is_running(child))
    results = json.loads((tmp_path / "new/results.json").read_text())
    assert results["ceilings"]["copy_bytes_per_s"] > 0 and list(results["items"]) == ["ceilings"]
    assert {file.name for file in (tmp_path / "new").iterdir()} <= FILES | {".half-written"}


def waited(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_tasks_without_time_are_skipped_and_a_hanging_task_is_killed_with_its_children(tmp_path):
    log, records = tmp_path / "log", []
    tasks = [
        gpu.Task("a", "gpu_failures.hang"),
        gpu.Task("b", "gpu_failures.crash"),
        gpu.Task("c", "gpu_failures.none"),
    ]
    deadline = time.time() + 5
    problems = gpu.run_tasks(tasks, at_once=1, deadline=deadline, log=log, take=records.append)
    assert time.time() < deadline + 10
    assert problems.keys() == {"a", "b", "c"} and records == []
    assert problems["a"].startswith("no result within 5 s") and problems["b"] == "skipped: the time was spent"
    group = int(log.read_text().partition("hangs: ")[2].split()[0])
    waited(lambda: not any(group_of(pid) == group for pid in os.listdir("/proc") if pid.isdigit()))
    problems = gpu.run_tasks(tasks[2:], at_once=1, deadline=time.time() + 60, log=log, take=records.append)
    assert problems == {"c": "AttributeError: module 'gpu_failures' has no attribute 'none'"}


def group_of(pid: str) -> int:
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
        return 0 if state == "Z" else int(group)
    except (FileNotFoundError, ProcessLookupError):
        return 0


@pytest.mark.parametrize("device, method", [("cpu", "forkserver"), ("nowhere", "spawn")])
def test_processes_are_spawned_if_the_device_fails_after_fork(tmp_path, monkeypatch, device, method):
    monkeypatch.setattr(gpu_run, "_context", gpu_run._context)
    gpu_run.prepare(device, tmp_path / "log")
    assert gpu_run._context.get_start_method() == method
    records, task = [], gpu.Task("ceilings", "gpu_measure.ceilings", ("cpu", True))
    log = tmp_path / "log"
    assert not gpu.run_tasks([task], at_once=1, deadline=time.time() + 60, log=log, take=records.append)
    assert records[0]["ceilings"]["copy_bytes_per_s"] > 0
    assert ("Expected one of cpu" in log.read_text()) is (method == "spawn")


def test_on_a_gpu_it_builds_first_and_detects_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = {"nvidia-smi": "580.1\n580.1", "git": "abc", sys.executable: "9 0 NVIDIA H200"}
    monkeypatch.setattr(gpu, "output_of", lambda *command: said[command[0]])
    done = []
    monkeypatch.setattr(gpu, "build", lambda log: done.append("build") or "done, 5 s")
    monkeypatch.setattr(gpu, "prepare", lambda device, log: done.append(device))
    monkeypatch.setattr(gpu, "run", lambda options, results, started: done.append((options.where, options.arch)))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path)])
    assert gpu.main() == 0
    assert done == ["build", "cuda", (("cuda", False), 90)]
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [*gpu.PATHS, "mine"]
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# Kernels on NVIDIA H200\n")
    assert "* driver: 580.1\n" in text and "* build: done, 5 s" in text and "* commit: abc" in text


def test_a_failed_build_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "describe", lambda device, toy: {"device": device, "gpu": "x", "toy": toy})
    monkeypatch.setattr(gpu, "build", lambda log: "failed, see log.txt, 5 s")
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("nothing can run"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path)])
    assert gpu.main() == 1
    assert "* build: failed, see log.txt, 5 s" in (tmp_path / "results.md").read_text()


def test_status_of_a_build(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for source, expected in (("print('built')", "done, "), ("raise SystemExit(3)", "failed, see log.txt, ")):
        (tmp_path / "setup.py").write_text(source)
        assert gpu.build(tmp_path / "log").startswith(expected)
    (tmp_path / "setup.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "BUILD_SECONDS", 1)
    assert gpu.build(tmp_path / "log") == "failed: not complete after 1 s, see log.txt"
    assert "built" in (tmp_path / "log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_reported(tmp_path):
    done = subprocess.run([sys.executable, gpu.__file__, "--output", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device. For a dry run without one: --toy --device cpu" in done.stderr


def test_every_failure_has_a_task():
    assert {task.name for task in gpu_failures.tasks()} == set(FAILURES)
