"""The kernels for AMX on a processor without: their own tests, on a build that emulates the instructions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_kernels._core.native import _C, DTYPES, Products

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["linear", "mlp", "fused_block", "add_product", "weight_norm", "attention"]


@pytest.mark.slow
@pytest.mark.skipif(
    _C.best_products(dtype=DTYPES[torch.bfloat16]) == Products.amx, reason="they run on the processor's own"
)
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="needs AVX-512")
def test_kernels_for_tiles(tmp_path):
    for name in ("csrc", "dino_kernels", "python_api", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    env = os.environ | {
        "CXX": f"{os.environ.get('CXX', 'g++')} -include {tmp_path / 'tests/helpers/emulated_tiles.h'}",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'python_api'}",
    }

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    run("setup.py", "build_ext", "--inplace")
    output = run("-m", "pytest", "-q", "-k", "not triton", *(f"tests/kernels/test_{name}.py" for name in TESTS))
    assert "with AMX" not in output, "skipped: the build found no AMX"
