"""From measured rows to floors, verdicts on the targets, a table and a plot: pure functions, no torch.

`results`, as gpu.py collects it and results.json holds it:
    header    date, device ("cuda" or "cpu"), name of the GPU, versions, commit, toy (whether sizes are toy ones)
    build     how the build ended
    tests     a dict a test file: file, passed, failed, skipped, seconds, problems
    ceilings  copy_bytes_per_s, bf16_flops_per_s, measured in the same run
    cases     name -> {"rows": a dict a provider, "problem": why there are none}
    steps     the same of the whole training steps
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

OURS = "dino_kernels"
Rows = dict[str, dict]  # provider -> row of one case


def floor_ms(bytes_moved: float, flops: float, ceilings: dict) -> float:
    """The least time the op can take: its bytes at the speed of a copy or its arithmetic at that of a product."""
    return 1e3 * max(bytes_moved / ceilings["copy_bytes_per_s"], flops / ceilings["bf16_flops_per_s"])


def finish_rows(rows: list[dict], ceilings: dict) -> list[dict]:
    """Adds median, floor and percent of the floor, and marks providers whose values are not those of the op.

    Values are wrong where an error against float64 passes four times that of the eager form in the same dtype
    (16-bit probabilities inside an attention kernel cost about one) and one part in 10^5.
    """
    eager = next((row["errors"] for row in rows if row["provider"] == "reference"), {})
    for row in rows:
        row["floor_ms"] = floor_ms(row["bytes"], row["flops"], ceilings)
        times = row.pop("times", [])
        row["rounds"] = len(times)
        row["ms"] = statistics.median(times) if times else None
        row["percent_of_floor"] = 100 * row["floor_ms"] / row["ms"] if times else None
        wrong = [name for name, error in row["errors"].items() if not error <= 4 * eager.get(name, error) + 1e-5]
        if wrong:
            row["note"] = "wrong values: " + ", ".join(f"{name} off by {row['errors'][name]:.1e}" for name in wrong)
    return rows


def mark_wrong_losses(rows: list[dict]) -> None:
    """Marks steps whose losses are not the reference's, in the median over the same batches.

    Five percent is forgiven: drop path differs, and a gradient scaler may skip some of the reference's first steps.
    """
    medians = {row["provider"]: statistics.median(row["losses"]) for row in rows if row["losses"]}
    for row in rows:
        if row["provider"] in medians:
            loss = medians[row["provider"]]
            if not math.isclose(loss, medians.get("reference", loss), rel_tol=0.05):
                row["note"] = f"wrong values: a loss of {loss:.4g}, not {medians.get('reference', loss):.4g}"


# --- targets -----------------------------------------------------------------------------------------


class Missing(Exception):
    """Why a number is not there."""


class Failed(Missing):
    """Ours ran into an error or computed something else."""


def _ms(rows: Rows, provider: str) -> float:
    """The time of one of ours."""
    if provider not in rows:
        raise Missing(f"no row of {provider}")
    if note := rows[provider]["note"]:
        raise (Missing if note.startswith("skipped") else Failed)(note)
    return rows[provider]["ms"]


def time(provider: str = OURS) -> Callable[[Rows], float]:
    return lambda rows: _ms(rows, provider)


def speedup(*prefixes: str, ours: str = OURS) -> Callable[[Rows], float]:
    """Over the fastest peer whose name starts with one of the prefixes."""

    def value(rows: Rows) -> float:
        mine = _ms(rows, ours)
        peers = [row["ms"] for name, row in rows.items() if name.startswith(prefixes) and not row["note"]]
        if not peers:
            raise Missing("no peer ran")
        return min(peers) / mine

    return value


def floors(rows: Rows) -> float:
    """Time as a multiple of the floor."""
    return _ms(rows, OURS) / rows[OURS]["floor_ms"]


def share_of_bandwidth(rows: Rows) -> float:
    return 100 / floors(rows)


def rate(count: int) -> Callable[[Rows], float]:
    """Things a second, where a call takes so many."""
    return lambda rows: 1e3 * count / _ms(rows, OURS)


def workspace(provider: str) -> Callable[[Rows], float]:
    """Megabytes (10^6) needed beside inputs and results."""

    def value(rows: Rows) -> float:
        _ms(rows, provider)
        return (rows[provider]["peak_mib"] - rows[provider]["kept_mib"]) * 2**20 / 1e6

    return value


def share_of_peak(peer: str) -> Callable[[Rows], float]:
    """Peak memory over the peer's."""

    def value(rows: Rows) -> float:
        _ms(rows, OURS)
        if peer not in rows or rows[peer]["note"]:
            raise Missing("no peer ran")
        return rows[OURS]["peak_mib"] / rows[peer]["peak_mib"]

    return value


