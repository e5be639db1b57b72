"""Common helpers for the tests of all ops."""

import contextlib
import importlib

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def use_backend(monkeypatch: pytest.MonkeyPatch, op: str, backend: str, implementations: list[str]) -> str:
    """Select the "cpu" or "triton" implementation of the op of module dino_kernels.ops.<op>; returns the device.

    Without a GPU, the whole op runs on CPU tensors, with its Triton kernels in the interpreter.
    """
    if backend == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    module, kernels = (importlib.import_module(f"dino_kernels.{room}.{op}") for room in ("ops", "triton"))
    for name in implementations:
        monkeypatch.setattr(module, f"_{name}_cpu", getattr(kernels, f"{name}_triton"))
    return "cpu"


def cuda_function(monkeypatch: pytest.MonkeyPatch, op: str):
    """The CUDA function of the op dino_kernels::<op>, for CPU tensors; and a list of its cuBLAS GEMMs.

    GEMMs with out_dtype, which torch supports on CUDA only, are computed from float32 copies here. Each entry of the
    list has a name, the dtype of the operands and the dtype of the sums.
    """
    asked = []
    plain = {"mm": torch.mm, "baddbmm": torch.baddbmm}

    def product(name, *operands, out_dtype=None, out=None):
        *_, left, right = operands
        asked.append((name, left.dtype, out_dtype or left.dtype))
        return plain[name](*(x.to(out_dtype) for x in operands) if out_dtype else operands, out=out)

    for name in plain:
        monkeypatch.setattr(torch, name, lambda *args, name=name, **kwargs: product(name, *args, **kwargs))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    kernel = torch.library.get_kernel(f"dino_kernels::{op}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return lambda *args: kernel.call_boxed(keys, *args), asked


def assert_as_accurate(actual, eager, exact, floor: float) -> None:
    """Error against float64 at most twice that of eager PyTorch in the same dtype, plus floor * max|exact| + 1.2e-7."""
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + floor * exact.abs().max().item() + 1.2e-7
    assert error <= allowed, f"error {error:.3g}, eager's allows {allowed:.3g}"
