"""The whole training steps that gpu.py measures: bench_step.py, in a run of its own for each net and provider.

So none holds memory while another is measured, and one that fails, or compiles for too long, costs only its own row.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_report
from gpu_report import OURS

BENCH = Path(__file__).with_name("bench_step.py")
NETS = {"step ViT-S/16": "vit_small", "step ViT-B/16": "vit_base"}
# In the order of importance, which is also that of the time until their first step: stock is compiled by then.
PROVIDERS = {OURS: "ours", "reference": "reference", "stock": "stock"}
PROVIDER_SECONDS = 100  # at most, for one of them at one net
LEAST_SECONDS = 20  # with less left it is not begun
TOY = ["--arch", "vit_nano", "--batch", "2", "--local-crops", "2", "--out-dim", "256", "--steps", "2", "--warmup", "1"]


def measure_steps(folder: Path, results: dict, deadline: float, env: dict[str, str]) -> None:
    """Adds to results["steps"], and to the folder, the rows that are not there yet."""
    header = results["header"]
    for provider, name in PROVIDERS.items():
        for case, arch in NETS.items():
            rows = results["steps"].setdefault(case, {"rows": [], "problem": ""})["rows"]
            before = [row for row in rows if row["provider"] == provider]
            if before and not before[0]["note"].startswith("skipped"):
                continue
            sizes = TOY if header["toy"] else ["--arch", arch, "--batch", "64", "--steps", "20"]
            options = [*sizes, "--device", header["device"], "--providers", name]
            row = {"provider": provider, "ms": None, "images_per_s": None, "peak_mib": None}
            row |= {"all_step_ms": [], "losses": [], "note": ""}
            row |= measure_step(options, name, folder, min(PROVIDER_SECONDS, deadline - time.time()), env)
            rows[:] = [row for row in rows if row not in before] + [row]
            gpu_report.mark_wrong_losses(rows)
            gpu_report.write(folder, results)
            left = max(0, deadline - time.time())
            print(f"{left:4.0f} s left, measured: {case} {provider} {row['note']}", flush=True)


def measure_step(options: list[str], name: str, folder: Path, seconds: float, env: dict[str, str]) -> dict:
    """What bench_step.py measured of one provider, or a note why it did not."""
    if seconds < LEAST_SECONDS:
        return {"note": "skipped: the time was spent"}
    output, note = folder / "step.json", ""
    process = subprocess.Popen(
        [sys.executable, str(BENCH), *options, "--json", str(output)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: nobody else's process
        said, _ = process.communicate()
        note = f"skipped: no result after {seconds:.0f} s, see steps.log"
    with (folder / "steps.log").open("a") as log:
        log.write(f"--- {' '.join(options)}\n{said}\n")
    if process.returncode:
        return {"note": note or f"not available: {reason(said)}"}
    row = json.loads(output.read_text())["providers"][name]
    output.unlink()
    return {"ms": row["step_ms"], **{key: row[key] for key in ("images_per_s", "peak_mib", "all_step_ms", "losses")}}


def reason(said: str) -> str:
    """The last error in what a process said."""
    lines = said.strip().splitlines() or ["no message"]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors or lines)[-1][:200]
