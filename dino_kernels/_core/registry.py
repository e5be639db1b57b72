"""How ops are registered: like torch.library.custom_op, whose first call loads torch's compiler (75 MiB, seconds)."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from dino_kernels._core.backends import GpuKernel

__all__ = ["custom_op", "on_plain_cpu", "once_differentiable", "without_autograd"]

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
        once = once_differentiable(self.name, f"dino_kernels.{self.name}_reference")(backward)
        torch.library.register_autograd(f"dino_kernels::{self.name}", once, setup_context=setup_context, lib=_LIBRARY)


class _Gradients(torch.autograd.Function):
    """Gradients as they are, and an error where they are differentiated."""

    @staticmethod
    def forward(ctx, message, *grads):  # type: ignore[override]
        ctx.message = message
        return grads

    @staticmethod
    def backward(ctx, *_):  # type: ignore[override]
        raise RuntimeError(ctx.message)


def once_differentiable(name: str, instead: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Has the gradients that a backward function returns raise where they are differentiated; it is not called where
    no result got a gradient.

    torch's decorator of that name does so only if the gradient from above needs a gradient; that of a sum does not, and
    then the second derivative would silently be zero.

    name, instead: what has no second derivative, and what has.
    """
    message = f"{name} has no second derivative (create_graph=True); for one take {instead}"

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def run(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return results
            return _Gradients.apply(message, *(x if x is None else x.detach().requires_grad_() for x in results))

        return run

    return decorate


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
