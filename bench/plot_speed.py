"""Draws docs/speed.png: the time of a training step of ViT-S/16 on three CPUs, from the tables in bench/results.

python bench/plot_speed.py [FILE]
"""

import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
# Machine, file and section: those of the first table in docs/performance.md.
RUNS = {
    "Xeon with AMX": ("step-cpu-2x-xeon-amx-2026-11-27.md", "ViT-S/16, 06:09"),
    "EPYC (Zen 5, AVX-512, bf16)": ("step-cpu-2x-zen5-2026-11-29.md", "DINO, ViT-S/16"),
    "older Xeon (AVX-512, no bf16)": ("step-cpu-2x-xeon-avx512-2026-11-26.md", "ViT-S/16, 22:51"),
}
LABELS = {
    "reference": "reference, float32",
    "reference_bf16": "reference, bfloat16",
    "stock": "best of stock PyTorch",
    "ours_float32": "ours, float32",
    "ours": "ours, bfloat16",
}


def step_times(file: str, section: str) -> dict[str, float]:
    """Median milliseconds of each provider."""
    text = (ROOT / "bench/results" / file).read_text()
    table = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return {name: float(ms) for name, ms in re.findall(r"^\| (\w+) \| [\d.]+ \| (\d+) \(", table, re.MULTILINE)}


def main() -> None:
    figure, panels = plt.subplots(1, len(RUNS), figsize=(11, 2.6), sharey=True, layout="constrained")
    for panel, (machine, run) in zip(panels, RUNS.items(), strict=True):
        times = step_times(*run)
        colors = ["#d95f02" if name.startswith("ours") else "#9aa5b1" for name in LABELS]
        bars = panel.barh(list(LABELS.values()), [times[name] for name in LABELS], color=colors)
        panel.bar_label(bars, fmt="%.0f", padding=3)
        panel.set_title(machine, fontsize=10)
        panel.margins(x=0.18)
        panel.locator_params(axis="x", nbins=4)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.supxlabel("ms per training step (ViT-S/16, 4 images, 2 cores; less is better)", fontsize=10)
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/speed.png", dpi=110)


if __name__ == "__main__":
    main()
