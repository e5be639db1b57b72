"""Prints a folder, for PYTHONPATH, with the oldest Triton that pyproject.toml allows; pip installs it there once."""

import re
import shutil
import subprocess
import sys

from machine import ROOT


def main() -> None:
    version = re.search(r"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    folder = ROOT / f"build/triton-{version}"
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial)]
        subprocess.run([*command, f"triton=={version}"], check=True, stdout=sys.stderr)
        partial.rename(folder)
    print(folder)


if __name__ == "__main__":
    main()
