"""All checks of the kernels without a GPU that take too long for the test suite: `make prove`.

The tests of Triton kernels with compiled code for sm_80 and sm_90; compiled_*.py completely, with errors in approximate
functions and scalar arguments by address, and with the oldest Triton; tests marked `prove`.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALL = ["-m", ""]  # including tests marked `prove`
COMPILED = sorted(map(str, (ROOT / "tests/gpu").glob("compiled_*.py")))


def jobs(oldest: str) -> list[tuple[list[str], str]]:
    """Arguments of pytest, and a folder that is first in its import path."""
    found = [(["-m", "prove", "tests"], "")]
    for arch in ("90", "80"):
        emulated = ["-p", "ptx.pytest_plugin", "--ptx-arch", arch]
        for path in sorted((ROOT / "tests/kernels").glob("test_*.py")):
            if "use_backend(" in path.read_text():
                found.append(([*emulated, "-m", "not prove", "-k", "triton", str(path)], ""))
        found.append(([*emulated, *ALL, "--ptx-seed", "1", "--ptx-noise", "--ptx-pointers", *COMPILED], ""))
        if oldest:
            found.append(([*emulated, *ALL, *COMPILED], oldest))
    return found


def run(job: tuple[list[str], str]) -> bool:
    arguments, first = job
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [first, str(ROOT / "tests/gpu"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1:] or [done.stderr[-300:]]
    shown = " ".join(argument.removeprefix(f"{ROOT}/") for argument in arguments if argument not in COMPILED)
    print(
        f"{time.monotonic() - begin:4.0f} s  {shown}{' with the oldest Triton' if first else ''}: {summary[0]}",
        flush=True,
    )
    if done.returncode:
        print(done.stdout[-20000:], done.stderr[-2000:], flush=True)
    return done.returncode == 0


def main() -> None:
    found = subprocess.run([sys.executable, str(ROOT / "bench/oldest_triton.py")], capture_output=True, text=True)
    if found.returncode:
        print(f"the oldest Triton cannot be installed and is skipped: {found.stderr[-300:]}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(run, jobs(found.stdout.strip())))
    print(f"{sum(passed)} of {len(passed)} runs passed")
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
