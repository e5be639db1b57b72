"""Every Triton kernel compiles for every chip, without a GPU, and fits it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Made in a process of its own, because in this one the interpreter stands in for the compiler."""
    folder = tmp_path_factory.mktemp("resources")
    command = [sys.executable, str(ROOT / "bench/resources.py"), "--output", str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "resources.md").read_text().count("\n| ") == len(rows := read(folder)) + 1
    return rows


def read(folder: Path) -> list[dict]:
    return json.loads((folder / "resources.json").read_text())


def kernels_in_source() -> set[str]:
    """Names of the kernels that some launch `_name_kernel[grid](...)` names."""
    source = "".join(path.read_text() for path in (ROOT / "dino_kernels").glob("*.py"))
    return {name.strip("_") for name in re.findall(r"\b(_\w*kernel)\[", source)}


def test_every_launched_kernel_is_compiled_for_every_target(rows):
    assert len(kernels_in_source()) > 15
    for target in SHARED_LIMITS:
        assert {row["kernel"] for row in rows if row["target"] == target} == kernels_in_source(), target


def test_nothing_spills_and_shared_memory_suffices(rows):
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] > 0 and row["shared_bytes"] <= SHARED_LIMITS[row["target"]], row


def test_products_use_the_matrix_instruction_of_the_chip(rows):
    expected = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    products = [row for row in rows if row["constants"].get("PRECISION") == "tf32"]  # 16-bit operands
    assert {row["op"] for row in products} == {"attention", "dino_head_loss"}
    for row in products:
        assert row["matrix_instruction"] == expected[row["target"]], row


def test_no_reduction_uses_atomics(rows):
    """One ticket counter tells the loss which program is the last; nothing is summed by atomics."""
    assert {row["kernel"] for row in rows if row["atomics"]} == {"student_kernel"}


def test_the_committed_table_is_of_these_kernels(rows):
    """`make resources` renews it. Registers may differ with Triton's version; what is launched may not."""

    def launches(table):
        return {(row["op"], row["kernel"], json.dumps(row["constants"]), row["target"]) for row in table}

    assert launches(read(ROOT / "bench/results")) == launches(rows)
