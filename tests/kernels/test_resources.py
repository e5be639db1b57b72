"""Every Triton kernel compiles for every chip without a GPU, and fits it, by the installed and the oldest Triton."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TABLES = sorted((ROOT / "bench/results").glob("resources-triton-*.md"))


@pytest.fixture(
    scope="module",
    params=[pytest.param("installed", marks=pytest.mark.slow), pytest.param("oldest", marks=pytest.mark.prove)],
)
def rows(request, tmp_path_factory):
    """Made in a process of its own, because in this one the interpreter stands in for the compiler."""
    folder, environment = tmp_path_factory.mktemp("resources"), {**os.environ, "TRITON_INTERPRET": "0"}
    if request.param == "oldest":
        found = subprocess.run([sys.executable, str(ROOT / "bench/oldest_triton.py")], capture_output=True, text=True)
        if found.returncode:
            pytest.skip(f"the oldest Triton cannot be installed here: {found.stderr[-300:]}")
        environment["PYTHONPATH"] = os.pathsep.join([found.stdout.strip(), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "bench/resources.py"), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (table,) = folder.iterdir()
    return read(table)


def read(table: Path) -> list[dict]:
    lines = [line.strip("| ").split(" | ") for line in table.read_text().splitlines() if line.startswith("| ")]
    return [
        {key: int(cell) if cell.isdigit() else cell for key, cell in zip(lines[0], line, strict=True)}
        for line in lines[1:]
    ]


def kernels_in_source() -> set[str]:
    """Names of the kernels that some launch `_name_kernel[grid](...)` names."""
    source = "".join(path.read_text() for path in (ROOT / "dino_kernels").rglob("*.py"))
    return {name.strip("_") for name in re.findall(r"\b(_\w*kernel)\[", source)}


def test_every_launched_kernel_is_compiled_for_every_target(rows):
    assert len(kernels_in_source()) > 15
    for target in SHARED_LIMITS:
        assert {row["kernel"] for row in rows if row["target"] == target} == kernels_in_source(), target


def test_nothing_spills_and_shared_memory_suffices(rows):
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] > 0 and row["shared"] <= SHARED_LIMITS[row["target"]], row


def test_products_use_the_matrix_instruction_of_the_chip(rows):
    expected = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    products = [row for row in rows if "PRECISION=tf32" in row["constants"] or row["op"] == "mlp"]  # 16-bit operands
    assert {row["op"] for row in products} == {"attention", "dino_head_loss", "info_nce", "mlp"}
    for row in products:
        assert row["matrix"] == expected[row["target"]], row


def test_no_reduction_uses_atomics(rows):
    """One ticket counter tells a loss which program is the last; nothing is summed by atomics."""
    assert {row["kernel"] for row in rows if row["atomics"]} == {"student_kernel", "patch_kernel"}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_the_committed_tables_are_of_these_kernels(rows, table):
    """`make resources` renews them. Registers may differ with Triton's version; what is launched may not."""

    def launches(rows):
        return {(row["op"], row["kernel"], row["constants"], row["target"]) for row in rows}

    assert launches(read(table)) == launches(rows)


def test_there_is_a_table_of_the_oldest_triton_and_of_a_newer_one():
    oldest = re.search(r"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    assert len(TABLES) == 2 and TABLES[0].stem.startswith(f"resources-triton-{oldest}")


def test_lengths_of_loops():
    from resources import loops

    def code(*lines):
        return "\n".join(line if line.endswith(":") else f"        /*0000*/    {line} ;" for line in lines)

    inner = (".L_x_1:", "FADD R0", "@P0 BRA `(.L_x_1)")
    nested = (".L_x_0:", "MOV R0", *inner, "FADD R1", "@P1 BRA `(.L_x_0)", "EXIT", ".L_x_2:", "BRA `(.L_x_2)")
    assert loops(code(*nested)) == [2] and loops(code(*inner, "NOP", *inner)) == [2, 2]
