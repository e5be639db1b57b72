"""Computed values, verdicts and output files of bench/gpu/gpu.py."""

import json

import gpu
import gpu_report
import gpu_targets
import op_cases
import pytest
from dino_train.models.vit import build_model
from gpu_report import COMPILED, OURS, PLAIN
from PIL import Image
from setting import TOY, Sizes

CEILINGS = {"copy_bytes_per_s": 4.3e12, "bf16_flops_per_s": 790e12}  # of an H200
HEADER = {"device": "cuda", "gpu": "NVIDIA H200", "toy": False}


def row(provider=OURS, ms=1.0, note="", error=1e-3, **values):
    times = [] if ms is None else [ms - 0.1, ms, 9 * ms]
    fixed = {"op": "op", "shape": "[1]", "dtype": "bfloat16", "bytes": 4.3e9, "flops": 0, "host_ms": 0.1}
    fixed |= {"peak_mib": 100.0, "kept_mib": 40.0, "waits": False, "bitwise": True, "errors": {"out": error}}
    return {**fixed, "provider": provider, "times": times, "note": note, **values}


def results_of(*rows, case="case", ceilings=CEILINGS, **header):
    results = gpu_report.empty({**HEADER, **header}) | {"ceilings": ceilings}
    gpu.merge(results, {"cases": {case: list(rows)}})
    gpu_report.finish(results, {"cases": {case: None}})
    return results


def judge(part, *rows, **header):
    return gpu_targets.verdict(part, results_of(*rows, **header))


def test_floors_are_those_of_the_design():
    reference = Sizes()
    rows, teachers = reference.views * reference.images, 2 * reference.images
    loss = (2 * rows + teachers) * reference.outputs * 2
    assert gpu_report.floor_ms(loss, 0, CEILINGS) == pytest.approx(0.043, abs=5e-4)
    head = 6 * (rows + teachers) * reference.outputs * reference.bottleneck
    assert gpu_report.floor_ms(0, head, CEILINGS) == pytest.approx(0.098, abs=5e-4)


