"""bench/gpu.py without a GPU: its arithmetic, its verdicts, its cases at toy sizes, and what it survives."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_cases
import gpu_report
import gpu_steps
import pytest
import torch
from dino_train.model import build_model
from gpu_report import OURS
from gpu_setting import TOY, Case, Sizes

CEILINGS = {"copy_bytes_per_s": 4.3e12, "bf16_flops_per_s": 790e12}  # of an H200
HEADER = {"device": "cuda", "gpu": "NVIDIA H200", "toy": False}
GPU_ONLY = ("SDPA cudnn", "SDPA efficient", "varlen_attn", "add + Liger layer norm")
CASES = gpu_cases.all_cases(TOY)


def row(provider=OURS, ms=1.0, note="", error=1e-3, **values):
    times = [] if ms is None else [ms - 0.1, ms, 9 * ms]
    fixed = {"op": "op", "shape": "[1]", "dtype": "bfloat16", "bytes": 4.3e9, "flops": 0, "host_ms": 0.1}
    fixed |= {"peak_mib": 100.0, "kept_mib": 40.0, "waits": False, "bitwise": True, "errors": {"out": error}}
    return {**fixed, "provider": provider, "times": times, "note": note, **values}


def step_row(provider, ms=10.0, peak_mib=100.0, losses=(11.0, 10.0), note=""):
    row = {"provider": provider, "ms": ms, "images_per_s": 64e3 / ms, "peak_mib": peak_mib}
    return {**row, "all_step_ms": [ms - 1, ms, ms + 5], "losses": list(losses), "note": note}


def results_of(*rows, case="case", **header):
    cases = {case: {"rows": gpu_report.finish_rows(list(rows), CEILINGS), "problem": ""}}
    results = {"header": {**HEADER, **header}, "build": "done", "tests": [], "ceilings": CEILINGS}
    return {**results, "cases": cases, "steps": {}}


def judge(part, *rows, **header):
    return gpu_report.verdict(part, results_of(*rows, **header))


# --- arithmetic and verdicts -------------------------------------------------------------------------


def test_floors_are_those_of_the_design():
    reference = Sizes()
    rows, teachers = reference.views * reference.images, 2 * reference.images
    loss = (2 * rows + teachers) * reference.outputs * 2
    assert gpu_report.floor_ms(loss, 0, CEILINGS) == pytest.approx(0.043, abs=5e-4)
    head = 6 * (rows + teachers) * reference.outputs * reference.bottleneck
    assert gpu_report.floor_ms(0, head, CEILINGS) == pytest.approx(0.098, abs=5e-4)


@pytest.mark.parametrize("arch, sizes", [("vit_small", Sizes()), ("vit_base", Sizes().base())])
def test_the_updates_are_those_of_the_trainers_nets(arch, sizes):
    settings = {"patch_size": 16, "out_dim": 65536, "img_size": 224, "drop_path_rate": 0.0}
    with torch.device("meta"):
        net = build_model(arch, **settings, use_bn_in_head=False, norm_last_layer=True)
    trained = [tuple(p.shape) for p in net.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(gpu_cases.parameter_shapes(sizes))


@pytest.mark.parametrize(
    "name, moved, flops",
    [
        ("dino_loss bfloat16", (8 + 8 + 4) * 200 * 2 + 8 * 200, 0),
        ("dino_head_loss bfloat16", ((8 + 8 + 4) * 16 + 3 * 200 * 16) * 2 + 8 * 200, 6 * 12 * 200 * 16),
        ("attention packed 6 heads forward", 4 * 2 * 32 * (4 * 9 + 4 * 5), 4 * 32 * (4 * 9**2 + 4 * 5**2)),
        ("attention packed 6 heads backward", 8 * 2 * 32 * (4 * 9 + 4 * 5), 10 * 32 * (4 * 9**2 + 4 * 5**2)),
    ],
)
def test_bytes_and_flops_of_cases(name, moved, flops):
    case = CASES[name]("cpu")
    assert (case.bytes, case.flops) == (moved, flops)


def test_rows_get_median_floor_and_percent():
    (done,) = gpu_report.finish_rows([row(ms=2.0)], CEILINGS)
    assert (done["ms"], done["rounds"]) == (2.0, 3)
    assert done["floor_ms"] == pytest.approx(1.0) and done["percent_of_floor"] == pytest.approx(50)
    (by_flops,) = gpu_report.finish_rows([row(flops=790e9 * 3)], CEILINGS)
    assert by_flops["floor_ms"] == pytest.approx(3.0)


P = gpu_report.Part


@pytest.mark.parametrize(
    "part, expected",
    [
        (P("", "case", "", 1.0, gpu_report.time(), at_most=True), ("1", "met")),
        (P("", "case", "", 0.9, gpu_report.time(), at_most=True), ("1", "not met")),
        (P("", "case", "", 3, gpu_report.speedup("reference")), ("4", "met")),
        (P("", "case", "", 2.1, gpu_report.speedup("SDPA")), ("2", "not met")),
        (P("", "case", "", 2, gpu_report.speedup("nobody")), ("-", "not measured: no peer ran")),
        (P("", "case", "", 2, gpu_report.speedup("absent")), ("-", "not measured: no peer ran")),
        (P("", "case", "", 1.5, gpu_report.floors, at_most=True), ("1", "met")),
        (P("", "case", "", 85, gpu_report.share_of_bandwidth), ("100", "met")),
        (P("", "case", "", 62, gpu_report.workspace(OURS), at_most=True), ("62.9", "not met")),
        (P("", "case", "", 0, gpu_report.waits, at_most=True), ("0", "met")),
        (P("", "case", "", 1, gpu_report.repeats), ("1", "met")),
        (P("", "case", "", 10_000, gpu_report.rate(256)), ("2.56e+05", "met")),
        (P("", "case", "", 1, gpu_report.excess_error, at_most=True), ("0.5", "met")),
        (P("", "other", "", 1, gpu_report.floors), ("-", "not measured: not reached")),
        (P("", "case", "", 0.5, gpu_report.share_of_peak("reference"), at_most=True), ("1", "not met")),
        (P("", "case", "", 0.5, gpu_report.share_of_peak("absent"), at_most=True), ("-", "not measured: no peer ran")),
    ],
)
def test_verdicts(part, expected):
    peers = [row("reference", 4.0, error=2e-3), row("SDPA flash", 2.0), row("SDPA math", 9.0)]
    absent = row("absent", None, "not available: ImportError: x", errors={})
    assert judge(part, row(), *peers, absent) == expected


def test_absolute_times_are_judged_on_an_h200_only():
    part = P("", "case", "", 2, gpu_report.time(), at_most=True, h200=True)
    assert judge(part, row()) == ("1", "met")
    assert judge(part, row(), gpu="NVIDIA H100 80GB HBM3") == ("1", "not judged: written for H200")


@pytest.mark.parametrize("header, text", [({"device": "cpu"}, "on a GPU"), ({"toy": True}, "toy sizes")])
def test_a_trial_run_is_never_taken_for_a_result(header, text):
    results = results_of(row(), row("reference", 50.0), case="dino_loss bfloat16", **header)
    lines = gpu_report.header_lines(results)
    assert lines[0].startswith("# NOT A GPU RESULT")
    targets = "\n".join(gpu_report.target_lines(results))
    assert text in targets and "| met |" not in targets and "| not met |" not in targets


def test_wrong_values_win_nothing():
    wrong = row(ms=0.1, error=0.2)
    results = results_of(wrong, row("reference", 4.0))
    assert wrong["note"] == "wrong values: out off by 2.0e-01"
    part = P("", "case", "", 3, gpu_report.speedup("reference"))
    assert gpu_report.verdict(part, results) == ("-", f"not met: {wrong['note']}")
    peer = row("reference", 4.0), row("SDPA flash", 0.1, error=float("nan"))
    part = P("", "case", "", 3, gpu_report.speedup("SDPA"))
    assert judge(part, row(), *peer) == ("-", "not measured: no peer ran")


def test_tables_and_plot(tmp_path, monkeypatch):
    results = results_of(row(), row("reference", None, "not available: a | b\nc", errors={}))
    results["cases"]["lost"] = {"rows": [], "problem": "skipped: the time was spent"}
    results["tests"] = [
        {"file": "test_x.py", "passed": 3, "failed": 1, "skipped": 0, "seconds": 2.0, "problems": ["test_a: no"]}
    ]
    gpu_report.write(tmp_path, results)
    text = (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "copy 4.3 TB/s" in text and "| test_x.py | 3 | 1 | 0 | 2 | test_a: no |" in text
    assert "not available: a \\| b c |" in text and "skipped: the time was spent |" in text
    assert "| 1 | 0.1 | 4300 | 0 | 1 | 100 | 100.0 | 40.0 | 1.0e-03 |" in text
    assert gpu_report.plot(tmp_path / "plot.png", results).startswith("plot: ")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert gpu_report.plot(tmp_path / "none.png", results).startswith("no plot: ")


# --- cases at toy sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_all_providers_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(gpu, "MOST_ROUNDS", 1)
    rows = gpu_report.finish_rows(gpu.measure(CASES[name], "cpu", gpu.HostTimer()), CEILINGS)
    assert rows[0]["provider"] == OURS and rows[0]["bitwise"]
    assert any(row["provider"] == "reference" for row in rows)
    for row in rows:
        if row["provider"] in GPU_ONLY:
            assert row["note"].startswith("not available: ")
        else:
            assert not row["note"] and row["ms"] > 0, row
            assert max(row["errors"].values()) < 0.05, row  # against float64, in 16 bits


def test_a_provider_with_other_values_or_an_error_is_noted():
    def fails():
        raise ImportError("no such\nthing")

    x = torch.ones(3)
    providers = {OURS: lambda: (x,), "reference": lambda: ([x[:1], x[1:]],), "off": lambda: (1.01 * x,), "bad": fails}
    case = Case("op", "[3]", "float32", 24, 0, ("out",), providers, exact=lambda: (x.double(),))
    rows = gpu_report.finish_rows(gpu.measure(lambda device: case, "cpu", gpu.HostTimer()), CEILINGS)
    notes = {row["provider"]: row["note"] for row in rows}
    assert notes[OURS] == notes["reference"] == ""
    assert notes["off"].startswith("wrong values: out off by 1.0e-02")
    assert notes["bad"] == "not available: ImportError: no such"


def test_every_target_names_a_case_and_providers_that_exist(monkeypatch):
    monkeypatch.setattr(gpu, "MOST_ROUNDS", 1)
    monkeypatch.setattr(gpu.HostTimer, "memory", lambda self, call: {"peak_mib": 2.0, "kept_mib": 1.0})
    monkeypatch.setattr(gpu.HostTimer, "waits", lambda self, call: False)
    results = results_of()
    parts = gpu_report.target_parts(list(CASES))
    rows = [step_row(provider) for provider in gpu_steps.PROVIDERS]
    results["steps"] = {case: {"rows": rows, "problem": ""} for case in gpu_steps.NETS}
    for name in {part.case for part in parts} - set(gpu_steps.NETS):
        rows = gpu.measure(CASES[name], "cpu", gpu.HostTimer())
        results["cases"][name] = {"rows": gpu_report.finish_rows(rows, CEILINGS), "problem": ""}
    for part in parts:
        assert gpu_report.verdict(part, results)[1] in ("met", "not met"), part


# --- the timer of a GPU, on one that only keeps a diary ------------------------------------------------


class FakeCuda:
    """As much of torch.cuda as the timer uses. Memory in use follows a list; each "event" takes 3 ms."""

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
    timer = gpu.DeviceTimer(cuda, "cpu")
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


def test_a_run_on_a_gpu_builds_and_tests_first(tmp_path, monkeypatch):
    test = {"file": "test_x.py", "passed": 3, "failed": 1, "skipped": 0, "seconds": 2.0, "problems": ["test_a: no"]}
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "build", lambda folder: "done, 5 s")
    monkeypatch.setattr(gpu, "run_tests", lambda files, folder, seconds: [test])
    monkeypatch.setattr(gpu, "run_cases", lambda folder, arguments, deadline: asked.append((arguments, deadline)))
    steps = []
    monkeypatch.setattr(gpu_steps, "measure_steps", lambda *arguments: steps.append(arguments[2] - time.time()))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path)])
    assert gpu.main() == 1  # a test failed
    ((arguments, deadline),) = asked
    assert arguments == ["--device", "cuda"] and 0 < deadline - time.time() <= gpu.TOTAL_SECONDS < 9 * 60
    assert steps[0] <= gpu.STEP_SECONDS < steps[1] <= gpu.TOTAL_SECONDS  # once more with what the cases left
    text = (tmp_path / "results.md").read_text()
    assert "* build: done, 5 s" in text and "test_a: no" in text and "not measured: not reached" in text
    monkeypatch.setattr(gpu, "build", lambda folder: "failed, see build.log")
    assert gpu.main() == 1 and len(asked) == 1
    assert "failed, see build.log" in (tmp_path / "results.md").read_text()


# --- what a run survives -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    results = {"header": {**HEADER, "device": "cpu"}, "build": "", "tests": [], "ceilings": None}
    results |= {"cases": {}, "steps": {}}
    gpu_report.write(tmp_path, results)
    return tmp_path


def cases_in(folder):
    return json.loads((folder / "results.json").read_text())["cases"]


def test_a_failing_case_and_a_spent_budget_cost_only_themselves(folder, monkeypatch):
    def broken(device):
        raise RuntimeError("out of luck")

    cases = {"broken": broken, "good": CASES["ema_update ViT-S"], "late": CASES["ema_update ViT-S"]}
    monkeypatch.setattr(gpu_cases, "all_cases", lambda sizes: {name: cases[name] for name in ("broken", "good")})
    gpu.work(folder, "cpu", toy=True, deadline=time.time() + 100)
    monkeypatch.setattr(gpu_cases, "all_cases", lambda sizes: cases)
    gpu.work(folder, "cpu", toy=True, deadline=time.time() + 1)  # goes on where the other ended
    found = cases_in(folder)
    assert found["broken"]["problem"] == "failed: RuntimeError: out of luck"
    assert len(found["good"]["rows"]) == 3
    assert found["late"] == {"rows": [], "problem": "skipped: the time was spent"}


def test_a_process_that_dies_is_followed_by_another(folder, monkeypatch):
    commands = []

    def dies_in_the_first_case(command, **options):
        commands.append(command)
        results = json.loads((folder / "results.json").read_text())
        results["cases"][f"case {len(commands)}"] = {"rows": [], "problem": "the process died"}
        if len(commands) == 2:
            results["complete"] = True
        gpu_report.write(folder, results)

    monkeypatch.setattr(subprocess, "run", dies_in_the_first_case)
    gpu.run_cases(folder, ["--device", "cpu"], time.time() + 60)
    assert len(commands) == 2 and list(cases_in(folder)) == ["case 1", "case 2"]
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    results = json.loads((folder / "results.json").read_text())
    del results["complete"]
    gpu_report.write(folder, results)
    gpu.run_cases(folder, [], time.time() + 60)  # one that never gets to a case is not tried forever
    assert len(commands) == 3


def test_the_time_limit_reaches_into_a_call():
    with pytest.raises(TimeoutError, match="not ready after 0 s"), gpu.time_limit(0.05):
        time.sleep(10)
    with gpu.time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing is left ticking


def test_test_files_that_fail_or_hang_are_counted(tmp_path):
    files = {
        "test_mixed.py": "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'wrong sum'\n"
        "@pytest.mark.skip\ndef test_later(): pass\n@pytest.mark.parametrize('device', ['cpu'])\n"
        "def test_elsewhere(device): assert False\n",
        "test_hangs.py": "import time\ndef test_hang(): time.sleep(100)\n",
        "test_broken.py": "import no_such_module\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    started = time.time()
    mixed, hangs, broken = gpu.run_tests([tmp_path / name for name in files], tmp_path, seconds=8)
    assert time.time() - started < 30
    assert (mixed["passed"], mixed["failed"], mixed["skipped"]) == (1, 1, 1)
    assert mixed["problems"][0].startswith("test_bad: AssertionError: wrong sum")
    assert hangs["failed"] == 1 and "see test_hangs.log" in hangs["problems"][0]
    assert broken["failed"] == 1 and broken["passed"] == 0
    assert "test_hang" in (tmp_path / "test_hangs.log").read_text()


def test_the_tests_of_all_ops_are_found():
    names = {file.name for file in gpu.test_files()}
    assert {"test_dino_loss.py", "test_attention.py", "test_ema_update.py", "test_gpu.py"} <= names
    assert "test_train.py" not in names


def test_a_whole_trial_run_without_the_trainers_libraries(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(('tyro', 'tqdm', 'safetensors')))\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, Path(gpu.__file__), "--toy", "--device", "cpu", "--output", tmp_path / "new"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "new/results.json").read_text())
    assert results["header"]["device"] == "cpu" and list(results["cases"]) == list(CASES)
    assert all(case["rows"] for case in results["cases"].values())
    for case in gpu_steps.NETS:
        rows = results["steps"][case]["rows"]
        assert [row["provider"] for row in rows] == list(gpu_steps.PROVIDERS)
        assert not any(row["note"] for row in rows) and min(row["ms"] for row in rows) > 0, rows
    text = (tmp_path / "new/results.md").read_text()
    assert text.startswith("# NOT A GPU RESULT") and "not measured on a GPU" in text and "| met |" not in text
    assert (tmp_path / "new/results.png").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([sys.executable, gpu.__file__, "--output", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device here. A trial run without one: --toy --device cpu" in done.stderr
