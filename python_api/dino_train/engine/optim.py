"""Schedules, parameter groups, gradient clipping and optimizers, as in the reference."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino_kernels import ema_update_
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


def parameter_groups(model: nn.Module) -> list[dict]:
    """Trainable parameters in two groups: with weight decay, and without (biases and vectors; utils.py:632-643).

    Weight decay is applied to the class token, the position embedding and weight_g, as in the reference.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale each gradient tensor separately to an L2 norm of at most max_norm (utils.py:132-141), in place."""
    grads = [p.grad for p in parameters if p.grad is not None]
    scales = torch._foreach_norm(grads)
    torch._foreach_add_(scales, 1e-6)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, max_norm)
    torch._foreach_clamp_max_(scales, 1.0)
    torch._foreach_mul_(grads, scales)


class LARS(torch.optim.Optimizer):
    """SGD with momentum, with updates scaled by the norm of each tensor (You et al. 2017; utils.py:553-591).

    For tensors of more than one dimension d = grad + weight_decay * w and d *= eta |w| / |d| (1 if either norm
    is 0); for vectors d = grad. mu = momentum * mu + d, w -= lr * mu.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, d: Tensor, group: dict) -> None:
        if p.ndim != 1:
            d = d.add(p, alpha=group["weight_decay"])
            w_norm, d_norm = p.norm(), d.norm()
            ratio = group["eta"] * w_norm / d_norm
            d = d * torch.where((w_norm > 0) & (d_norm > 0), ratio, torch.ones_like(ratio))
        state = self.state[p]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(p)
        state["mu"].mul_(group["momentum"]).add_(d)
        p.add_(state["mu"], alpha=-group["lr"])


class AdamWithEMA:
    """AdamW of a student, and the EMA of its teacher, as one pass (`adamw_ema_step_`).

    Its state dict is that of torch.optim.AdamW over `parameter_groups`.
    """

    def __init__(self, student: FlatParameters, teacher: FlatParameters, groups: list[dict], clip_norm: float | None):
        self.student, self.teacher, self.param_groups, self.clip_norm = student, teacher, groups, clip_norm
        names = {id(parameter): name for name, parameter in student.parameters.items()}
        # name of each parameter that a state dict numbers
        self.names = [names[id(p)] for group in self.param_groups for p in group["params"]]
        count, device = len(names), student.weights.device
        self.segments = {name: i for i, name in enumerate(student.parameters)}
        self.exp_avg, self.exp_avg_sq = student.zeros(), student.zeros()
        self.steps = torch.zeros(count, dtype=torch.int64, device=device)
        decayed = {names[id(p)] for p in self.param_groups[0]["params"]}
        self.decayed = torch.tensor([name in decayed for name in student.parameters], device=device)
        self.frozen = torch.zeros(count, dtype=torch.bool, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int32, device=device)
        self.track_frozen()

    def track_frozen(self) -> None:
        """Follow the parameters' requires_grad."""
        frozen = [not parameter.requires_grad for parameter in self.student.parameters.values()]
        self.frozen.copy_(torch.tensor(frozen))

    def step(self, lr: float | Tensor, weight_decay: float | Tensor, momentum: float | Tensor) -> None:
        """Update weights, moments, teacher and copies, unless a gradient is not finite: then only `nonfinite`. The
        gradient is cleared."""
        self.student.adamw_ema_step_(
            self.teacher,
            self.exp_avg,
            self.exp_avg_sq,
            steps=self.steps,
            decayed=self.decayed,
            frozen=self.frozen,
            nonfinite=self.nonfinite,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            clip_norm=self.clip_norm,
        )

    def state_dict(self) -> dict[str, Any]:
        steps = self.steps.tolist()
        state, groups, first = {}, [], 0
        for i, name in enumerate(self.names):
            if count := steps[self.segments[name]]:
                state[i] = {
                    "step": torch.tensor(float(count)),
                    "exp_avg": self.student.view(self.exp_avg, name),
                    "exp_avg_sq": self.student.view(self.exp_avg_sq, name),
                }
        for group in self.param_groups:
            numbers = list(range(first, first + len(group["params"])))
            first += len(numbers)
            groups.append({"betas": (0.9, 0.999), "eps": 1e-8, **group, "params": numbers})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for moments in (self.exp_avg, self.exp_avg_sq, self.steps):
            moments.zero_()
        for i, saved in state["state"].items():
            name = self.names[i]
            self.steps[self.segments[name]] = int(saved["step"])
            for key, flat in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
                self.student.view(flat, name).copy_(saved[key])


class TorchWithEMA:
    """A torch optimizer of a student, then the EMA of its teacher, the copies and a cleared gradient.

    It has no guard of its own: a gradient that is not finite must not reach it.
    """

    def __init__(
        self,
        student: FlatParameters,
        teacher: FlatParameters,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
    ):
        self.student, self.teacher, self.optimizer, self.clip_norm = student, teacher, optimizer, clip_norm
        self.nonfinite = torch.zeros((), dtype=torch.int32, device=student.weights.device)  # stays 0

    def step(self, lr: float, weight_decay: float, momentum: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay  # the other group never decays
        if self.clip_norm is not None:
            clip_gradients(self.student.parameters.values(), self.clip_norm)
        self.optimizer.step()
        ema_update_([self.teacher.weights], [self.student.weights], momentum)
        self.student.renew()
        self.teacher.renew()
        self.student.clear_grad()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
