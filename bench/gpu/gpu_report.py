"""The results of gpu.py as results.json, tables and a plot: pure functions, no torch.

`results`, the content of results.json; gpu.py collects it, tasks send parts of it:
    header    date, device ("cuda" or "cpu"), name of the GPU, versions, commit, toy (whether sizes are toy sizes)
    build     status of the build
    items     name -> {"seconds", "problems": name of a task -> reason}
    compiled  name -> {"kernels", "seconds"}
    checks    name of a case -> {"errors" of ours and of "eager" (plain PyTorch) relative to float64; "bitwise"}
    steps     network -> provider -> its row
    profile   {"rows": one dict per kernel, "launches" and "us" per step}
    training  "start" and "resume" -> images per second, wait for data
    ceilings  copy_bytes_per_s, bf16_flops_per_s, measured in the same run
    cases     name -> one dict per provider
    variants  the same for ours with other launch options
    counters  one dict per kernel
    tests     file -> name of a test -> {"outcome", "problem"}
"""

import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_targets import COMPILED, OURS, PLAIN, target_parts, verdict

__all__ = ["COMPILED", "OURS", "PLAIN"]


def empty(header: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {"header": header, "build": "skipped: on a GPU only", "ceilings": None, "counters": []}
    dicts = ("items", "compiled", "checks", "steps", "profile", "training", "cases", "variants", "tests")
    return results | {name: {} for name in dicts}


def floor_ms(bytes_moved: float, flops: float, ceilings: dict) -> float:
    """Lower bound of the op's time: its bytes at the bandwidth of a copy, or its FLOPs at the rate of a GEMM."""
    return 1e3 * max(bytes_moved / ceilings["copy_bytes_per_s"], flops / ceilings["bf16_flops_per_s"])


def wrong_values(errors: dict[str, float], eager: dict[str, float]) -> list[str]:
    """Results whose error is more than 1e-5 plus four times the eager error in the same dtype (16-bit probabilities
    inside an attention kernel cost about one of the four)."""
    return [f"{name} off by {e:.1e}" for name, e in errors.items() if not e <= 4 * eager.get(name, e) + 1e-5]


def finish_rows(rows: list[dict], ceilings: dict | None) -> list[dict]:
    """Adds median, floor and percent of the floor, and marks providers with wrong values."""
    eager = next((row["errors"] for row in rows if row["provider"] == "reference"), {})
    for row in rows:
        times = row.pop("times", [])
        row["floor_ms"] = floor_ms(row["bytes"], row["flops"], ceilings) if ceilings else None
        row["rounds"] = len(times)
        row["ms"] = statistics.median(times) if times else None
        row["percent_of_floor"] = 100 * row["floor_ms"] / row["ms"] if times and ceilings else None
        if wrong := wrong_values(row["errors"], eager):
            row["note"] = f"wrong values: {', '.join(wrong)}"
        elif wrong := wrong_values(row.get("from_default", {}), eager):
            row["note"] = f"wrong values, unlike the default: {', '.join(wrong)}"
    return rows


def mark_steps(rows: dict[str, dict], device: str) -> None:
    """Marks steps whose median loss over the same batches differs from the reference, and a graph that was not captured
    or whose losses differ, step by step, from those of eager calls.

    The tolerance between providers is 5 percent: drop path differs, and the gradient scaler of the reference may skip
    some of its first steps.
    """
    if OURS in rows and device == "cuda" and not rows[OURS]["captured"]:
        rows[OURS]["note"] = "not captured as a graph: these are plain calls, see the log"
    medians = {provider: statistics.median(row["losses"]) for provider, row in rows.items()}
    for provider, loss in medians.items():
        expected = medians.get("reference", loss)
        if not math.isclose(loss, expected, rel_tol=0.05):
            rows[provider]["note"] = f"wrong values: a loss of {loss:.4g}, not {expected:.4g}"
    if OURS in rows and PLAIN in rows:
        pairs = list(zip(rows[OURS]["losses"], rows[PLAIN]["losses"], strict=True))
        off = max(abs(a - b) / abs(b) if a == a and b == b else math.inf for a, b in pairs)
        rows[OURS]["from_plain"] = off
        if off > 1e-4:
            rows[OURS]["note"] = f"wrong values: losses {off:.1e} off those of plain calls"


def finish(results: dict[str, Any], record: dict[str, Any]) -> None:
    """Add derived values to the results after a record was merged."""
    for kind in ("cases", "variants"):
        for name in record.get(kind, {}):
            finish_rows(results[kind][name], results["ceilings"])
    for net in record.get("steps", {}):
        mark_steps(results["steps"][net], results["header"]["device"])


def failed(results: dict[str, Any]) -> bool:
    """Whether something of ours failed or was not run; hardware counters are not included."""
    outcomes = [test["outcome"] for file in results["tests"].values() for test in file.values()]
    checks = any(check_note(check) for check in results["checks"].values())
    problems = {task for item in results["items"].values() for task in item["problems"]}
    return checks or "failed" in outcomes or bool(problems - {"counters"})


def check_note(check: dict) -> str:
    notes = wrong_values(check["errors"], check["eager"]) + ["not repeatable"] * (not check["bitwise"])
    return f"wrong values: {', '.join(notes)}" if notes else ""


# --- output ------------------------------------------------------------------------------------------


def _line(*cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(*columns: str) -> list[str]:
    return [_line(*columns), _line(*["---"] * len(columns))]


def _number(value: float | None, digits: str = ".4g") -> str:
    return "-" if value is None else f"{value:{digits}}"


def title(results: dict) -> str:
    header = results["header"]
    if header["device"] != "cuda" or header["toy"]:
        return f"NOT A GPU RESULT: a dry run, device {header['device']}{', toy sizes' * header['toy']}"
    return f"Kernels on {header['gpu']}"


def header_lines(results: dict) -> list[str]:
    lines = [f"# {title(results)}", "", *(f"* {key}: {value}" for key, value in results["header"].items())]
    if results["ceilings"]:
        copy, product = (results["ceilings"][key] / 1e12 for key in ("copy_bytes_per_s", "bf16_flops_per_s"))
        lines.append(f"* ceilings: copy {copy:.3g} TB/s (read + written), bfloat16 GEMM {product:.4g} TFLOP/s")
    kernels = sum(row["kernels"] for row in results["compiled"].values())
    lines += [
        f"* build: {results['build']}",
        f"* compiled ahead: {kernels} kernels of {len(results['compiled'])} tasks",
    ]
    lines += ["", "## What was done", "", *_table("item", "seconds", "what went wrong")]
    for name, item in results["items"].items():
        wrong = "; ".join(f"{task}: {problem}" for task, problem in item["problems"].items())
        lines.append(_line(name, f"{item['seconds']:.0f}", wrong))
    return [*lines, ""]


def check_lines(checks: dict) -> list[str]:
    lines = ["## Values at the reference size", "", *_table("case", "error", "eager's", "bitwise repeatable", "note")]
    for name, check in checks.items():
        errors = (_number(max(check[key].values()), ".1e") for key in ("errors", "eager"))
        lines.append(_line(name, *errors, check["bitwise"], check_note(check)))
    return [*lines, ""]


STEP_METHOD = """\
One whole training step: 64 images, 2 + 8 crops already on the device, K = 65536. Ours in bfloat16, eager ("plain
calls") and as one CUDA graph; reference: the step of facebookresearch/dino, in float16 autocast with a gradient scaler,
its default; stock: bfloat16 autocast, SDPA, torch.compile of each block, fused AdamW. Each in a separate process. The
losses of the first 12 steps are compared (the last layer is frozen in the first 5): the graph with plain calls, and
medians with the reference. Then steps are timed: ms from the call until the device is done, median; peak: maximum
allocated memory from the second step on."""


def step_lines(steps: dict) -> list[str]:
    columns = ("net", "provider", "images/s", "ms", "fastest", "slowest", "peak MiB", "loss", "from plain", "note")
    lines = ["## Whole steps", "", STEP_METHOD, "", *_table(*columns)]
    for net, rows in steps.items():
        for provider, row in rows.items():
            times = row["all_step_ms"]
            cells = [row["ms"], min(times, default=None), max(times, default=None), row["peak_mib"]]
            numbers = [_number(x) for x in (row["images_per_s"], *cells, statistics.median(row["losses"]))]
            note = row["note"] or ("a CUDA graph" if row["captured"] else "")
            lines.append(_line(net, provider, *numbers, _number(row.get("from_plain"), ".1e"), note))
    return [*lines, ""]


def profile_lines(profile: dict) -> list[str]:
    if not profile:
        return []
    total = f"{profile['launches']:.0f} launches and {profile['us'] / 1e3:.2f} ms of kernels per step, ViT-S."
    lines = ["## Where a step's time goes", "", total, "", *_table("kernel", "count", "us", "share, %")]
    for row in profile["rows"][:60]:  # results.json has all
        share = 100 * row["us"] / profile["us"]
        lines.append(_line(row["kernel"][:100], f"{row['count']:.0f}", f"{row['us']:.1f}", f"{share:.1f}"))
    return [*lines, ""]


def training_lines(training: dict) -> list[str]:
    if not training:
        return []
    columns = ("part", "to step", "loss", "images/s", "fastest", "data wait", "evaluations", "seconds")
    lines = ["## A real run", "", "`pretrain` on JPEGs, stopped by SIGTERM during an epoch and resumed.", ""]
    lines += _table(*columns)
    for part, row in training.items():
        numbers = [_number(row[key]) for key in ("loss", "images_per_s", "fastest_images_per_s", "data_wait")]
        evaluations = "; ".join(str(evaluation) for evaluation in row["evaluations"])
        lines.append(_line(part, row["steps"], *numbers, evaluations, _number(row["seconds"], ".1f")))
    return [*lines, ""]


METHOD = """\
Medians of alternating rounds in one process; L2 is flushed before every call; launches are queued ahead, so that ms is
device time, while host ms is the host time of one call. Floor: bytes at the bandwidth of a copy or FLOPs at the rate of
a GEMM, whichever takes longer. MB and GFLOP are the minimum that any implementation must move and compute. Peak and
kept: MiB allocated in addition to the inputs, during the call and by its results. Error: the maximum over the results
of |x - exact| / |exact| (L2 norms), exact in float64."""


def case_lines(title: str, cases: dict, *method: str) -> list[str]:
    columns = ("op", "shape", "dtype", "provider", "ms", "host ms", "MB", "GFLOP", "floor ms", "% of floor")
    lines = [f"## {title}", "", *method, *_table(*columns, "peak MiB", "kept MiB", "error", "note")]
    for rows in cases.values():
        for row in rows:
            error = max(row["errors"].values(), default=None)
            cells = [row["op"], row["shape"], row["dtype"], row["provider"], _number(row["ms"])]
            cells += [_number(row["host_ms"], ".3g"), _number(row["bytes"] / 1e6), _number(row["flops"] / 1e9)]
            cells += [_number(row["floor_ms"]), _number(row["percent_of_floor"], ".3g")]
            cells += [_number(row[key], ".1f") for key in ("peak_mib", "kept_mib")]
            lines.append(_line(*cells, _number(error, ".1e"), row["note"]))
    return [*lines, ""]


def counter_lines(counters: list[dict]) -> list[str]:
    if not counters:
        return []
    lines = ["## Hardware counters", "", "One call of each case, by Nsight Compute.", "", *_table(*counters[0])]
    return [*lines, *(_line(*(_number(x) if x is None or isinstance(x, float) else x for x in row.values()))
                      for row in counters), ""]  # fmt: skip


def test_lines(tests: dict) -> list[str]:
    if not tests:
        return []
    lines = ["## Tests", "", *_table("file", "passed", "failed", "skipped", "problems")]
    for file, outcomes in tests.items():
        counts = Counter(test["outcome"] for test in outcomes.values())
        problems = "; ".join(f"{name}: {test['problem']}" for name, test in outcomes.items() if test["problem"])
        lines.append(_line(file, *(counts[key] for key in ("passed", "failed", "skipped")), problems))
    return [*lines, ""]


def target_lines(results: dict) -> list[str]:
    lines = ["## Targets", "", *_table("id", "case", "target", "measured", "verdict")]
    for part in target_parts(list(results["cases"])):
        lines.append(_line(part.target, part.case, part.demand.format(part.limit), *verdict(part, results)))
    return [*lines, ""]


def text(results: dict) -> str:
    lines = header_lines(results) + target_lines(results) + check_lines(results["checks"])
    lines += step_lines(results["steps"]) + profile_lines(results["profile"]) + training_lines(results["training"])
    lines += case_lines("Measurements", results["cases"], METHOD, "")
    lines += case_lines("Other launches of ours", results["variants"])
    return "\n".join(lines + counter_lines(results["counters"]) + test_lines(results["tests"]))


def write(folder: Path, results: dict) -> None:
    """Write results.json and results.md, each atomically: after a kill there is the old or the new file."""
    for name, content in (("results.json", json.dumps(results, indent=1)), ("results.md", text(results))):
        (folder / ".half-written").write_text(content)
        (folder / ".half-written").replace(folder / name)


def plot(folder: Path, results: dict) -> None:
    """results.png: each provider of each case as a multiple of its floor, on a logarithmic axis; ours in black."""
    from PIL import Image, ImageDraw

    points = {
        name: {row["provider"]: row["ms"] / row["floor_ms"] for row in rows if row["ms"] and row["floor_ms"]}
        for name, rows in results["cases"].items()
    }
    names = list(dict.fromkeys(provider for row in points.values() for provider in row))
    left, width, line = 300, 700, 18
    bottom = 50 + line * len(points)
    image = Image.new("RGB", (left + width + 40, bottom + 40 + line * len(names)), "white")
    draw = ImageDraw.Draw(image)
    decades = max([1, *(math.ceil(math.log10(max(x, 1))) for row in points.values() for x in row.values())])
    colors = {name: f"hsl({137 * i % 360}, 80%, 45%)" for i, name in enumerate(names)} | {OURS: "black"}

    def mark(x: float, y: float, name: str) -> None:
        size = 5 if name == OURS else 3
        draw.ellipse((x - size, y - size, x + size, y + size), fill=colors[name])

    draw.text((10, 8), f"{title(results)}: time as a multiple of the floor (1 = limit of the GPU)", fill="black")
    for decade in range(decades + 1):
        x = left + width * decade / decades
        draw.line((x, 30, x, bottom), fill="lightgray")
        draw.text((x - 8, bottom + 4), f"{10**decade}", fill="black")
    for i, (case, row) in enumerate(points.items()):
        y = 40 + line * i
        draw.text((10, y - 6), case, fill="black")
        for name, multiple in sorted(row.items(), key=lambda entry: entry[0] == OURS):
            mark(left + width * math.log10(max(multiple, 1)) / decades, y, name)
    for i, name in enumerate(names):
        y = bottom + 34 + line * i
        mark(left, y, name)
        draw.text((left + 14, y - 6), name, fill="black")
    image.save(folder / ".half-written", "PNG")
    (folder / ".half-written").replace(folder / "results.png")
