"""One DINO training step, identical to the reference: loss, center, gradient clipping, optimizer, teacher EMA."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino_kernels import dino_loss
from dino_kernels.nn import FlatParameters
from dino_train.common import parallel
from dino_train.common.device import gpu_of
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.gradient_sum import GradientSum
from dino_train.engine.graph import Graphed
from dino_train.engine.optim import (
    LARS,
    AdamWithEMA,
    TorchWithEMA,
    cosine_schedule,
    parameter_groups,
    teacher_temp_schedule,
)
from dino_train.models.vit import DINOModel, VisionTransformer, build_model

CENTER_MOMENTUM = 0.9  # main_dino.py:365


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; that step has not updated anything."""


@dataclass
class StepResult:
    """Results of a step. Tensors stay on the device; the caller decides when to synchronize."""

    loss_tensor: Tensor
    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    teacher_z: Tensor
    learner: "Learner"

    @property
    def loss(self) -> float:
        return self.loss_tensor.item()

    @torch.no_grad()
    def teacher_entropy(self) -> tuple[float, float]:
        """(entropy of the mean teacher output over the batch, mean entropy of a single output), in nats.

        Both at ln K: the outputs are uniform. Both equal and below ln K: the output is the same for all images.
        Computed with the current last layer of the teacher and the current center.
        """
        logits = self.learner.teacher.head.last_layer(self.teacher_z).float()
        q = ((logits - self.learner.center) / self.teacher_temp).softmax(dim=-1)
        mean = q.mean(dim=0)
        return torch.special.entr(mean).sum().item(), torch.special.entr(q).sum(dim=-1).mean().item()


