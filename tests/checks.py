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
import json, sys, importlib, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
op, kernel, signature, constexprs, options, target = json.load(sys.stdin)
fn = getattr(importlib.import_module("dino_kernels." + op), kernel)
source = ASTSource(fn=fn, signature=signature, constexprs=constexprs)
backend, arch, warp = target
compiled = compile(source, target=GPUTarget(backend, arch, warp), options=options)
print(compiled.asm["ptx" if backend == "cuda" else "amdgcn"])
"""


def compile_kernel(op: str, kernel: str, signature: dict, constexprs: dict, options=None, target=("cuda", 90, 32)):
    """Assembly of one Triton kernel compiled ahead of time; needs no GPU. In a process of its own, because in
    this one the interpreter stands in for the compiler. Arguments in `constexprs` are "constexpr" in the signature.
    """
    request = json.dumps([op, kernel, signature, constexprs, options or {}, target])
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        input=request,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
