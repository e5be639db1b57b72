"""Whole steps of `make gpu`: verdicts and compared losses."""

import gpu_report
import gpu_steps
import gpu_targets
import pytest
from gpu_report import OURS, PLAIN
from test_gpu_report import results_of, step_row


def step_verdicts(rows, gpu_name="NVIDIA H100"):
    results = results_of(gpu=gpu_name) | {"steps": {"ViT-S/16": rows}}
    gpu_report.finish(results, {"steps": {"ViT-S/16": rows}})
    parts = [part for part in gpu_targets.target_parts([]) if part.target == "S1"]
    assert [(p.case, p.limit) for p in parts] == [
        *(("step ViT-S/16", limit) for limit in (20, 3, 1.5, 0.5)),
        *(("step ViT-B/16", limit) for limit in (60, 2, 1.3, 0.5)),
    ]
    assert all(gpu_targets.verdict(part, results)[1] == "not measured: not reached" for part in parts[4:])
    return [gpu_targets.verdict(part, results) for part in parts[:4]], "\n".join(
        gpu_report.step_lines(results["steps"])
    )


def peers():
    return {"reference": step_row(40.0, 250.0), "stock": step_row(14.0)}


def test_targets_of_a_whole_step():
    rows = {OURS: step_row(captured=True), **peers()}
    verdicts, table = step_verdicts(rows)
    assert verdicts == [("10", "not judged: valid for H200 only"), ("4", "met"), ("1.4", "not met"), ("0.4", "met")]
    assert "| ViT-S/16 | reference | 1600 | 40 | 39 | 45 | 250 | 10.5 | - |  |" in table
    assert f"| ViT-S/16 | {OURS} | 6400 | 10 | 9 | 15 | 100 | 10.5 | - | a CUDA graph |" in table
    assert step_verdicts(rows, gpu_name="NVIDIA H200")[0][0] == ("10", "met")


@pytest.mark.parametrize(
    "mine, expected",
    [
        ({"losses": [float("nan")] * 2}, "not met: wrong values: a loss of nan, not 10.5"),
        ({"losses": [9.0, 9.0]}, "not met: wrong values: a loss of 9, not 10.5"),
        ({"captured": False}, "not met: not captured as a graph: these are plain calls, see the log"),
    ],
)
def test_a_wrong_step_meets_no_target(mine, expected):
    verdicts, table = step_verdicts({OURS: step_row(**{"captured": True, **mine}), **peers()})
    assert verdicts == [("-", expected)] * 4 and expected.partition(": ")[2] in table


@pytest.mark.parametrize(
    "losses, note",
    [
        ((11.0, 10.0), ""),
        ((11.0, 10.0005), ""),
        ((11.0, 10.1), "wrong values: losses 1.0e-02 off those of plain calls"),
        ((11.0, float("nan")), "wrong values: losses inf off those of plain calls"),
    ],
)
def test_each_loss_of_the_graph_equals_that_of_plain_calls(losses, note):
    rows = {PLAIN: step_row(), OURS: step_row(losses=losses, captured=True)}
    gpu_report.mark_steps(rows, "cuda")
    assert rows[OURS]["note"] == note and rows[PLAIN]["note"] == ""


def test_toy_steps_of_all_providers_on_the_cpu():
    sent = []
    for provider in gpu_steps.PROVIDERS:
        gpu_steps.measure_step(sent.append, "ViT-S/16", provider, "cpu", toy=True)
    rows = {name: row for message in sent for name, row in message["steps"]["ViT-S/16"].items()}
    assert list(rows) == list(gpu_steps.PROVIDERS)
    for row in rows.values():
        assert row["ms"] > 0 and len(row["losses"]) == gpu_steps.LOSSES
        assert row["losses"] == pytest.approx(rows["reference"]["losses"], rel=0.05)  # drop path differs
