"""All parameters of a module in one buffer, and their gradients and 16-bit copies in others of the same layout.

Passes over all weights (an optimizer's step, a teacher's moving average, a sum over processes) then walk memory once in
place of tensor by tensor.
"""

import contextlib
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dino_kernels._core.device import on_gpu
from dino_kernels._core.native import DTYPES
from dino_kernels.nn.layers import LayerScale, Linear, PatchEmbed, WeightNormLinear
from dino_kernels.ops.adamw_ema import adamw_ema_step_
from dino_kernels.ops.sgd_ema import sgd_ema_step_

__all__ = ["FlatParameters"]

_ALIGNMENT = 64  # elements: two cache lines of 16-bit copies, and more than the widest vector


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU with Linux in huge pages, which need fewer address translations in passes over all of it."""
    if on_gpu(device) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


class FlatParameters:
    """Parameter i of a module lies in elements [offsets[i], offsets[i+1]) of each of N elements, padded with zeros.

    Args:
        module: its parameters, float32 and on one device, become views of `weights`, in the order and under the names
            of named_parameters(); the `.grad` of those that require a gradient become views of `grad`. The layers of
            `dino_kernels.nn` then multiply by `copies`. Other parameters keep torch's arithmetic.
        dtype: of the products of these layers: float32, float16 or bfloat16.

    Attributes:
        parameters: the module's, by name.
        trained: the names of those that required a gradient.
        offsets: S + 1 bounds, multiples of 64.
        weights: float32 [N].
        grad: float32 [N]; empty if nothing is trained.
        copies: [N] in `dtype`, the rounded weights; None for float32.

    Raises:
        ValueError: no parameter, one that is not float32 or on another device, or another dtype.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.parameters = dict(module.named_parameters())
        kinds = {(parameter.dtype, parameter.device) for parameter in self.parameters.values()}
        if len(kinds) != 1 or next(iter(kinds))[0] != torch.float32 or dtype not in DTYPES:
            raise ValueError(
                "parameters must be float32 and on one device and dtype float32, float16 or bfloat16, "
                f"got {sorted(map(str, kinds))} and {dtype}"
            )
        self.offsets = [0]
        for parameter in self.parameters.values():
            self.offsets.append(self.offsets[-1] - -parameter.numel() // _ALIGNMENT * _ALIGNMENT)
        self._segments = {name: i for i, name in enumerate(self.parameters)}
        self._device = next(iter(kinds))[1]
        self.trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.grad = self.zeros() if self.trained else torch.empty(0, device=self._device)
        self.weights = self.zeros()
        for name, parameter in self.parameters.items():
            view = self.view(self.weights, name)
            view.copy_(parameter.data)
            parameter.data = view
        for name in self.trained:
            self.parameters[name].grad = self.view(self.grad, name)
        self.copies = None if dtype == torch.float32 else _zeros(self.offsets[-1], dtype, self._device)
        self._give_copies(module)
        self.renew()

    def zeros(self) -> Tensor:
        """A float32 buffer of this layout [N], for an optimizer's moments."""
        return _zeros(self.offsets[-1], torch.float32, self._device)

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The part of a buffer of this layout that belongs to a parameter, in its shape."""
        begin, shape = self.offsets[self._segments[name]], self.parameters[name].shape
        return buffer[begin : begin + shape.numel()].view(shape)

    def _give_copies(self, module: nn.Module) -> None:
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        read = self.weights if self.copies is None else self.copies
        layers = [m for m in module.modules() if isinstance(m, Linear | PatchEmbed | WeightNormLinear | LayerScale)]
        for layer in layers:
            layer.use_copies(lambda parameter: self.view(read, names[id(parameter)]))
        self._weight_normed = [layer for layer in layers if isinstance(layer, WeightNormLinear)]
        self._scales = [layer for layer in layers if isinstance(layer, LayerScale)]
        self._segments_of_v = [self._segments[names[id(layer.weight_v)]] for layer in self._weight_normed]
        # The kernels of a step renew the rows of one layer, whose g and v are the last two segments.
        end = list(self.parameters.values())[-2:]
        ends = [layer for layer in self._weight_normed if [*map(id, layer.parameters())] == [*map(id, end)]]
        self._renewed_by_step = ends[0] if ends else None

    def renew(self) -> None:
        """Write copies, the rows of weight-normed layers and what layer scale multiplies by, from the weights: after
        these were changed by anything but a step of this class."""
        if self.copies is not None:
            self.copies.copy_(self.weights)
        for layer in self._weight_normed:
            layer.materialize()
        for scale in self._scales:
            scale.materialize()

    def overwrite_grads(self) -> None:
        """Has the next backward pass overwrite what weight-normed layers hold as the gradient of v, in place of adding
        to it: these are large, and to clear them takes a pass over memory. Each layer must take part in it."""
        for layer in self._weight_normed:
            layer.overwrite_grad = True

    def clear_grad(self) -> None:
        """Zero the gradient; that of a weight-normed layer's v as `overwrite_grads` does."""
        begin = 0
        for segment in self._segments_of_v:
            self.grad[begin : self.offsets[segment]].zero_()
            begin = self.offsets[segment + 1]
        self.grad[begin:].zero_()
        self.overwrite_grads()

    def freeze(self, layer: nn.Module, frozen: bool) -> None:
        """Whether a layer's trained weights get a gradient. Without one an optimizer keeps no moments either."""
        members = {id(parameter) for parameter in layer.parameters()}
        for name in self.trained:
            parameter = self.parameters[name]
            if id(parameter) in members:
                parameter.requires_grad_(not frozen)
                parameter.grad = None if frozen else self.view(self.grad, name)

    def adamw_ema_step_(self, teacher: "FlatParameters", exp_avg: Tensor, exp_avg_sq: Tensor, **options: Any) -> None:
        """`dino_kernels.adamw_ema_step_` of these weights and a teacher's; the gradient is then as after `clear_grad`.

        Args:
            teacher: of the same layout.
            exp_avg, exp_avg_sq: moments, of `zeros()` at first.
            options: steps, decayed, frozen, nonfinite, lr, weight_decay, momentum; lr_scale, clip_norm, clip_groups,
                betas, eps.

        Raises:
            ValueError: the layouts differ, or as `dino_kernels.adamw_ema_step_`.
        """
        self._step(adamw_ema_step_, teacher, exp_avg, exp_avg_sq, **options)

    def sgd_ema_step_(self, teacher: "FlatParameters", momentum_buffer: Tensor, **options: Any) -> None:
        """`dino_kernels.sgd_ema_step_` of these weights and a teacher's; the gradient is then as after `clear_grad`.

        Args:
            teacher: of the same layout.
            momentum_buffer: of `zeros()` at first.
            options: decayed, adapted, frozen, nonfinite, lr, weight_decay, momentum; momentum_sgd, larc, eta, eps,
                clip_norm.

        Raises:
            ValueError: the layouts differ, or as `dino_kernels.sgd_ema_step_`.
        """
        self._step(sgd_ema_step_, teacher, momentum_buffer, **options)

    def _step(self, op: Callable[..., None], teacher: "FlatParameters", *moments: Tensor, **options: Any) -> None:
        if teacher.offsets != self.offsets:
            raise ValueError("teacher must have parameters of the same sizes in the same order")
        ours, theirs = self._renewed_by_step, teacher._renewed_by_step
        rows = None
        if ours is not None and theirs is not None:
            assert ours.rows is not None and theirs.rows is not None
            rows = ours.rows, theirs.rows
        op(
            self.weights,
            self.grad,
            *moments,
            teacher.weights,
            offsets=self.offsets,
            student_16=self.copies,
            teacher_16=teacher.copies,
            rows=rows,
            cleared=len(self.parameters) - (rows is not None),
            **options,
        )
        for layer in self._weight_normed + teacher._weight_normed:
            if rows is None or layer not in (ours, theirs):
                layer.materialize()
        for scale in self._scales + teacher._scales:
            scale.materialize()
        self.overwrite_grads()
