"""How ops are registered: like torch.library.custom_op, whose first call loads torch's compiler (75 MiB, seconds)."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

__all__ = ["custom_op"]

_LIBRARY = torch.library.Library("dino_kernels", "FRAGMENT")


class _Op:
    """An op with a kernel a device, and what autograd and fake tensors need of it."""

    def __init__(self, function: Callable[..., Any], name: str, mutates_args: Sequence[str]) -> None:
        self.name = name
        parameters = list(inspect.signature(function).parameters)
        self.mutated = [parameters.index(argument) for argument in mutates_args]
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        self.register_kernel("cpu")(function)
        if schema.endswith("-> ()"):
            self.register_fake(lambda *_: None)

    def register_kernel(self, device: str) -> Callable[[Callable[..., Any]], None]:
        def register(function: Callable[..., Any]) -> None:
            def run(*args: Any) -> Any:
                result = function(*args)
                for i in self.mutated:  # or autograd would not notice that a tensor it saved was written
                    if args[i] is not None:
                        increment_version(args[i])
                return result

            _LIBRARY.impl(self.name, run if self.mutated else function, device.upper())

        return register

    def register_fake(self, function: Callable[..., Any]) -> None:
        torch.library.register_fake(f"dino_kernels::{self.name}", function, lib=_LIBRARY)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        name = f"dino_kernels::{self.name}"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], _Op]:
    """Registers dino_kernels::<name> with the decorated function as its CPU kernel and its schema."""
    return lambda function: _Op(function, name, mutates_args)
