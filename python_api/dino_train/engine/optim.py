"""Schedules, parameter groups and optimizers, as in the reference."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dino_kernels.nn import FlatParameters


def cosine_schedule(
    start: float, end: float, steps: int, *, warmup_steps: int = 0, warmup_start: float = 0.0
) -> np.ndarray:
    """One value per step, float64 [steps]: linear from warmup_start to start, then half a cosine to end.

    As utils.py:187-198: the warm-up includes its end point, so `start` appears twice. A warm-up longer than the run is
    cut off (the reference fails on it).
    """
    warmup = np.linspace(warmup_start, start, warmup_steps)
    cosine_steps = max(0, steps - warmup_steps)
    phase = np.arange(cosine_steps) / max(1, cosine_steps)
    cosine = end + 0.5 * (start - end) * (1 + np.cos(np.pi * phase))
    return np.concatenate([warmup, cosine])[:steps]


def teacher_temp_schedule(warmup: float, temp: float, warmup_epochs: int, epochs: int) -> np.ndarray:
    """One teacher temperature per epoch, [epochs]: linear during the warm-up, then constant (main_dino.py:372-376)."""
    linear = np.linspace(warmup, temp, warmup_epochs)
    return np.concatenate([linear, np.full(max(0, epochs - warmup_epochs), temp)])[:epochs]


def parameter_groups(model: nn.Module, decay_all: bool = False) -> list[dict]:
    """Trainable parameters in two groups: with weight decay, and without (biases and vectors; utils.py:632-643), which
    decay too if decay_all.

    Weight decay is applied to the class token, the position embedding and weight_g, as in the reference.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain} if decay_all else {"params": plain, "weight_decay": 0.0}]


_EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed", "mask_token", "register_tokens")


def rate_factors(student: nn.Module, layer_decay: float, patch_embed_lr: float) -> list[float]:
    """Factor of the learning rate of each parameter of a student with a ViT: layer_decay to the power of the layers
    above it, and of the patch embedding also patch_embed_lr.

    Block i of D has D - i above it, the embeddings have D + 1, the last norm and the heads none (get_vit_lr_decay_rate
    of DINOv2, utils/param_groups.py).
    """
    depth = len([*student.get_submodule("backbone.blocks").children()])
    factors = []
    for name, _ in student.named_parameters():
        part, *rest = name.split(".")
        above = 0
        if part == "backbone" and rest[0] == "blocks":
            above = depth - int(rest[1])
        elif part == "backbone" and rest[0] in _EMBEDDINGS:
            above = depth + 1
        factors.append(layer_decay**above * (patch_embed_lr if rest[0] == "patch_embed" else 1.0))
    return factors


def modules_of(student: nn.Module) -> list[int]:
    """Number of the child of the student (backbone, head) that each parameter belongs to."""
    children = [name for name, _ in student.named_children()]
    return [children.index(name.split(".")[0]) for name, _ in student.named_parameters()]


class OptimizerWithEMA:
    """An optimizer of a student, and the EMA of its teacher, as one pass over flat buffers.

    Its state dict is that of the optimizer in torch.optim over `parameter_groups`.
    """

    moments: ClassVar[tuple[str, ...]]  # their names in a state dict
    settings: ClassVar[dict[str, Any]]  # of each group there

    def __init__(self, student: FlatParameters, teacher: FlatParameters, groups: list[dict], clip_norm: float | None):
        self.student, self.teacher, self.param_groups, self.clip_norm = student, teacher, groups, clip_norm
        names = {id(parameter): name for name, parameter in student.parameters.items()}
        # name of each parameter that a state dict numbers
        self.names = [names[id(p)] for group in self.param_groups for p in group["params"]]
        self.buffers = [student.zeros() for _ in self.moments]
        decayed = {names[id(p)] for group in self.param_groups if "weight_decay" not in group for p in group["params"]}
        self.decayed = self.flags([name in decayed for name in student.parameters])
        self.frozen = torch.zeros_like(self.decayed)
        self.nonfinite = torch.zeros((), dtype=torch.int32, device=student.weights.device)
        self.track_frozen()

    def flags(self, values: list[bool]) -> Tensor:
        return torch.tensor(values, device=self.student.weights.device)

    def track_frozen(self) -> None:
        """Follow the parameters' requires_grad."""
        frozen = [not parameter.requires_grad for parameter in self.student.parameters.values()]
        self.frozen.copy_(torch.tensor(frozen))

    def step(self, lr: float | Tensor, weight_decay: float | Tensor, momentum: float | Tensor) -> None:
        """Update weights, moments, teacher and copies, unless a gradient is not finite: then only `nonfinite`. The
        gradient is cleared."""
        self._step(
            decayed=self.decayed,
            frozen=self.frozen,
            nonfinite=self.nonfinite,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            clip_norm=self.clip_norm,
        )

    def _step(self, **options: Any) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        state, groups, first = {}, [], 0
        for i, name in enumerate(self.names):
            moments = zip(self.moments, self.buffers, strict=True)
            state[i] = {key: self.student.view(buffer, name) for key, buffer in moments}
        for group in self.param_groups:
            numbers = list(range(first, first + len(group["params"])))
            first += len(numbers)
            groups.append({**self.settings, **group, "params": numbers})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for buffer in self.buffers:
            buffer.zero_()
        for i, saved in state["state"].items():
            for key, buffer in zip(self.moments, self.buffers, strict=True):
                self.student.view(buffer, self.names[i]).copy_(saved[key])


