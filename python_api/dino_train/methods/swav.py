"""SwAV (Caron et al. 2020, arXiv 2006.09882): views predict the cluster assignment of another view of their image.

The assignments are those of Sinkhorn-Knopp over the batch, so that all clusters are used. There is no teacher: targets
are outputs of the student.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino_kernels import dino_loss
from dino_train.common import parallel
from dino_train.config.pretrain import PretrainConfig
from dino_train.methods import Method, Part
from dino_train.methods.dino import entropies
from dino_train.methods.heads import Prototypes
from dino_train.methods.queue import Queue
from dino_train.models.head import DINOHead
from dino_train.models.vit import DINOModel, VisionTransformer


class Swav(Method):
    """A convnet has the head of SwAV, a ViT that of DINO (paper of DINO, table 15)."""

    evaluated = "student"
    student: DINOModel
    teacher: DINOModel  # follows the student's weights; it is not run

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.student = self._build(config.drop_path_rate)
        self.teacher = self._build(0.0)
        self.center = torch.zeros(2, config.out_dim, device=device)  # of each of the two global views
        # Normalized features of both global views of earlier images.
        rows = torch.zeros(config.queue_size, 2, config.head_bottleneck_dim, dtype=self.dtype, device=device)
        self.queue = Queue(rows, config.batch_size_per_gpu)
        self.filling = self.full = False
        self.warn_of_few_rows(1)

    def _build(self, drop_path_rate: float) -> DINOModel:
        c = self.config
        backbone = self.build_backbone(drop_path_rate)
        sizes = {"hidden_dim": c.head_hidden_dim, "bottleneck_dim": c.head_bottleneck_dim}
        if isinstance(backbone, VisionTransformer):
            head = DINOHead(
                backbone.embed_dim, c.out_dim, use_bn=c.use_bn_in_head, norm_last_layer=c.norm_last_layer, **sizes
            )
            return DINOModel(backbone, head)
        return DINOModel(backbone, Prototypes(backbone.embed_dim, c.out_dim, use_bn=c.use_bn_in_head, **sizes))

    def frozen(self, epoch: int) -> list[nn.Module]:
        last_layer = [self.student.head.last_layer] if epoch < self.config.freeze_last_layer else []
        return super().frozen(epoch) + last_layer

    def stage(self, step: int, steps_per_epoch: int) -> tuple[bool, bool]:
        """Whether the queue is filled, and whether it is full and used."""
        since = step - self.config.queue_start_epoch * steps_per_epoch
        images = self.config.batch_size_per_gpu * parallel.size()
        self.filling = len(self.queue) > 0 and since >= 0
        self.full = self.filling and since * images >= len(self.queue)
        return self.filling, self.full

    def forward(self, crops: list[Tensor], teacher_temp: Tensor) -> Part:
        """With s_v the products of view v's normalized features and the prototypes, and V views:

            q_u = Sinkhorn-Knopp of s_u / teacher_temp over the batches of all ranks, and the queue
            loss = mean over images and pairs (u, v), u of the two global views, v != u, of
                   -<q_u, log_softmax(s_v / student_temp)>

        Told are the centers [2 K] that make q_u = softmax((s_u - c_u) / teacher_temp), kept the features [B, 2, D].
        """
        config = self.config
        with self.autocast():
            z = self.student.bottleneck(crops)
        self.phase("student_forward")
        last_layer = self.student.head.last_layer
        logits = last_layer(z)
        kept = torch.stack(z.detach().chunk(len(crops))[:2], dim=1)
        with torch.no_grad():
            own = logits.chunk(len(crops))[:2]
            rows = list(own)
            if self.full:  # each rank adds another part of it
                queue = self.queue.rows[parallel.rank() :: parallel.size()]
                rows = [torch.cat([own[view], last_layer(queue[:, view].contiguous())]) for view in range(2)]
            center = torch.stack([self.sinkhorn(scores, teacher_temp) for scores in rows])
        loss, _ = dino_loss(
            logits,
            torch.cat(own),  # a copy: the gradient is written over logits
            center,
            student_temp=config.student_temp,
            teacher_temp=teacher_temp,
            inplace=True,
        )
        self.phase("loss")
        return Part(loss, center.flatten(), kept)

    def after(self, told: Tensor, kept: Tensor, refused: Tensor) -> None:
        self.center.copy_(torch.where(refused, self.center, told.view(2, -1)))
        if self.filling:
            self.queue.push(kept, refused)
        if isinstance(self.student.head, Prototypes) and self.student.head.last_layer.weight.requires_grad:
            self.student.head.normalize_prototypes(refused)

    def health(self, kept: Tensor, teacher_temp: float) -> dict[str, float]:
        """The entropies of DINO, of the assignments."""
        logits = self.student.head.last_layer(kept.transpose(0, 1).flatten(0, 1)).float()
        center = self.center.repeat_interleave(len(kept), dim=0)
        return entropies(logits - center, teacher_temp)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"method": {"center": self.center, **self.queue.state_dict()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.center.copy_(state["method"]["center"])
        self.queue.load_state_dict(state["method"])
