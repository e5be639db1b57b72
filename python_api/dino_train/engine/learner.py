"""One training step of a method: gradients over micro-batches and ranks, optimizer, teacher EMA, the method's state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino_kernels.nn import FlatParameters
from dino_train.common import parallel
from dino_train.common.device import gpu_of
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.gradient_sum import GradientSum
from dino_train.engine.graph import Graphed
from dino_train.engine.optim import (
    AdamWithEMA,
    OptimizerWithEMA,
    SgdWithEMA,
    cosine_schedule,
    modules_of,
    parameter_groups,
    rate_factors,
    teacher_temp_schedule,
)
from dino_train.methods import build_method
from dino_train.models.resnet import RESNETS
from dino_train.models.vit import VisionTransformer


@dataclass
class StepResult:
    """Results of a step. Tensors stay on the device; the caller decides when to synchronize."""

    loss_tensor: Tensor
    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    kept: Tensor
    learner: "Learner"

    @property
    def loss(self) -> float:
        return self.loss_tensor.item()

    @torch.no_grad()
    def health(self) -> dict[str, float]:
        """Numbers by which a collapse shows, see the method; with the current weights."""
        return self.learner.method.health(self.kept, self.teacher_temp)


class Learner:
    """Method, optimizer and schedules of one run.

    Args:
        config: configuration of the run.
        steps_per_epoch: optimizer steps per epoch.
        device: device of the networks.
    """

    phase_hook: Callable[[str], None] | None = None  # called after each phase of a step; for benchmarks

    def __init__(self, config: PretrainConfig, steps_per_epoch: int, device: torch.device) -> None:
        self.config, self.steps_per_epoch, self.device = config, steps_per_epoch, device
        self.gpu, self.dtype = gpu_of(device), config.dtype(device)
        self.method = build_method(config, device)
        self.method.phase = self._phase
        self.student, self.teacher = self.method.student, self.method.teacher
        for net in (self.student, self.teacher):
            self._place(net)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        if isinstance(self.student.backbone, VisionTransformer):
            self.student.backbone.checkpoint_activations = config.checkpoint_activations
            self.student.backbone.drop_path_uniform = config.drop_path_uniform
        self.student_flat = FlatParameters(self.student, self.dtype)
        self.teacher_flat = FlatParameters(self.teacher, self.dtype)
        if parallel.size() > 1:  # all ranks start from the weights and the state of rank 0
            weights = self.student_flat.weights, self.teacher_flat.weights
            state = [tensor for part in self.method.state_dict().values() for tensor in part.values()]
            parallel.broadcast([*weights, *self.student.buffers(), *self.teacher.buffers(), *state])
            self.renew()
        self.frozen: list[nn.Module] = []
        self.optimizer = self._optimizer()
        self.gradient_sum = GradientSum(self.student_flat)
        steps = config.epochs * steps_per_epoch
        batch = config.batch_size_per_gpu * parallel.size()
        self.lr = cosine_schedule(
            config.lr * (batch / 256 if config.lr_rule == "linear" else (batch / 1024) ** 0.5),
            config.min_lr,
            steps,
            warmup_steps=config.warmup_epochs * steps_per_epoch,
        )
        self.weight_decay = cosine_schedule(config.weight_decay, config.weight_decay_end, steps)
        self.momentum = cosine_schedule(config.momentum_teacher, config.momentum_teacher_end, steps)
        self.teacher_temp = teacher_temp_schedule(
            config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs, config.epochs
        )
        # The whole schedule is on the device: a step reads its row there, without a host-to-device copy.
        columns = (self.lr, self.weight_decay, self.momentum, np.repeat(self.teacher_temp, steps_per_epoch))
        self.schedule = torch.tensor(np.stack(columns, axis=1), device=device)
        self.scheduled = torch.zeros(4, dtype=torch.float64, device=device)
        self.stage = self.method.stage(0, steps_per_epoch)
        self.update = self._new_update()

    def _place(self, net: nn.Module) -> None:
        """Move a net to the device; its batch norms are over all ranks, unless they are of parts of a batch."""
        if self.gpu is not None and self.config.arch in RESNETS:
            self.gpu.tune_convolutions()
        net.to(self.device)
        normed = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
        if parallel.size() == 1 or not normed or self.config.bn_split:
            return
        if self.gpu is None:
            raise ValueError(
                "batch norm over several processes needs GPUs (of a ResNet, --use-bn-in-head, the heads of BYOL and "
                "MoCo): run one process, or give --bn-split with version 2 of MoCo"
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(net)  # as main_dino.py:196-206

    def _optimizer(self) -> OptimizerWithEMA:
        nets, groups = (self.student_flat, self.teacher_flat), parameter_groups(self.student, self.config.decay_all)
        config = self.config
        clip_norm = config.clip_grad or None
        if config.optimizer != "adamw":
            return SgdWithEMA(*nets, groups, clip_norm, config.optimizer)
        factors = config.layer_decay, config.patch_embed_lr
        return AdamWithEMA(
            *nets,
            groups,
            clip_norm,
            lr_scale=None if factors == (1, 1) else rate_factors(self.student, *factors),
            clip_groups=modules_of(self.student) if config.clip_per_module else None,
        )

    def step(self, step: int, crops: list[Tensor]) -> StepResult:
        """One update of student, teacher and the method's state (of DINO, main_dino.py:303-350).

        A non-finite loss updates nothing; the caller sees it in the result.

        Args:
            step: global step, the index into the schedules.
            crops: V tensors [B, channels, h, w] float32 on the device, the two global crops first, and what else the
                method takes of each image.
        """
        self._freeze(step)
        if (stage := self.method.stage(step, self.steps_per_epoch)) != self.stage:
            self.stage, self.update = stage, self._new_update()
        self.scheduled.copy_(self.schedule[step])
        loss, kept = self.update(crops)
        return StepResult(loss, *self.schedule_values(step), kept, self)

    def schedule_values(self, step: int) -> tuple[float, float, float, float]:
        """Learning rate, weight decay, teacher momentum and teacher temperature."""
        temp = self.teacher_temp[step // self.steps_per_epoch]
        return float(self.lr[step]), float(self.weight_decay[step]), float(self.momentum[step]), float(temp)

    def _update(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The device work of a step, with the scheduled scalars on the device. Returns the loss and what the method
        keeps."""
        self.student_flat.overwrite_grads()  # also after a failed capture that included a backward
        lr, decay, momentum, teacher_temp = self.scheduled.unbind()
        loss, told, kept = self._gradients(crops, teacher_temp)
        self.optimizer.step(lr, decay, momentum)
        self.method.after(told, kept, self.optimizer.nonfinite > 0)
        self._phase("optimizer")
        return loss, kept

    def nonfinite_message(self, step: int, loss: float) -> str:
        epoch = step // self.steps_per_epoch
        return f"the loss is {loss} at step {step} (epoch {epoch}, lr {self.lr[step]:.3g})"

    def _new_update(self) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
        graphed = self.config.cuda_graph and parallel.size() == 1  # all-reduces inside a graph are not tested
        return Graphed(self.gpu, self._update) if graphed and self.gpu is not None else self._update

    def _freeze(self, step: int) -> None:
        frozen = self.method.frozen(step // self.steps_per_epoch)
        if step < self.config.freeze_backbone_steps:
            frozen = [*frozen, self.student.backbone]
        if frozen == self.frozen:
            return
        for layer in self.frozen:
            self.student_flat.freeze(layer, False)
        for layer in frozen:  # last: a layer may be part of one that is trained again
            self.student_flat.freeze(layer, True)
        self.frozen = frozen
        self.gradient_sum.remove()
        self.gradient_sum = GradientSum(self.student_flat)
        self.optimizer.track_frozen()
        self.update = self._new_update()

    def _gradients(self, crops: list[Tensor], teacher_temp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the student's gradient. Returns the loss and `Part.told` over all micro-batches and ranks, and the
        rows of `Part.kept` of this rank."""
        count = self.config.accumulate
        micro_batches = list(zip(*(crop.chunk(count) for crop in crops), strict=True))
        total, rows = None, []
        for i, micro_batch in enumerate(micro_batches):
            loss, told, kept = self.method.forward(list(micro_batch), teacher_temp)
            rows.append(kept)
            share = torch.cat([told, loss.detach().view(1)])
            share = share if count == 1 else share / count
            total = share if total is None else total + share
            if i == count - 1:  # all-reduces of both overlap with the backward
                mean = parallel.mean(total)
                self.gradient_sum.start()
            losses = count * parallel.size()
            (loss if losses == 1 else loss / losses).backward()
        self.gradient_sum.wait()
        mean.wait()
        self._phase("backward")
        assert total is not None
        return total[-1], total[:-1], torch.cat(rows)

    def _phase(self, name: str) -> None:
        if self.phase_hook is not None:
            self.phase_hook(name)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and the method's state, for DINO under the reference's keys (main_dino.py:276-284)."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name, net in (("student", self.student), ("teacher", self.teacher)):
            net.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state)
        self.renew()

    def renew(self) -> None:
        """What the nets multiply by, after their weights were written."""
        self.student_flat.renew()
        self.teacher_flat.renew()
