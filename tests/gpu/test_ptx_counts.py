"""bench/ptx_counts.py with its shortest op, whose counts are known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_counts import read

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ptx
def test_counts_of_a_kernel_before_and_after(tmp_path):
    before = ROOT / "bench/results/ptx-counts-b0847b7.md"
    command = [sys.executable, str(ROOT / "bench/ptx_counts.py"), "--archs", "90", "--ops", "drop_path_add"]
    command += ["--before", str(before), "--output", str(tmp_path / "table.md")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "table.md").read_text()
    kernel, whole = read(text)
    assert kernel["kernel"] == "kernel" and whole["kernel"] == "all" and kernel["launches"] == whole["launches"] == "2"
    # Forward and backward move 16 bytes per element; each also reads the scale of the row for every element.
    assert 16 < float(whole["bytes"]) < 20 and whole["exponentials"] == "0" and float(whole["instructions"]) > 5
    assert whole["bound by"] == "bytes" and whole["computed us"] == whole["floor us"] == "63.1"
    (change,) = read(text.split("## Each kernel")[0])
    assert change["launches"] == "2 -> 2" and change["computed us"] == "63.1 -> 63.1"
