"""Schedules, parameter groups, gradient clipping and LARS, as in the reference."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


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