def waits(rows: Rows) -> float:
    """1 if the call made the host wait for the device."""
    _ms(rows, OURS)
    return float(rows[OURS]["waits"])


def repeats(rows: Rows) -> float:
    """1 if a repeated call was bitwise equal."""
    _ms(rows, OURS)
    return float(rows[OURS]["bitwise"])


def excess_error(rows: Rows) -> float:
    """Largest error of a result over eager's in the same dtype (float32's rounding, 1e-7, forgiven)."""
    _ms(rows, OURS)
    eager, mine = rows["reference"]["errors"], rows[OURS]["errors"]
    if not eager:
        raise Missing("the reference did not run")
    return max(max(0.0, mine[name] - 1e-7) / max(eager[name], 1e-12) for name in mine)


@dataclass(frozen=True)
class Part:
    """One number that a target demands of one case."""

    target: str
    case: str
    demand: str  # with {} for the limit
    limit: float
    value: Callable[[Rows], float]
    at_most: bool = False
    h200: bool = False  # an absolute time, written for an H200


def _attention_parts() -> list[Part]:
    parts = []
    peers = ("SDPA", "varlen_attn")
    for heads in ("6 heads", "12 heads"):
        for tokens in ("197", "37", "packed"):
            gains = (1.8, 1.5) if tokens == "packed" else (1.4, 1.5)
            for target, way, gain, multiple in zip(
                ("A1", "A2"), ("forward", "backward"), gains, (1.5, 1.6), strict=True
            ):
                case = f"attention {tokens} {heads} {way}"
                parts.append(Part(target, case, "<= {}x the floor", multiple, floors, at_most=True))
                parts.append(Part(target, case, ">= {}x the best of SDPA and varlen_attn", gain, speedup(*peers)))
            parts.append(Part("A2", case, "bitwise repeatable: {}", 1, repeats))
    for way in ("forward", "backward"):
        parts.append(Part("A3", f"attention 785 6 heads {way}", ">= {}x the best SDPA backend", 0.95, speedup(*peers)))
    return parts


def target_parts(cases: list[str]) -> list[Part]:
    """Section 6 of the design, a line a number, and the rate of the crops (C1); Q is asked of every case."""
    parts = []
    for case in ("dino_loss bfloat16", "dino_loss float16"):
        parts += [
            Part("L1", case, "<= {} ms", 0.060, time(), at_most=True, h200=True),
            Part("L1", case, ">= {}x the reference form", 20, speedup("reference")),
            Part("L1", case, ">= {}x the einsum form", 7, speedup("einsum")),
            Part("L1", case, ">= {}x torch.compile of the reference", 3, speedup("compiled reference")),
            Part("L1", case, ">= {}x torch.compile of the einsum form", 3, speedup("compiled einsum")),
        ]
    case, stored = "dino_head_loss bfloat16", f"{OURS}, stored logits"
    parts += [
        Part("L2", case, "stored logits: <= {} ms", 0.150, time(stored), at_most=True, h200=True),
        Part("L2", case, "stored logits: workspace <= {} MB", 105, workspace(stored), at_most=True),
        Part("L2", case, "no logits: <= {} ms", 0.200, time(), at_most=True, h200=True),
        Part("L2", case, "no logits: workspace <= {} MB", 4, workspace(OURS), at_most=True),
        Part("L2", case, "stored logits: >= {}x the reference span", 10, speedup("reference span", ours=stored)),
        Part(
            "L2",
            case,
            "stored logits, weight norm on both sides: >= {}x the reference span",
            10,
            speedup("reference span", ours=f"{stored}, span"),
        ),
    ]
    for case in ("ema_update ViT-S", "ema_update ViT-B"):
        parts += [
            Part("E1", case, ">= {} % of the copy bandwidth", 85, share_of_bandwidth),
            Part("E1", case, ">= {}x the reference", 2, speedup("reference")),
            Part("E1", case, ">= {}x _foreach_lerp_ (parity)", 0.95, speedup("_foreach_lerp_")),
        ]
    for case, limit in (("adamw_ema ViT-S", 0.52), ("adamw_ema ViT-B", 1.3)):
        parts += [
            Part("E2", case, "<= {} ms", limit, time(), at_most=True, h200=True),
            Part("E2", case, "waits of the host: {}", 0, waits, at_most=True),
            Part("E2", case, ">= {}x the reference", 3, speedup("reference")),
            Part("E2", case, ">= {}x the best of torch's fused calls", 1.15, speedup("torch fused")),
        ]
    parts += _attention_parts()
    for case, limit, gain, stock in (("step ViT-S/16", 20, 3, 1.5), ("step ViT-B/16", 60, 2, 1.3)):
        parts += [
            Part("S1", case, "<= {} ms", limit, time(), at_most=True, h200=True),
            Part("S1", case, ">= {}x the reference", gain, speedup("reference")),
            Part("S1", case, ">= {}x the best of stock PyTorch", stock, speedup("stock")),
            Part("S1", case, "peak memory <= {}x the reference's", 0.5, share_of_peak("reference"), at_most=True),
        ]
    parts.append(Part("C1", "multicrop", ">= {} images/s", 10_000, rate(256)))
    for case in cases:
        # A hundredth for chance: where rounding to 16 bits is all of the error, ours and eager's are the same.
        parts.append(Part("Q", case, "error <= {}x eager's against float64", 1.01, excess_error, at_most=True))
        parts.append(Part("Q", case, "bitwise repeatable: {}", 1, repeats))
    return parts


