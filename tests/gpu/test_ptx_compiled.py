"""The quick part of compiled_*.py for both architectures, in a process each: this process uses Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.ptx


@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_compiled_kernels_compute_the_right_numbers_without_findings(arch):
    command = [sys.executable, "-m", "pytest", "-p", "ptx.pytest_plugin", "-p", "no:cacheprovider", "--ptx-arch"]
    command += [str(arch), *map(str, sorted(HERE.glob("compiled_*.py")))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), environment.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-5000:].decode()


def test_make_prove_runs_every_test_of_a_triton_kernel_on_both_chips():
    from prove import jobs, run

    arguments = [" ".join(job[0]) for job in jobs("folder")]
    for path in HERE.parent.glob("test_*.py"):
        if "use_backend(" in path.read_text():
            for arch in (80, 90):
                assert any(f"--ptx-arch {arch} " in line and line.endswith(path.name) for line in arguments), path
    assert run((["--version"], "")) and not run((["no/such/test.py"], ""))
