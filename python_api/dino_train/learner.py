"""One DINO training step, exactly the reference's: loss, center, clipping, optimizer, teacher."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino_kernels import dino_loss, ema_update_
from dino_train.config import PretrainConfig
from dino_train.model import DINOModel, build_model
from dino_train.optim import LARS, clip_gradients, cosine_schedule, parameter_groups, teacher_temp_schedule

CENTER_MOMENTUM = 0.9  # main_dino.py:365


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; nothing was updated by that step."""


@dataclass
class StepResult:
    """What a step tells: the loss, the settings it ran with, and how to look at the teacher's output."""

    loss: float
    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    teacher_output: Tensor
    center: Tensor

    def teacher_entropy(self) -> tuple[float, float]:
        """(entropy of the mean teacher output over the batch, mean entropy of a single output), in nats.

        Both at ln K: outputs are uniform. Both equal below it: one constant output, whatever the image.
        """
        q = ((self.teacher_output.float() - self.center) / self.teacher_temp).softmax(dim=-1)
        mean = q.mean(dim=0)
        return torch.special.entr(mean).sum().item(), torch.special.entr(q).sum(dim=-1).mean().item()


class Learner:
    """Student, teacher, center, optimizer and schedules of one run.

    Args:
        config: the run's settings.
        steps_per_epoch: optimizer steps an epoch.
        device: where the nets live.
    """

    def __init__(self, config: PretrainConfig, steps_per_epoch: int, device: torch.device) -> None:
        self.config, self.steps_per_epoch, self.device = config, steps_per_epoch, device
        self.student = self._build(config.drop_path_rate, config.norm_last_layer)
        self.teacher = self._build(0.0, True)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, config.out_dim, device=device)
        self.optimizer = self._optimizer()
        steps = config.epochs * steps_per_epoch
        self.lr = cosine_schedule(
            config.lr * config.batch_size_per_gpu / 256,
            config.min_lr,
            steps,
            warmup_steps=config.warmup_epochs * steps_per_epoch,
        )
        self.weight_decay = cosine_schedule(config.weight_decay, config.weight_decay_end, steps)
        self.momentum = cosine_schedule(config.momentum_teacher, 1.0, steps)
        self.teacher_temp = teacher_temp_schedule(
            config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs, config.epochs
        )

    def _build(self, drop_path_rate: float, norm_last_layer: bool) -> DINOModel:
        c = self.config
        return build_model(
            c.arch,
            patch_size=c.patch_size,
            out_dim=c.out_dim,
            img_size=c.global_crops_size,
            drop_path_rate=drop_path_rate,
            use_bn_in_head=c.use_bn_in_head,
            norm_last_layer=norm_last_layer,
            head_hidden_dim=c.head_hidden_dim,
        ).to(self.device)

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.student)
        if self.config.optimizer == "adamw":
            return torch.optim.AdamW(groups, fused=True)
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
        return LARS(groups)

    def step(self, step: int, crops: list[Tensor]) -> StepResult:
        """One update of student, center and teacher (main_dino.py:303-350).

        Args:
            step: global step, which sets the schedules.
            crops: V tensors [B, 3, h, w] float32 on the device, the two global ones first.

        Raises:
            NonFiniteLoss: before anything was changed.
        """
        epoch = step // self.steps_per_epoch
        loss, result = self._forward(step, epoch, crops)
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.clip_grad:
            clip_gradients(self.student.parameters(), self.config.clip_grad)
        if epoch < self.config.freeze_last_layer:  # without a gradient the optimizer keeps no moments either
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None
        self.optimizer.step()
        ema_update_(self.teacher.parameters(), self.student.parameters(), result.momentum)
        return result

    def _forward(self, step: int, epoch: int, crops: list[Tensor]) -> tuple[Tensor, StepResult]:
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.lr[step])
            if i == 0:  # the other group never decays
                group["weight_decay"] = float(self.weight_decay[step])
        teacher_temp = float(self.teacher_temp[epoch])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            with torch.no_grad():  # the teacher stays in train mode: its batch norms see its own batches
                teacher_output = self.teacher(crops[:2])
            student_output = self.student(crops)
        loss, batch_center = dino_loss(
            student_output, teacher_output, self.center, teacher_temp=teacher_temp, inplace=True
        )
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the loss is {value} at step {step} (epoch {epoch}, lr {self.lr[step]:.3g})")
        used, self.center = self.center, self.center.lerp(batch_center, 1 - CENTER_MOMENTUM)
        return loss, StepResult(
            value,
            float(self.lr[step]),
            float(self.weight_decay[step]),
            float(self.momentum[step]),
            teacher_temp,
            teacher_output,
            used,
        )

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer state and center under the reference's checkpoint keys (main_dino.py:276-284)."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "dino_loss": {"center": self.center},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name, net in (("student", self.student), ("teacher", self.teacher)):
            net.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.center = state["dino_loss"]["center"].to(self.device)