def verdict(part: Part, results: dict) -> tuple[str, str]:
    """(measured, "met", "not met", "not measured ..." or "not judged ...") of one part."""
    header = results["header"]
    if header["device"] != "cuda":
        return "-", "not measured on a GPU"
    if header["toy"]:
        return "-", "not measured: toy sizes"
    case = {**results["cases"], **results["steps"]}.get(part.case)
    if case is None or not case["rows"]:
        return "-", f"not measured: {case['problem'] if case else 'not reached'}"
    try:
        value = part.value({row["provider"]: row for row in case["rows"]})
    except Failed as reason:
        return "-", f"not met: {reason}"
    except Missing as reason:
        return "-", f"not measured: {reason}"
    if part.h200 and "H200" not in header["gpu"]:
        return f"{value:.3g}", "not judged: written for H200"
    met = value <= part.limit if part.at_most else value >= part.limit
    return f"{value:.3g}", "met" if met else "not met"


# --- what is written ---------------------------------------------------------------------------------


def _line(*cells) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(*columns: str) -> list[str]:
    return [_line(*columns), _line(*["---"] * len(columns))]


def _number(value: float | None, digits: str = ".4g") -> str:
    return "-" if value is None else f"{value:{digits}}"


def header_lines(results: dict) -> list[str]:
    header = results["header"]
    title = f"Kernels on {header['gpu']}"
    if header["device"] != "cuda" or header["toy"]:
        title = f"NOT A GPU RESULT: a trial run, device {header['device']}{', toy sizes' * header['toy']}"
    lines = [f"# {title}", "", *(f"* {key}: {value}" for key, value in header.items())]
    if results["ceilings"]:
        copy, product = (results["ceilings"][key] / 1e12 for key in ("copy_bytes_per_s", "bf16_flops_per_s"))
        lines.append(f"* ceilings: copy {copy:.3g} TB/s (read + written), bfloat16 product {product:.4g} TFLOP/s")
    return [*lines, f"* build: {results['build']}", ""]


def test_lines(tests: list[dict]) -> list[str]:
    if not tests:
        return []
    lines = ["## Tests", "", *_table("file", "passed", "failed", "skipped", "seconds", "problems")]
    for test in tests:
        problems = "; ".join(test["problems"])
        lines.append(
            _line(test["file"], test["passed"], test["failed"], test["skipped"], f"{test['seconds']:.0f}", problems)
        )
    return [*lines, ""]


METHOD = """\
Medians of alternating rounds in one process; L2 emptied before every call; launches queued ahead, so that ms is the
device's time, while host ms is what one call costs the host. Floor: bytes at the copy's speed or FLOPs at the
product's, whichever takes longer. MB and GFLOP are what the op must move and compute at least, whoever computes it.
Peak and kept: MiB allocated above the inputs during the call and by its results. Error: the largest over the results
of |x - exact| / |exact| (L2 norms), exact in float64."""


