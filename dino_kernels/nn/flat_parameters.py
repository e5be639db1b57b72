"""All weights of a student and its teacher, their gradients, moments and 16-bit copies, in flat buffers of one layout.

The parameters of both nets become views into the buffers, under their own names; the passes after the backward
(clip, AdamW, EMA, copies; the sum over ranks) then walk memory once instead of tensor by tensor.
"""

import contextlib
import mmap
from typing import Any

import torch
from dino_train.common.device import gpu_of
from dino_train.engine.optim import clip_gradients, parameter_groups
from torch import Tensor, nn

from dino_kernels import adamw_ema_step_, ema_update_
from dino_kernels.nn.layers import Linear, PatchEmbed, WeightNormLinear

_ALIGNMENT = 64  # elements: a cache line of the narrowest copies twice over, and what vector loads want


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU with Linux on huge pages, whose addresses are quicker translated in passes over all of it."""
    if gpu_of(device) is not None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


class Arena:
    """Flat buffers, with parameter i of the nets in [offsets[i], offsets[i+1]).

    Args:
        student, teacher: nets with the same parameters; they become views, `.grad` of the student's too.
        precision: of the products: float32, or bfloat16 with copies.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, precision: torch.dtype) -> None:
        self.nets = {"student": student, "teacher": teacher}
        self.parameters = dict(student.named_parameters())
        self.offsets = [0]
        for parameter in self.parameters.values():
            self.offsets.append(self.offsets[-1] - -parameter.numel() // _ALIGNMENT * _ALIGNMENT)
        device = next(student.parameters()).device
        self.grad = _zeros(self.offsets[-1], torch.float32, device)
        self.flat: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor | None] = {}
        self.last_layers: list[WeightNormLinear] = []  # of the student, of the teacher
        for net, module in self.nets.items():
            flat = self.flat[net] = _zeros(len(self.grad), torch.float32, device)
            for name, parameter in module.named_parameters():
                view = self.view(flat, name)
                view.copy_(parameter.data)
                parameter.data = view
            copies = None if precision == torch.float32 else _zeros(len(flat), precision, device)
            self.copies[net] = copies
            self._bind(module, flat if copies is None else copies)
        first, second = self.last_layers
        *_, g, v = self.parameters.values()
        assert g is first.weight_g and v is first.weight_v  # what the optimizer's pass takes for the last layer
        assert first.rows is not None and second.rows is not None
        self.rows = first.rows, second.rows
        self.trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        for name in self.trained:
            self.parameters[name].grad = self.view(self.grad, name)
        self.copy()
        self.materialize()

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The part of a flat buffer that belongs to a parameter, in its shape."""
        begin = self.offsets[list(self.parameters).index(name)]
        shape = self.parameters[name].shape
        return flat[begin : begin + shape.numel()].view(shape)

    def _bind(self, module: nn.Module, copies: Tensor) -> None:
        for path, layer in module.named_modules():
            if isinstance(layer, Linear):
                layer.copies = self.view(copies, f"{path}.weight"), self.view(copies, f"{path}.bias")
            elif isinstance(layer, PatchEmbed):
                weight = self.view(copies, f"{path}.proj.weight")
                layer.copies = weight.flatten(1), self.view(copies, f"{path}.proj.bias")
            elif isinstance(layer, WeightNormLinear):
                # In 16 bit the rows take the place of v's copy, which nobody reads.
                v = self.view(copies, f"{path}.weight_v")
                layer.rows = torch.empty_like(v) if v.dtype == torch.float32 else v
                self.last_layers.append(layer)

    def copy(self) -> None:
        """Renew the copies, where the optimizer's pass did not."""
        for net, copies in self.copies.items():
            if copies is not None:
                copies.copy_(self.flat[net])

    def materialize(self) -> None:
        """Renew the weight-normed layers, where the optimizer's pass did not."""
        for layer in self.last_layers:
            layer.materialize()

    def clear_grad(self) -> None:
        """Zero the gradient; a last layer's, the largest part by far, when it is next added to."""
        self.last_layers[0].stale = True
        self.grad[: self.offsets[-2]].zero_()

    def freeze(self, layer: nn.Module, frozen: bool) -> None:
        """Whether a layer's trained weights get a gradient. Without one an optimizer keeps no moments either."""
        members = {id(parameter) for parameter in layer.parameters()}
        for name in self.trained:
            parameter = self.parameters[name]
            if id(parameter) in members:
                parameter.requires_grad_(not frozen)
                parameter.grad = None if frozen else self.view(self.grad, name)


