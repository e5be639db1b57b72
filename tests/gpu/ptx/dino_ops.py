"""The ops of dino_kernels on the emulator."""

import importlib
from pathlib import Path

import dino_kernels

FOLDER = Path(dino_kernels.__file__).parent


def use_triton(setattr=setattr) -> None:
    """Make every op run its Triton kernels on CPU tensors, as tests/helpers/checks.py does for one op."""
    for path in sorted((FOLDER / "triton").glob("*.py")):
        if not (FOLDER / "ops" / path.name).exists() or path.stem == "__init__":  # kernels shared by several ops
            continue
        module, kernels = (importlib.import_module(f"dino_kernels.{room}.{path.stem}") for room in ("ops", "triton"))
        for name, function in vars(kernels).items():
            if name.endswith("_triton") and hasattr(module, cpu := f"_{name.removesuffix('_triton')}_cpu"):
                setattr(module, cpu, function)
