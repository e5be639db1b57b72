"""Hardware counters of the kernels of the most important ops, from Nsight Compute, if it is installed and permitted.

ncu ... python bench/gpu/gpu_counters.py cuda|cpu [toy]     the process that ncu profiles
"""

import csv
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

METRICS = {  # name in ncu -> name in our results
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "MB read",
    "dram__bytes_write.sum": "MB written",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}
SCALE = {"us": 1e-3, "MB read": 1e-6, "MB written": 1e-6}  # from base units: ns and bytes
CASES = (
    *("dino_loss bfloat16", "attention packed 6 heads forward", "attention packed 6 heads backward"),
    *("adamw_ema ViT-S", "ema_update ViT-S", "add_layer_norm", "bias_gelu", "dino_head_loss bfloat16", "multicrop"),
)


def find_ncu() -> str | None:
    places = [shutil.which("ncu"), "/usr/local/cuda/bin/ncu", *sorted(map(str, Path("/opt/nvidia").glob("*/*/ncu")))]
    return next((place for place in places if place and Path(place).is_file()), None)


def measure(send, device: str, toy: bool) -> None:
    if not (ncu := find_ncu()):
        raise RuntimeError("Nsight Compute (ncu) is not on this machine: no hardware counters")
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    options += ["--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    command = [ncu, *options, sys.executable, __file__, device, *["toy"] * toy]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    rows = parse(done.stdout)
    if not rows:
        said = [line for line in done.stdout.splitlines() if "ERROR" in line or "rror:" in line]
        raise RuntimeError(f"ncu measured no kernel: {(said or ['it printed no error'])[-1][:160]}")
    send({"counters": rows})


def parse(said: str) -> list[dict]:
    """One row per kernel, medians over its launches, from the table that ncu prints after its messages."""
    lines = said.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, list[dict]] = {}
    for line in csv.DictReader(lines[start:]):
        if line["ID"] and line["ID"].isdigit():  # skips the row of units
            launches.setdefault(line["Kernel Name"], []).append(line)
    rows = []
    for kernel, found in launches.items():
        row: dict = {"kernel": kernel, "launches": len(found)}
        for metric, name in METRICS.items():
            values = [float(line[metric].replace(",", "")) for line in found if line.get(metric)]
            row[name] = statistics.median(values) * SCALE.get(name, 1) if values else None
        rows.append(row)
    return sorted(rows, key=lambda row: -(row["us"] or 0) * row["launches"])


def main() -> None:
    """Calls each of our cases once, after compilation and warm-up; only these calls are profiled."""
    import gpu_measure
    import torch
    from gpu_report import OURS

    device, cuda = sys.argv[1], sys.argv[1] == "cuda"
    cases = gpu_measure.cases("toy" in sys.argv)
    for name in CASES:
        call = cases[name](device).providers[OURS]
        call()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        call()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main()