def case_lines(cases: dict) -> list[str]:
    columns = ("op", "shape", "dtype", "provider", "ms", "host ms", "MB", "GFLOP", "floor ms", "% of floor")
    lines = ["## Measurements", "", METHOD, "", *_table(*columns, "peak MiB", "kept MiB", "error", "note")]
    for name, case in cases.items():
        if not case["rows"]:
            lines.append(_line(name, *["-"] * 12, case["problem"]))
        for row in case["rows"]:
            error = max(row["errors"].values(), default=None)
            cells = [row["op"], row["shape"], row["dtype"], row["provider"], _number(row["ms"])]
            cells += [_number(row["host_ms"], ".3g"), _number(row["bytes"] / 1e6), _number(row["flops"] / 1e9)]
            cells += [_number(row["floor_ms"]), _number(row["percent_of_floor"], ".3g")]
            cells += [_number(row[key], ".1f") for key in ("peak_mib", "kept_mib")]
            lines.append(_line(*cells, _number(error, ".1e"), row["note"]))
    return [*lines, ""]


STEP_METHOD = """\
One whole training step: 64 images, 2 + 8 crops already on the device, K = 65536. Ours in bfloat16, as one CUDA graph;
reference: facebookresearch/dino's step, in float16 under autocast with a gradient scaler as it ships; stock: bfloat16
autocast, SDPA, torch.compile, fused AdamW. Each in a process of its own, one after the other; ms from the call until
the device is done, median of the timed steps, all of which results.json has; peak: the most allocated from the second
step on."""


def step_lines(steps: dict) -> list[str]:
    columns = ("net", "provider", "images/s", "ms", "fastest", "slowest", "peak MiB", "loss", "note")
    lines = ["## Whole steps", "", STEP_METHOD, "", *_table(*columns)]
    for name, step in steps.items():
        for row in step["rows"]:
            times, losses = row["all_step_ms"], row["losses"]
            cells = [row["ms"], min(times, default=None), max(times, default=None), row["peak_mib"]]
            loss = statistics.median(losses) if losses else None
            numbers = [_number(x) for x in (row["images_per_s"], *cells, loss)]
            lines.append(_line(name, row["provider"], *numbers, row["note"]))
    return [*lines, ""]


def target_lines(results: dict) -> list[str]:
    lines = ["## Targets", "", *_table("id", "case", "target", "measured", "verdict")]
    for part in target_parts(list(results["cases"])):
        lines.append(_line(part.target, part.case, part.demand.format(part.limit), *verdict(part, results)))
    return [*lines, ""]


def write(folder: Path, results: dict) -> None:
    """results.json and results.md, each replaced whole: a kill leaves the old or the new one."""
    lines = header_lines(results) + test_lines(results["tests"]) + step_lines(results["steps"])
    lines += case_lines(results["cases"]) + target_lines(results)
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", "\n".join(lines))):
        (folder / "half-written").write_text(text)
        (folder / "half-written").replace(folder / name)


def plot(path: Path, results: dict) -> str:
    """Each provider of each case as a multiple of its floor; returns a sentence on what came of it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no plot: {error}"
    cases = {name: rows for name, case in results["cases"].items() if (rows := [r for r in case["rows"] if r["ms"]])}
    figure = Figure(figsize=(10, 1.5 + 0.35 * len(cases)), layout="constrained")
    axes = figure.subplots()
    providers = dict.fromkeys(row["provider"] for rows in cases.values() for row in rows)
    for i, provider in enumerate(providers):
        points = [
            (row["ms"] / row["floor_ms"], name)
            for name, rows in cases.items()
            for row in rows
            if row["provider"] == provider
        ]
        style = {"marker": "osv^<>P"[i // 10 % 7], "color": f"C{i % 10}", "s": 35}  # a marker for every ten colors
        if provider == OURS:
            style = {"marker": "D", "color": "black", "s": 70}
        axes.scatter(*zip(*points, strict=True), label=provider, **style)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of the floor (1 = the card's own limit)")
    axes.set_title(header_lines(results)[0].strip("# "))
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=130)
    return f"plot: {path}"
