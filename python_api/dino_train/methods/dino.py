"""DINO (Caron et al. 2021): cross-entropy of student and centered, sharpened teacher over all pairs of views."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino_kernels import dino_loss
from dino_train.config.pretrain import PretrainConfig
from dino_train.methods import Method, Part
from dino_train.models.vit import DINOModel, build_model

CENTER_MOMENTUM = 0.9  # main_dino.py:365


def entropies(centered: Tensor, temp: float, of: str = "teacher") -> dict[str, float]:
    """In nats: of the mean output over the batch, its distance from ln K, and of a single output.

    At ln K the outputs are uniform; if the first and the last are equal, the output is the same for all images.
    """
    q = (centered / temp).softmax(dim=-1)
    mean = torch.special.entr(q.mean(dim=0)).sum()
    return {
        f"{of}_entropy": mean.item(),
        f"{of}_kl_to_uniform": math.log(q.shape[-1]) - mean.item(),
        f"{of}_single_entropy": torch.special.entr(q).sum(dim=-1).mean().item(),
    }


class Dino(Method):
    """The step of main_dino.py:303-350; the teacher of the paper is what is evaluated."""

    student: DINOModel
    teacher: DINOModel

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.student = self._build(config.drop_path_rate, config.norm_last_layer)
        self.teacher = self._build(0.0, True)
        self.center = torch.zeros(1, config.out_dim, device=device)
        if config.centering == "sinkhorn":
            self.warn_of_few_rows(2)  # both views of an image

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
            head_bottleneck_dim=c.head_bottleneck_dim,
            channels=c.channels,
            registers=c.registers,
            layer_scale=c.layer_scale or None,
        )

    def frozen(self, epoch: int) -> list[nn.Module]:
        last_layer = [self.student.head.last_layer] if epoch < self.config.freeze_last_layer else []
        return super().frozen(epoch) + last_layer

    def forward(self, crops: list[Tensor], teacher_temp: Tensor) -> Part:
        """Told is the batch center [K], with Sinkhorn-Knopp the center; kept the input of the teacher's last layer."""
        with self.autocast():
            with torch.no_grad():  # the teacher is in train mode: its batch norms use its own batches
                teacher_z = self.teacher.bottleneck(crops[:2])
            self.phase("teacher")
            student_z = self.student.bottleneck(crops)
            self.phase("student_forward")
        with torch.no_grad():
            teacher_logits = self.teacher.head.last_layer(teacher_z)
        student_logits = self.student.head.last_layer(student_z)
        sinkhorn = self.config.centering == "sinkhorn"
        # Both views' rows together, as DINOv2 has it (dinov2/loss/dino_clstoken_loss.py).
        center = self.sinkhorn(teacher_logits, teacher_temp) if sinkhorn else self.center
        loss, batch_center = dino_loss(
            student_logits,
            teacher_logits,
            center,
            student_temp=self.config.student_temp,
            teacher_temp=teacher_temp,
            inplace=True,
        )
        self.phase("loss")
        return Part(loss, center if sinkhorn else batch_center, teacher_z)

    def after(self, told: Tensor, kept: Tensor, refused: Tensor) -> None:
        center = told if self.config.centering == "sinkhorn" else self.center.lerp(told, 1 - CENTER_MOMENTUM)
        self.center.copy_(torch.where(refused, self.center, center))

    def health(self, kept: Tensor, teacher_temp: float) -> dict[str, float]:
        """Entropies of the teacher, with its current last layer and the current center."""
        return entropies(self.teacher.head.last_layer(kept).float() - self.center, teacher_temp)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"dino_loss": {"center": self.center}}  # the reference's key (main_dino.py:276-284)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.center.copy_(state["dino_loss"]["center"])