@pytest.mark.parametrize("arch, sizes", [("vit_small", Sizes()), ("vit_base", Sizes().base())])
def test_update_cases_have_the_parameters_of_the_trainer(arch, sizes):
    import torch

    settings = {"patch_size": 16, "out_dim": 65536, "img_size": 224, "drop_path_rate": 0.0}
    with torch.device("meta"):
        net = build_model(arch, **settings, use_bn_in_head=False, norm_last_layer=True)
    trained = [tuple(p.shape) for p in net.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(op_cases.parameter_shapes(sizes))


@pytest.mark.parametrize(
    "name, moved, flops",
    [
        ("dino_loss bfloat16", (8 + 8 + 4) * 200 * 2 + 8 * 200, 0),
        ("dino_head_loss bfloat16", ((8 + 8 + 4) * 16 + 3 * 200 * 16) * 2 + 8 * 200, 6 * 12 * 200 * 16),
        ("attention packed 6 heads forward", 4 * 2 * 32 * (4 * 9 + 4 * 5), 4 * 32 * (4 * 9**2 + 4 * 5**2)),
        ("attention packed 6 heads backward", 8 * 2 * 32 * (4 * 9 + 4 * 5), 10 * 32 * (4 * 9**2 + 4 * 5**2)),
        ("mlp", 2 * (4 * 56 * 32 + 4 * 56 * 128), 12 * 56 * 32 * 128),
        ("linear", 2 * (3 * 56 * 32 + 2 * 56 * 96), 6 * 56 * 32 * 96),
        ("last layer", 2 * 8 * (200 + 16) + 10 * 200 * 16, 2 * 8 * 200 * 16),
    ],
)
def test_bytes_and_flops_of_cases(name, moved, flops):
    case = op_cases.first_cases(TOY)[name]("meta")
    assert (case.bytes, case.flops) == (moved, flops)


def test_rows_get_median_floor_and_percent():
    (done,) = gpu_report.finish_rows([row(ms=2.0)], CEILINGS)
    assert (done["ms"], done["rounds"]) == (2.0, 3)
    assert done["floor_ms"] == pytest.approx(1.0) and done["percent_of_floor"] == pytest.approx(50)
    (by_flops,) = gpu_report.finish_rows([row(flops=790e9 * 3)], CEILINGS)
    assert by_flops["floor_ms"] == pytest.approx(3.0)
    (unknown,) = gpu_report.finish_rows([row(ms=2.0)], None)
    assert unknown["ms"] == 2.0 and unknown["floor_ms"] is unknown["percent_of_floor"] is None


P = gpu_targets.Part


@pytest.mark.parametrize(
    "part, expected",
    [
        (P("", "case", "", 1.0, gpu_targets.time(), at_most=True), ("1", "met")),
        (P("", "case", "", 0.9, gpu_targets.time(), at_most=True), ("1", "not met")),
        (P("", "case", "", 3, gpu_targets.speedup("reference")), ("4", "met")),
        (P("", "case", "", 2.1, gpu_targets.speedup("SDPA")), ("2", "not met")),
        (P("", "case", "", 2, gpu_targets.speedup("nobody")), ("-", "not measured: no peer ran")),
        (P("", "case", "", 2, gpu_targets.speedup("absent")), ("-", "not measured: no peer ran")),
        (P("", "case", "", 1.5, gpu_targets.floors, at_most=True), ("1", "met")),
        (P("", "case", "", 85, gpu_targets.share_of_bandwidth), ("100", "met")),
        (P("", "case", "", 62, gpu_targets.workspace(OURS), at_most=True), ("62.9", "not met")),
        (P("", "case", "", 0, gpu_targets.waits, at_most=True), ("0", "met")),
        (P("", "case", "", 1, gpu_targets.repeats), ("1", "met")),
        (P("", "case", "", 10_000, gpu_targets.rate(256)), ("2.56e+05", "met")),
        (P("", "case", "", 1, gpu_targets.excess_error, at_most=True), ("0.5", "met")),
        (P("", "other", "", 1, gpu_targets.floors), ("-", "not measured: not reached")),
        (P("", "case", "", 0.5, gpu_targets.share_of_peak("reference"), at_most=True), ("1", "not met")),
        (P("", "case", "", 0.5, gpu_targets.share_of_peak("absent"), at_most=True), ("-", "not measured: no peer ran")),
    ],
)
def test_verdicts(part, expected):
    peers = [row("reference", 4.0, error=2e-3), row("SDPA flash", 2.0), row("SDPA math", 9.0)]
    absent = row("absent", None, "not available: ImportError: x", errors={})
    assert judge(part, row(), *peers, absent) == expected


def test_no_floor_is_judged_without_ceilings():
    part = P("", "case", "", 1.5, gpu_targets.floors, at_most=True)
    assert judge(part, row(), ceilings=None) == ("-", "not measured: no ceilings")


@pytest.mark.parametrize(
    "problem, expected",
    [
        ("skipped: the time was spent", "not measured: skipped: the time was spent"),
        ("no result within 60 s, see the log", "not measured: no result within 60 s, see the log"),
        ("died of SIGABRT, see the log", "not met: died of SIGABRT, see the log"),
        ("OutOfMemoryError: CUDA out of memory", "not met: OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_a_failed_task_meets_no_target_and_a_skipped_task_is_not_judged(problem, expected):
    for case, task in (("lost", "lost"), ("step ViT-S/16", f"ViT-S/16, {OURS}")):
        results = results_of(row())
        results["items"]["3"] = {"seconds": 1, "problems": {task: problem}}
        part = P("", case, "", 1, gpu_targets.time(), at_most=True)
        assert gpu_targets.verdict(part, results) == ("-", expected)
        assert gpu_report.failed(results)


def test_unreadable_counters_do_not_fail_the_run():
    results = results_of(row())
    results["items"]["7"] = {"seconds": 0, "problems": {"counters": "RuntimeError: no ncu"}}
    assert not gpu_report.failed(results)


def test_absolute_times_are_judged_on_an_h200_only():
    part = P("", "case", "", 2, gpu_targets.time(), at_most=True, h200=True)
    assert judge(part, row()) == ("1", "met")
    assert judge(part, row(), gpu="NVIDIA H100 80GB HBM3") == ("1", "not judged: valid for H200 only")


@pytest.mark.parametrize("header, text", [({"device": "cpu"}, "on a GPU"), ({"toy": True}, "toy sizes")])
def test_a_dry_run_is_marked_as_no_result(header, text):
    results = results_of(row(), row("reference", 50.0), case="dino_loss bfloat16", **header)
    assert gpu_report.text(results).startswith("# NOT A GPU RESULT")
    targets = "\n".join(gpu_report.target_lines(results))
    assert text in targets and "| met |" not in targets and "| not met |" not in targets


def test_wrong_values_meet_no_target():
    wrong = row(ms=0.1, error=0.2)
    results = results_of(wrong, row("reference", 4.0))
    assert wrong["note"] == "wrong values: out off by 2.0e-01"
    part = P("", "case", "", 3, gpu_targets.speedup("reference"))
    assert gpu_targets.verdict(part, results) == ("-", f"not met: {wrong['note']}")
    peer = row("reference", 4.0), row("SDPA flash", 0.1, error=float("nan"))
    part = P("", "case", "", 3, gpu_targets.speedup("SDPA"))
    assert judge(part, row(), *peer) == ("-", "not measured: no peer ran")


def test_a_launch_variant_with_wrong_values_is_marked():
    rows = [row(), row("reference", error=1e-3), row("twice", from_default={"out": 2e-3})]
    rows.append(row("half", from_default={"out": 5e-3}))
    notes = [r["note"] for r in gpu_report.finish_rows(rows, CEILINGS)]
    assert notes == ["", "", "", "wrong values, unlike the default: out off by 5.0e-03"]


def test_compiled_peers_are_compared_with_ours_of_the_same_run():
    part = next(p for p in gpu_targets.target_parts([]) if p.case == f"dino_loss bfloat16{COMPILED}")
    results = results_of(row(ms=1.0), row("compiled reference", 4.0), case=part.case)
    assert gpu_targets.verdict(part, results) == ("4", "met")
    assert not [p for p in gpu_targets.target_parts(list(results["cases"])) if p.target == "Q"]


def test_written_files(tmp_path):
    results = results_of(row(), row("reference", None, "not available: a | b\nc", errors={}))
    record = {
        "tests": {"test_x.py": {"test_a": {"outcome": "failed", "problem": "no"}}},
        "checks": {"op": {"errors": {"out": 1e-3}, "eager": {"out": 1e-4}, "bitwise": False}},
        "items": {"2 values": {"seconds": 3.0, "problems": {"mlp": "died of SIGSEGV"}}},
        "profile": {"rows": [{"kernel": "k", "count": 2.0, "us": 30.0}], "launches": 2.0, "us": 30.0},
        "training": {"start": {"steps": 60, "loss": 9.0, "images_per_s": 2000.0, "fastest_images_per_s": 2100.0}},
        "counters": [{"kernel": "_student_kernel", "launches": 1, "us": 50.0, "MB read": None}],
        "compiled": {"mlp": {"kernels": 3, "seconds": 1.0}},
        "steps": {"ViT-S/16": {PLAIN: step_row(20.0)}},
    }
    record["training"]["start"] |= {"data_wait": 0.01, "evaluations": [{"step": 24, "knn10": 50.0}], "seconds": 9.0}
    gpu.merge(results, record)
    gpu_report.finish(results, record)
    gpu_report.write(tmp_path, results)
    gpu_report.plot(tmp_path, results)
    text = (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for line in (
        "copy 4.3 TB/s",
        "| test_x.py | 0 | 1 | 0 | test_a: no |",
        "not available: a \\| b c |",
        "| 1 | 0.1 | 4300 | 0 | 1 | 100 | 100.0 | 40.0 | 1.0e-03 |",
        "| op | 1.0e-03 | 1.0e-04 | False | wrong values: out off by 1.0e-03, not repeatable |",
        "| 2 values | 3 | mlp: died of SIGSEGV |",
        "2 launches and 0.03 ms of kernels per step",
        "| k | 2 | 30.0 | 100.0 |",
        "| start | 60 | 9 | 2000 | 2100 | 0.01 | {'step': 24, 'knn10': 50.0} | 9.0 |",
        "| _student_kernel | 1 | 50 | - |",
        "compiled ahead: 3 kernels of 1 tasks",
        f"| ViT-S/16 | {PLAIN} | 3200 | 20 | 19 | 25 | 100 | 10.5 | - |  |",
    ):
        assert line in text, line
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "results.md", "results.png"}
    with Image.open(tmp_path / "results.png") as image:
        assert image.width > 900 and (0, 0, 0) in {color for _, color in image.getcolors(1 << 16)}  # ours is black


def step_row(ms=10.0, peak_mib=100.0, losses=(11.0, 10.0), note="", captured=False):
    row = {"ms": ms, "images_per_s": 64e3 / ms, "peak_mib": peak_mib, "captured": captured}
    return {**row, "all_step_ms": [ms - 1, ms, ms + 5], "losses": list(losses), "note": note}
