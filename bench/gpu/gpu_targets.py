"""Performance targets, and the verdict on each from the measured rows. Pure functions, no torch."""

from collections.abc import Callable
from dataclasses import dataclass

OURS = "dino_kernels"
PLAIN = f"{OURS}, plain calls"
COMPILED = ", compiled peers"  # suffix of the name of a case that is measured with them
STEP = "step "  # prefix of the name of a network
Rows = dict[str, dict]  # provider -> row of one case


class Missing(Exception):
    """A number is not available; the message gives the reason."""


class Failed(Missing):
    """Ours raised an error or computed wrong values."""


def _ms(rows: Rows, provider: str) -> float:
    """The time of one of our providers."""
    if provider not in rows:
        raise Missing(f"no row of {provider}")
    if note := rows[provider]["note"]:
        raise (Missing if note.startswith("skipped") else Failed)(note)
    return rows[provider]["ms"]


def time(provider: str = OURS) -> Callable[[Rows], float]:
    return lambda rows: _ms(rows, provider)


def speedup(*prefixes: str, ours: str = OURS) -> Callable[[Rows], float]:
    """Speedup over the fastest peer whose name starts with one of the prefixes."""

    def value(rows: Rows) -> float:
        mine = _ms(rows, ours)
        peers = [row["ms"] for name, row in rows.items() if name.startswith(prefixes) and not row["note"]]
        if not peers:
            raise Missing("no peer ran")
        return min(peers) / mine

    return value


def floors(rows: Rows) -> float:
    """Time as a multiple of the floor."""
    if rows[OURS]["floor_ms"] is None:
        raise Missing("no ceilings")
    return _ms(rows, OURS) / rows[OURS]["floor_ms"]


def share_of_bandwidth(rows: Rows) -> float:
    return 100 / floors(rows)


def rate(count: int) -> Callable[[Rows], float]:
    """Items per second, with `count` items per call."""
    return lambda rows: 1e3 * count / _ms(rows, OURS)


def workspace(provider: str) -> Callable[[Rows], float]:
    """Megabytes (10^6) allocated in addition to inputs and results."""

    def value(rows: Rows) -> float:
        _ms(rows, provider)
        return (rows[provider]["peak_mib"] - rows[provider]["kept_mib"]) * 2**20 / 1e6

    return value


def share_of_peak(peer: str) -> Callable[[Rows], float]:
    """Peak memory relative to the peer."""

    def value(rows: Rows) -> float:
        _ms(rows, OURS)
        if peer not in rows or rows[peer]["note"]:
            raise Missing("no peer ran")
        return rows[OURS]["peak_mib"] / rows[peer]["peak_mib"]

    return value


def waits(rows: Rows) -> float:
    """1 if the call synchronized the host with the device."""
    _ms(rows, OURS)
    return float(rows[OURS]["waits"])


def repeats(rows: Rows) -> float:
    """1 if a repeated call was bitwise equal."""
    _ms(rows, OURS)
    return float(rows[OURS]["bitwise"])


def excess_error(rows: Rows) -> float:
    """Largest ratio of a result's error to the eager error in the same dtype (float32 rounding, 1e-7, is tolerated)."""
    _ms(rows, OURS)
    eager, mine = rows["reference"]["errors"], rows[OURS]["errors"]
    if not eager:
        raise Missing("the reference did not run")
    return max(max(0.0, mine[name] - 1e-7) / max(eager[name], 1e-12) for name in mine)


@dataclass(frozen=True)
class Part:
    """One required number of one case."""

    target: str
    case: str
    demand: str  # with {} for the limit
    limit: float
    value: Callable[[Rows], float]
    at_most: bool = False
    h200: bool = False  # an absolute time, valid for an H200 only


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
    """The targets of the design, one part per number, and the rate of the crops (C1); Q applies to every case."""
    parts = []
    for case in ("dino_loss bfloat16", "dino_loss float16"):
        parts += [
            Part("L1", case, "<= {} ms", 0.060, time(), at_most=True, h200=True),
            Part("L1", case, ">= {}x the reference form", 20, speedup("reference")),
            Part("L1", case, ">= {}x the einsum form", 7, speedup("einsum")),
            Part("L1", case + COMPILED, ">= {}x the reference", 3, speedup("compiled reference")),
            Part("L1", case + COMPILED, ">= {}x the einsum form", 3, speedup("compiled einsum")),
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
            Part("E2", case, "device-to-host syncs: {}", 0, waits, at_most=True),
            Part("E2", case, ">= {}x the reference", 3, speedup("reference")),
            Part("E2", case, ">= {}x the best of torch's fused calls", 1.15, speedup("torch fused")),
        ]
    parts += _attention_parts()
    for case, limit, gain, stock in ((f"{STEP}ViT-S/16", 20, 3, 1.5), (f"{STEP}ViT-B/16", 60, 2, 1.3)):
        parts += [
            Part("S1", case, "<= {} ms", limit, time(), at_most=True, h200=True),
            Part("S1", case, ">= {}x the reference", gain, speedup("reference")),
            Part("S1", case, ">= {}x the best of stock PyTorch", stock, speedup("stock")),
            Part("S1", case, "peak memory <= {}x the reference's", 0.5, share_of_peak("reference"), at_most=True),
        ]
    parts.append(Part("C1", "multicrop", ">= {} images/s", 10_000, rate(256)))
    for case in cases:
        if case.endswith(COMPILED):
            continue
        # 1 % tolerance: if rounding to 16 bits dominates, our error and the eager error are equal.
        parts.append(Part("Q", case, "error <= {}x eager's against float64", 1.01, excess_error, at_most=True))
        parts.append(Part("Q", case, "bitwise repeatable: {}", 1, repeats))
    return parts


def rows_of(case: str, results: dict) -> tuple[Rows, str]:
    """The rows of a case or a step by provider, and the failure of the task that measures ours, if any."""
    if case.startswith(STEP):
        net = case.removeprefix(STEP)
        rows, task = results["steps"].get(net, {}), f"{net}, {OURS}"
    else:
        rows, task = {row["provider"]: row for row in results["cases"].get(case, [])}, case
    problems = [item["problems"][task] for item in results["items"].values() if task in item["problems"]]
    return rows, problems[0] if problems else ""


def verdict(part: Part, results: dict) -> tuple[str, str]:
    """(measured, "met", "not met", "not measured ..." or "not judged ...") of one part."""
    header = results["header"]
    if header["device"] != "cuda":
        return "-", "not measured on a GPU"
    if header["toy"]:
        return "-", "not measured: toy sizes"
    rows, problem = rows_of(part.case, results)
    if OURS not in rows:
        ours_failed = problem and not problem.startswith(("skipped", "no result"))
        return "-", f"{'not met' if ours_failed else 'not measured'}: {problem or 'not reached'}"
    try:
        value = part.value(rows)
    except Failed as reason:
        return "-", f"not met: {reason}"
    except Missing as reason:
        return "-", f"not measured: {reason}"
    if part.h200 and "H200" not in header["gpu"]:
        return f"{value:.3g}", "not judged: valid for H200 only"
    met = value <= part.limit if part.at_most else value >= part.limit
    return f"{value:.3g}", "met" if met else "not met"