class AdamWithEMA:
    """AdamW on an arena's student, and the EMA of its teacher, as one pass (`adamw_ema_step_`).

    Its state dict is that of torch.optim.AdamW over `parameter_groups`.
    """

    def __init__(self, arena: Arena, clip_norm: float | None) -> None:
        self.arena, self.clip_norm = arena, clip_norm
        self.param_groups = parameter_groups(arena.nets["student"])
        order = {id(parameter): i for i, parameter in enumerate(arena.parameters.values())}
        # segment of each parameter that a state dict numbers
        self.segments = [order[id(p)] for group in self.param_groups for p in group["params"]]
        count, device = len(arena.parameters), arena.grad.device
        self.exp_avg, self.exp_avg_sq = (_zeros(len(arena.grad), torch.float32, device) for _ in range(2))
        self.steps = torch.zeros(count, dtype=torch.int64, device=device)
        decayed = {order[id(p)] for p in self.param_groups[0]["params"]}
        self.decayed = torch.tensor([i in decayed for i in range(count)], device=device)
        self.frozen = torch.zeros(count, dtype=torch.bool, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int32, device=device)
        self.track_frozen()

    def track_frozen(self) -> None:
        """Follow the parameters' requires_grad."""
        frozen = [not parameter.requires_grad for parameter in self.arena.parameters.values()]
        self.frozen.copy_(torch.tensor(frozen))

    def step(self, lr: float | Tensor, weight_decay: float | Tensor, momentum: float | Tensor) -> None:
        """Update weights, moments, teacher and copies, unless a gradient is not finite: then only `nonfinite`. The
        gradient is cleared."""
        arena = self.arena
        adamw_ema_step_(
            arena.flat["student"],
            arena.grad,
            self.exp_avg,
            self.exp_avg_sq,
            arena.flat["teacher"],
            offsets=arena.offsets,
            steps=self.steps,
            decayed=self.decayed,
            frozen=self.frozen,
            nonfinite=self.nonfinite,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            clip_norm=self.clip_norm,
            student_16=arena.copies["student"],
            teacher_16=arena.copies["teacher"],
            rows=arena.rows,
            cleared=len(arena.parameters) - 1,
        )
        arena.last_layers[0].stale = True

    def state_dict(self) -> dict[str, Any]:
        steps, names = self.steps.tolist(), list(self.arena.parameters)
        state, groups, first = {}, [], 0
        for i, segment in enumerate(self.segments):
            if steps[segment]:
                state[i] = {
                    "step": torch.tensor(float(steps[segment])),
                    "exp_avg": self.arena.view(self.exp_avg, names[segment]),
                    "exp_avg_sq": self.arena.view(self.exp_avg_sq, names[segment]),
                }
        for group in self.param_groups:
            numbers = list(range(first, first + len(group["params"])))
            first += len(numbers)
            groups.append({"betas": (0.9, 0.999), "eps": 1e-8, **group, "params": numbers})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = list(self.arena.parameters)
        for moments in (self.exp_avg, self.exp_avg_sq, self.steps):
            moments.zero_()
        for i, saved in state["state"].items():
            segment = self.segments[i]
            self.steps[segment] = int(saved["step"])
            for key, flat in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
                self.arena.view(flat, names[segment]).copy_(saved[key])


class TorchWithEMA:
    """A torch optimizer on an arena's student, then the EMA of its teacher, the copies and a cleared gradient.

    It has no guard of its own: a gradient that is not finite must not reach it.
    """

    def __init__(self, arena: Arena, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
        self.arena, self.optimizer, self.clip_norm = arena, optimizer, clip_norm

    def step(self, lr: float, weight_decay: float, momentum: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay  # the other group never decays
        if self.clip_norm is not None:
            clip_gradients(self.arena.parameters.values(), self.clip_norm)
        self.optimizer.step()
        ema_update_([self.arena.flat["teacher"]], [self.arena.flat["student"]], momentum)
        self.arena.copy()
        self.arena.materialize()
        self.arena.clear_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
