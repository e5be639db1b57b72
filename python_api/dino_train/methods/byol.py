"""BYOL (Grill et al. 2020, arXiv 2006.07733): the student predicts the teacher's projection of the other view.

Predictor, moving average and batch norm in the heads keep it from collapsing.
"""

import logging

import torch
from torch import Tensor

from dino_train.config.pretrain import PretrainConfig
from dino_train.methods import Method, Part
from dino_train.methods.heads import Projected, mlp, projector_of, spread
from dino_train.models.head import normalize

logger = logging.getLogger(__name__)


class Byol(Method):
    """The student's backbone is evaluated, as in the paper (byol_experiment.py:502 of deepmind-research/byol)."""

    evaluated = "student"
    student: Projected
    teacher: Projected

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        super().__init__(config, device)
        if config.local_crops_number:
            logger.warning("local crops made BYOL worse in all experiments of DINO's authors (its paper, appendix E)")
        self.student = self._build(config.drop_path_rate)
        self.teacher = self._build(0.0)

    def _build(self, drop_path_rate: float) -> Projected:
        c = self.config
        backbone = self.build_backbone(drop_path_rate)
        projector = projector_of(backbone, c, last_bias=False)
        predictor = mlp(c.out_dim, c.head_hidden_dim, c.out_dim, last_bias=False)
        return Projected(backbone, projector, predictor if c.predictor else None)

    def forward(self, crops: list[Tensor], teacher_temp: Tensor) -> Part:
        """loss = mean over images of the sum over ordered pairs (u, v) of the two views of |p_v - z_u|^2.

        p and z are normalized predictions of the student and projections of the teacher; local crops, which the paper
        does not have, count as further v, and the sum is then scaled as for two views. Kept are the teacher's
        projections [B, 2, D].
        """
        with self.autocast():
            with torch.no_grad():  # in train mode: its batch norms use its own batches
                z = normalize(self.teacher.project(crops[:2]))
            self.phase("teacher")
            p = normalize(self.student.predict(self.student.project(crops).unbind()))
            self.phase("student_forward")
        other = z.flip(0)  # for view 0 the other is 1
        targets = other if len(p) == 2 else torch.cat([other, z.sum(0, keepdim=True).expand(len(p) - 2, -1, -1)])
        cosines = (p * targets).sum() / ((2 * len(p) - 2) * p.shape[1])
        self.phase("loss")
        return Part(4 - 4 * cosines, z.new_empty(0), z.transpose(0, 1))

    def health(self, kept: Tensor, teacher_temp: float) -> dict[str, float]:
        """Spread of the teacher's projections, near 1 or, after a collapse, near 0; mean cosine of its two views."""
        return {"spread": spread(kept), "positive_cosine": (kept[:, 0] * kept[:, 1]).sum(-1).mean().item()}
