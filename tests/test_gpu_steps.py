"""The whole steps of `make gpu`: their targets, their order, and what becomes of one that fails."""

import json
import os
import time

import gpu_report
import gpu_steps
import pytest
from gpu_report import OURS
from test_gpu_report import results_of, step_row


def step_verdicts(*rows, gpu_name="NVIDIA H100"):
    results = results_of(gpu=gpu_name)
    gpu_report.mark_wrong_losses(list(rows))
    results["steps"] = {"step ViT-S/16": {"rows": list(rows), "problem": ""}}
    parts = [part for part in gpu_report.target_parts([]) if part.target == "S1"]
    assert [(p.case, p.limit) for p in parts] == [
        *(("step ViT-S/16", limit) for limit in (20, 3, 1.5, 0.5)),
        *(("step ViT-B/16", limit) for limit in (60, 2, 1.3, 0.5)),
    ]
    assert all(gpu_report.verdict(part, results)[1] == "not measured: not reached" for part in parts[4:])
    return [gpu_report.verdict(part, results) for part in parts[:4]], "\n".join(gpu_report.step_lines(results["steps"]))


def test_targets_of_a_whole_step():
    reference, stock = step_row("reference", 40.0, 250.0), step_row("stock", 14.0)
    verdicts, table = step_verdicts(step_row(OURS), reference, stock)
    assert verdicts == [("10", "not judged: written for H200"), ("4", "met"), ("1.4", "not met"), ("0.4", "met")]
    assert "| step ViT-S/16 | reference | 1600 | 40 | 39 | 45 | 250 | 10.5 |  |" in table
    assert step_verdicts(step_row(OURS), reference, stock, gpu_name="NVIDIA H200")[0][0] == ("10", "met")


@pytest.mark.parametrize(
    "mine, expected",
    [
        ({"losses": [float("nan")] * 2}, "not met: wrong values: a loss of nan, not 10.5"),
        ({"losses": [9.0, 9.0]}, "not met: wrong values: a loss of 9, not 10.5"),
        ({"losses": [], "note": "not available: RuntimeError: x"}, "not met: not available: RuntimeError: x"),
        ({"losses": [], "note": "skipped: the time was spent"}, "not measured: skipped: the time was spent"),
    ],
)
def test_a_step_that_failed_meets_nothing_and_a_skipped_one_is_not_judged(mine, expected):
    verdicts, table = step_verdicts(step_row(OURS, **mine), step_row("reference", 40.0), step_row("stock"))
    assert verdicts == [("-", expected)] * 4 and expected.partition(": ")[2] in table


def test_steps_are_added_in_the_order_of_importance_and_only_once(tmp_path, monkeypatch):
    asked = []

    def measured(options, name, folder, seconds, env):
        asked.append((options[1], name))
        assert seconds <= gpu_steps.PROVIDER_SECONDS and options[-4:] == ["--device", "cuda", "--providers", name]
        if name == "stock" and len(asked) < 7:
            return {"note": "skipped: the time was spent"}
        return {"ms": 20.0, "peak_mib": 1.0, "losses": [11.0]}

    monkeypatch.setattr(gpu_steps, "measure_step", measured)
    results = results_of()
    for _ in range(3):
        gpu_steps.measure_steps(tmp_path, results, time.time() + 200, {})
        results = json.loads((tmp_path / "results.json").read_text())
    nets = ("vit_small", "vit_base")
    order = [(net, name) for name in ("ours", "reference", "stock") for net in nets]
    assert asked == order + order[4:]  # the skipped ones again, and nothing a third time
    for step in results["steps"].values():
        assert [row["ms"] for row in step["rows"]] == [20.0] * 3


def test_a_step_that_fails_hangs_or_comes_too_late_is_noted(tmp_path, monkeypatch):
    script = tmp_path / "bench.py"
    monkeypatch.setattr(gpu_steps, "BENCH", script)

    def note(text, seconds=60):
        script.write_text(text)
        return gpu_steps.measure_step(["--arch", "x"], "ours", tmp_path, seconds, dict(os.environ))["note"]

    two_lines = "raise RuntimeError('CUDA error: out of luck\\nsome advice')"
    assert note(two_lines) == "not available: RuntimeError: CUDA error: out of luck"
    assert note("import sys; sys.exit('ours failed, see above')") == "not available: ours failed, see above"
    assert note("import os; os.abort()") == "not available: no message"
    assert note("", seconds=10) == "skipped: the time was spent"
    monkeypatch.setattr(gpu_steps, "LEAST_SECONDS", 0)
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.time()
    assert note(hangs, seconds=2) == "skipped: no result after 2 s, see steps.log"
    assert time.time() - started < 20  # and with it ended what it had started, which held its output
    assert "out of luck\nsome advice" in (tmp_path / "steps.log").read_text()