class AdamWithEMA(OptimizerWithEMA):
    """AdamW (`adamw_ema_step_`).

    lr_scale, clip_groups: of each parameter the factor of its rate, and the number of those it is clipped with.
    """

    moments = "exp_avg", "exp_avg_sq"
    settings: ClassVar = {"betas": (0.9, 0.999), "eps": 1e-8}

    def __init__(
        self,
        student: FlatParameters,
        teacher: FlatParameters,
        groups: list[dict],
        clip_norm: float | None,
        lr_scale: list[float] | None = None,
        clip_groups: list[int] | None = None,
    ) -> None:
        super().__init__(student, teacher, groups, clip_norm)
        device = student.weights.device
        self.lr_scale = None if lr_scale is None else torch.tensor(lr_scale, device=device)
        self.clip_groups = None if clip_groups is None else torch.tensor(clip_groups, device=device)
        self.segments = {name: i for i, name in enumerate(student.parameters)}
        self.steps = torch.zeros(len(self.segments), dtype=torch.int64, device=device)

    def _step(self, **options: Any) -> None:
        options |= {"steps": self.steps, "lr_scale": self.lr_scale, "clip_groups": self.clip_groups}
        self.student.adamw_ema_step_(self.teacher, *self.buffers, **options)

    def state_dict(self) -> dict[str, Any]:
        state, steps = super().state_dict(), self.steps.tolist()
        counts = {i: steps[self.segments[name]] for i, name in enumerate(self.names)}
        entries = {i: {"step": torch.tensor(float(count)), **state["state"][i]} for i, count in counts.items() if count}
        return {**state, "state": entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps.zero_()
        for i, saved in state["state"].items():
            self.steps[self.segments[self.names[i]]] = int(saved["step"])


class SgdWithEMA(OptimizerWithEMA):
    """Momentum SGD, LARS, which scales the update of each matrix, or LARC, of each tensor (`sgd_ema_step_`)."""

    moments = ("momentum_buffer",)
    settings: ClassVar = {"momentum": 0.9}

    def __init__(
        self,
        student: FlatParameters,
        teacher: FlatParameters,
        groups: list[dict],
        clip_norm: float | None,
        kind: Literal["sgd", "lars", "larc"],
    ) -> None:
        super().__init__(student, teacher, groups, clip_norm)
        self.larc = kind == "larc"
        matrices = [parameter.ndim != 1 for parameter in student.parameters.values()]
        self.adapted = self.flags([self.larc or (kind == "lars" and matrix) for matrix in matrices])

    def _step(self, **options: Any) -> None:
        self.student.sgd_ema_step_(
            self.teacher, *self.buffers, adapted=self.adapted, larc=self.larc, momentum_sgd=0.9, **options
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["state"].items()  # lars wrote "mu" in 0.1
        buffers = {i: {"momentum_buffer": entry.get("mu", entry.get("momentum_buffer"))} for i, entry in saved}
        super().load_state_dict({"state": buffers})
