"""How ops are registered: like torch.library.custom_op, whose first call loads torch's compiler (75 MiB, seconds)."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from dino_kernels._core.backends import GpuKernel

__all__ = ["custom_op", "on_plain_cpu", "without_autograd"]

_OPS: dict[str, "_Op"] = {}
_LIBRARY = torch.library.Library("dino_kernels", "FRAGMENT")


class _Op:
    """An op with a kernel a device, and what autograd and fake tensors need of it."""

    def __init__(self, function: Callable[..., Any], name: str, mutates_args: Sequence[str]) -> None:
        self.name = name
        parameters = list(inspect.signature(function).parameters)
        self.mutated = [parameters.index(argument) for argument in mutates_args]
        self.kernels: dict[str, Callable[..., Any]] = {}
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        self.cpu = self.register_kernel("cpu")(function)
        if schema.endswith("-> ()"):
            self.register_fake(lambda *_: None)

    def register_kernel(self, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                result = function(*args)
                for i in self.mutated:  # or autograd would not notice that a tensor it saved was written
                    if args[i] is not None:
                        increment_version(args[i])
                return result

            kernel = run if self.mutated else function
            self.kernels[device] = kernel
            _LIBRARY.impl(self.name, kernel, device.upper())
            return kernel

        return register

    def __call__(self, *args: Any) -> Any:
        if on_plain_cpu(args[0]):
            return self.cpu(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.dino_kernels, self.name)(*args)

    def register_fake(self, function: Callable[..., Any]) -> None:
        torch.library.register_fake(f"dino_kernels::{self.name}", function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        name = f"dino_kernels::{self.name}"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)


def on_plain_cpu(x: Any) -> bool:
    """Whether x has memory of the host, and nobody but its kernel wants to see an op on it."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    return plain and not torch._C._len_torch_dispatch_stack() and not torch.compiler.is_compiling()


def custom_op(
    name: str,
    *,
    mutates_args: Sequence[str] = (),
    triton: str | None = None,
    cuda: str | None = None,
    fits: Callable[..., bool] = lambda *_: True,
) -> Callable[[Callable[..., Any]], _Op]:
    """Registers dino_kernels::<name> with the decorated function as its CPU kernel and its schema.

    triton, cuda, fits: its kernels on a GPU, of `GpuKernel`, with the arguments of the op. An op without them registers
        a function of its own by `register_kernel("cuda")`.
    """

    def register(function: Callable[..., Any]) -> _Op:
        op = _OPS[name] = _Op(function, name, mutates_args)
        if triton is not None:
            op.register_kernel("cuda")(GpuKernel(triton=triton, cuda=cuda, fits=fits))
        return op

    return register


def without_autograd(name: str) -> Callable[..., Any]:
    """The op dino_kernels::<name> for `dino_kernels.nn`, which keeps gradients itself: its arguments are not checked.

    On CPU tensors it skips torch's dispatcher, which costs more than the smaller ops do.
    """
    return _OPS[name]
