"""bench/ptx_counts.py with its shortest op, whose counts are known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_counts import read

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ptx
@pytest.mark.slow
def test_counts_of_a_kernel_before_and_after(tmp_path):
    before = ROOT / "bench/results/ptx-counts-b0847b7.md"
    command = [sys.executable, str(ROOT / "bench/ptx_counts.py"), "--archs", "90", "--ops", "ema_update"]
    command += ["--before", str(before), "--output", str(tmp_path / "table.md")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "table.md").read_text()
    kernel, whole = read(text)
    assert kernel["kernel"] == "ema_kernel" and whole["kernel"] == "all"
    assert kernel["launches"] == whole["launches"] == "1"
    # 12 bytes of a weight, and where each tensor begins.
    assert 12 < float(whole["bytes"]) < 16 and whole["exponentials"] == "0" and float(whole["instructions"]) > 5
    assert whole["bound by"] == "bytes" and whole["computed us"] == whole["floor us"] == "123"
    (change,) = read(text.split("## Each kernel")[0])
    assert change["launches"] == "1 -> 1" and change["computed us"] == "123 -> 123"