class Learner:
    """Student, teacher, center, optimizer and schedules of one run.

    Args:
        config: configuration of the run.
        steps_per_epoch: optimizer steps per epoch.
        device: device of the networks.
    """

    phase_hook: Callable[[str], None] | None = None  # called after each phase of a step; for benchmarks

    def __init__(self, config: PretrainConfig, steps_per_epoch: int, device: torch.device) -> None:
        self.config, self.steps_per_epoch, self.device = config, steps_per_epoch, device
        self.gpu, self.dtype = gpu_of(device), config.dtype(device)
        self.student = self._build(config.drop_path_rate, config.norm_last_layer)
        self.teacher = self._build(0.0, True)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        if isinstance(self.student.backbone, VisionTransformer):
            self.student.backbone.checkpoint_activations = config.checkpoint_activations
        self.student_flat = FlatParameters(self.student, self.dtype)
        self.teacher_flat = FlatParameters(self.teacher, self.dtype)
        if parallel.size() > 1:  # all ranks start from the weights of rank 0
            weights = self.student_flat.weights, self.teacher_flat.weights
            parallel.broadcast([*weights, *self.student.buffers(), *self.teacher.buffers()])
            self._renew()
        self.center = torch.zeros(1, config.out_dim, device=device)
        self.optimizer = self._optimizer()
        self.gradient_sum = GradientSum(self.student_flat)
        steps = config.epochs * steps_per_epoch
        self.lr = cosine_schedule(
            config.lr * config.batch_size_per_gpu * parallel.size() / 256,
            config.min_lr,
            steps,
            warmup_steps=config.warmup_epochs * steps_per_epoch,
        )
        self.weight_decay = cosine_schedule(config.weight_decay, config.weight_decay_end, steps)
        self.momentum = cosine_schedule(config.momentum_teacher, 1.0, steps)
        self.teacher_temp = teacher_temp_schedule(
            config.warmup_teacher_temp, config.teacher_temp, config.warmup_teacher_temp_epochs, config.epochs
        )
        # The whole schedule is on the device: a step reads its row there, without a host-to-device copy.
        columns = (self.lr, self.weight_decay, self.momentum, np.repeat(self.teacher_temp, steps_per_epoch))
        self.schedule = torch.tensor(np.stack(columns, axis=1), device=device)
        self.settings = torch.zeros(4, dtype=torch.float64, device=device)
        self.update = self._new_update()

    def _build(self, drop_path_rate: float, norm_last_layer: bool) -> DINOModel:
        c = self.config
        if self.gpu is not None and c.arch == "resnet50":
            self.gpu.tune_convolutions()
        model = build_model(
            c.arch,
            patch_size=c.patch_size,
            out_dim=c.out_dim,
            img_size=c.global_crops_size,
            drop_path_rate=drop_path_rate,
            use_bn_in_head=c.use_bn_in_head,
            norm_last_layer=norm_last_layer,
            head_hidden_dim=c.head_hidden_dim,
        ).to(self.device)
        if parallel.size() == 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            return model
        if self.gpu is None:
            raise ValueError("batch norm over several processes needs GPUs: run one process, or a ViT without it")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # as main_dino.py:196-206

    def _optimizer(self) -> AdamWithEMA | TorchWithEMA:
        clip_norm = self.config.clip_grad or None
        groups, nets = parameter_groups(self.student), (self.student_flat, self.teacher_flat)
        if self.config.optimizer == "adamw":
            return AdamWithEMA(*nets, groups, clip_norm)
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9) if self.config.optimizer == "sgd" else LARS(groups)
        return TorchWithEMA(*nets, optimizer, clip_norm)

    def step(self, step: int, crops: list[Tensor]) -> StepResult:
        """One update of student, center and teacher (main_dino.py:303-350).

        With AdamW, a non-finite loss updates nothing; the caller sees it in the result.

        Args:
            step: global step, the index into the schedules.
            crops: V tensors [B, 3, h, w] float32 on the device, the two global crops first.

        Raises:
            NonFiniteLoss: with sgd or lars, which check the loss on the host; before any update.
        """
        self._freeze(step // self.steps_per_epoch)
        self.settings.copy_(self.schedule[step])
        loss, teacher_z = self.update(crops)
        return StepResult(loss, *self.schedule_values(step), teacher_z, self)

    def schedule_values(self, step: int) -> tuple[float, float, float, float]:
        """Learning rate, weight decay, teacher momentum and teacher temperature."""
        temp = self.teacher_temp[step // self.steps_per_epoch]
        return float(self.lr[step]), float(self.weight_decay[step]), float(self.momentum[step]), float(temp)

    def _update(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The device work of a step, with the scheduled scalars on the device. Returns the loss and the input of the
        teacher's last layer."""
        self.student_flat.overwrite_grads()  # also after a failed capture that included a backward
        lr, decay, momentum, teacher_temp = self.settings.unbind()
        loss, batch_center, teacher_z = self._gradients(crops, teacher_temp)
        center = self.center.lerp(batch_center, 1 - CENTER_MOMENTUM)
        if isinstance(self.optimizer, AdamWithEMA):
            self.optimizer.step(lr, decay, momentum)
            center = torch.where(self.optimizer.nonfinite > 0, self.center, center)
        else:
            if not math.isfinite(loss.item()):
                self.student_flat.clear_grad()
                raise NonFiniteLoss
            self.optimizer.step(*self.settings[:3].tolist())
        self.center.copy_(center)
        self._phase("optimizer")
        return loss, teacher_z

    def nonfinite_message(self, step: int, loss: float) -> str:
        epoch = step // self.steps_per_epoch
        return f"the loss is {loss} at step {step} (epoch {epoch}, lr {self.lr[step]:.3g})"

    def _new_update(self) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
        # The other optimizers synchronize with the device; all-reduces inside a graph are not tested.
        graphed = self.config.cuda_graph and parallel.size() == 1 and isinstance(self.optimizer, AdamWithEMA)
        return Graphed(self.gpu, self._update) if graphed and self.gpu is not None else self._update

    def _freeze(self, epoch: int) -> None:
        frozen = epoch < self.config.freeze_last_layer
        last_layer = self.student.head.last_layer
        if last_layer.weight_v.requires_grad is frozen:
            self.student_flat.freeze(last_layer, frozen)
            self.gradient_sum.remove()
            self.gradient_sum = GradientSum(self.student_flat)
            if isinstance(self.optimizer, AdamWithEMA):
                self.optimizer.track_frozen()
            self.update = self._new_update()

    def _gradients(self, crops: list[Tensor], teacher_temp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the student's gradient. Returns the loss and batch center over all micro-batches and ranks, and the
        input of the teacher's last layer on this rank."""
        count = self.config.accumulate
        micro_batches = list(zip(*(crop.chunk(count) for crop in crops), strict=True))
        total, rows = None, []
        for i, micro_batch in enumerate(micro_batches):
            loss, batch_center, teacher_z = self._forward(list(micro_batch), teacher_temp)
            rows.append(teacher_z)
            share = torch.cat([batch_center, loss.detach().view(1)])
            share = share if count == 1 else share / count
            total = share if total is None else total + share
            if i == count - 1:  # all-reduces of center and gradient overlap with the backward
                mean = parallel.mean(total)
                self.gradient_sum.start()
            losses = count * parallel.size()
            (loss if losses == 1 else loss / losses).backward()
        self.gradient_sum.wait()
        mean.wait()
        self._phase("backward")
        assert total is not None
        return total[-1], total[:-1], torch.cat(rows)

    def _forward(self, crops: list[Tensor], teacher_temp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, batch center and input of the teacher's last layer, of one micro-batch."""
        low = self.dtype == torch.bfloat16
        # ViT layers hold bfloat16 copies of their weights and need no autocast; a ResNet has no copies.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low and self.config.arch == "resnet50"):
            with torch.no_grad():  # the teacher is in train mode: its batch norms use its own batches
                teacher_z = self.teacher.bottleneck(crops[:2])
            self._phase("teacher")
            student_z = self.student.bottleneck(crops)
            self._phase("student_forward")
        with torch.no_grad():
            teacher_logits = self.teacher.head.last_layer(teacher_z)
        student_logits = self.student.head.last_layer(student_z)
        loss, batch_center = dino_loss(
            student_logits, teacher_logits, self.center, teacher_temp=teacher_temp, inplace=True
        )
        self._phase("loss")
        return loss, batch_center, teacher_z

    def _phase(self, name: str) -> None:
        if self.phase_hook is not None:
            self.phase_hook(name)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer state and center under the reference's checkpoint keys (main_dino.py:276-284)."""
        return {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "dino_loss": {"center": self.center},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for name, net in (("student", self.student), ("teacher", self.teacher)):
            net.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.center.copy_(state["dino_loss"]["center"])
        self._renew()

    def _renew(self) -> None:
        """What the nets multiply by, after their weights were written."""
        self.student_flat.renew()
        self.teacher_flat.renew()
