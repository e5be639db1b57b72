"""What the tests of all ops share."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def use_backend(monkeypatch: pytest.MonkeyPatch, op: str, backend: str, implementations: list[str]) -> str:
    """Makes the op of module dino_kernels.<op> run its "cpu" or its "triton" implementation; returns the device.

    Without a GPU the Triton kernels run in the interpreter, through the whole op, on CPU tensors.
    """
    if backend == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    module = importlib.import_module(f"dino_kernels.{op}")
    for name in implementations:
        monkeypatch.setattr(module, f"_{name}_cpu", getattr(module, f"_{name}_triton"))
    return "cpu"


def assert_as_accurate(actual, eager, exact, floor: float) -> None:
    """Error against float64 at most twice that of eager PyTorch in the same dtype, plus floor * max|exact| + 1.2e-7."""
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + floor * exact.abs().max().item() + 1.2e-7
    assert error <= allowed, f"error {error:.3g}, eager's allows {allowed:.3g}"


_COMPILE = """
import importlib, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
op, kernels, target = json.load(sys.stdin)
module, assembly = importlib.import_module("dino_kernels." + op), {}
for name, (tensors, constants, options) in kernels.items():
    signature = {**tensors, **{constant: "constexpr" for constant in constants}}
    source = ASTSource(fn=getattr(module, name), signature=signature, constexprs=constants)
    assembly[name] = compile(source, target=GPUTarget(*target), options=options).asm
print(json.dumps({name: asm["ptx" if "ptx" in asm else "amdgcn"] for name, asm in assembly.items()}))
"""


def compile_kernels(op: str, kernels: dict[str, tuple[dict, dict, dict]], target=("cuda", 90, 32)) -> dict[str, str]:
    """Assembly of an op's Triton kernels by name, compiled ahead of time; needs no GPU.

    Args:
        op: module of dino_kernels.
        kernels: name to (types of the tensors and sizes, values of the constants, options such as num_warps).
        target: (backend, architecture, warp size).

    In a process of its own, because in this one the interpreter stands in for the compiler.
    """
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        input=json.dumps([op, kernels, target]),
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
