"""The ops of dino_kernels on the emulator."""

import importlib
from pathlib import Path

import dino_kernels

FOLDER = Path(dino_kernels.__file__).parent


def use_triton(setattr=setattr) -> None:
    """Lets every op on CPU tensors run its Triton kernels, as tests/checks.py does for one."""
    for path in sorted(FOLDER.glob("?*_triton.py")):
        op = path.stem.removesuffix("_triton")
        if not (FOLDER / f"{op}.py").exists():  # kernels that several ops share
            continue
        module = importlib.import_module(f"dino_kernels.{op}")
        for name, function in vars(importlib.import_module(f"dino_kernels.{path.stem}")).items():
            if name.endswith("_triton") and hasattr(module, cpu := f"_{name.removesuffix('_triton')}_cpu"):
                setattr(module, cpu, function)
