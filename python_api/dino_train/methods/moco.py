"""MoCo: a view's projection is told from the keys of other images by contrast with the key of its other view.

Version 2 (Chen et al. 2020, arXiv 2003.04297) takes the other images' keys from a queue of earlier steps, version 3
(Chen et al. 2021, arXiv 2104.02057) from the batch, with a predictor and in both directions.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kernels import info_nce
from dino_train.common import parallel
from dino_train.config.pretrain import PretrainConfig
from dino_train.methods import Method, Part
from dino_train.methods.heads import Projected, mlp, projector_of, spread
from dino_train.methods.queue import Queue
from dino_train.models.head import normalize
from dino_train.models.resnet import RESNETS, split_batch_norm


class Moco(Method):
    """Version 3 with a predictor, else version 2. The student's backbone is evaluated, as in both papers."""

    evaluated = "student"
    student: Projected
    teacher: Projected

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.student = self._build(config.drop_path_rate)
        self.teacher = self._build(0.0)
        self.splits = 1
        if config.bn_split:
            self.splits = config.micro_batch // config.bn_split
            for net in (self.student, self.teacher):
                split_batch_norm(net, self.splits)
        rows = F.normalize(torch.randn(config.queue_size, config.out_dim), dim=1)
        self.queue = Queue(rows.to(device, self.dtype), config.batch_size_per_gpu)

    def _build(self, drop_path_rate: float) -> Projected:
        c = self.config
        backbone = self.build_backbone(drop_path_rate)
        if not c.predictor:
            # Batch norm in the head of a ViT alone: paper of DINO, appendix E.
            return Projected(backbone, projector_of(backbone, c, bn=c.arch not in RESNETS))
        projector = projector_of(backbone, c, bias=False, last_bias=False, last_bn=True)
        predictor = mlp(
            c.out_dim, c.head_hidden_dim, c.out_dim, bias=False, last_bias=False, last_bn=c.arch not in RESNETS
        )
        return Projected(backbone, projector, predictor)

    def forward(self, crops: list[Tensor], teacher_temp: Tensor) -> Part:
        """Of versions 2 and 3, with q and k of norm 1, T = student_temp and the mean over images:

            loss = -log(exp(q_0 k_1 / T) / (exp(q_0 k_1 / T) + sum over the queue of exp(q_0 key / T)))
            loss = 2 T sum over (u, v) = (0, 1), (1, 0) of -log(exp(q_u k_v / T) / sum over images of exp(q_u k_v' / T))

        Kept are queries and keys, [B, 2, D] in version 2 and [B, 4, D] in version 3, the key of view 1 last.
        """
        return self._both_directions(crops) if self.config.predictor else self._with_queue(crops)

    def _with_queue(self, crops: list[Tensor]) -> Part:
        with self.autocast():
            with torch.no_grad():
                key = normalize(self._keys(crops[1]))
            self.phase("teacher")
            query = normalize(self.student.project(crops[:1])[0])
            self.phase("student_forward")
        loss = info_nce(query.to(self.dtype), key.to(self.dtype), self.queue.rows, temp=self.config.student_temp)
        self.phase("loss")
        return Part(loss, key.new_empty(0), torch.stack([query.detach(), key], dim=1))

    def _keys(self, crop: Tensor) -> Tensor:
        """Keys of images that are dealt out so that a batch norm of keys shares few images with one of queries.

        Otherwise the statistics tell which key belongs to a query (MoCo, arXiv 1911.05722, section 3.3, which shuffles
        for it). Image i of queries is in split i mod S, of keys in i // (B / S).
        """
        if self.splits == 1:
            return self.teacher.project([crop])[0]
        order = torch.arange(len(crop), device=crop.device).view(self.splits, -1).t().flatten()
        keys = self.teacher.project([crop[order]])[0]
        return torch.empty_like(keys).index_copy_(0, order, keys)

    def _both_directions(self, crops: list[Tensor]) -> Part:
        temp = self.config.student_temp
        with self.autocast():
            with torch.no_grad():
                keys = normalize(self.teacher.project(crops[:2]))
            self.phase("teacher")
            queries = normalize(self.student.predict(self.student.project(crops[:2]).unbind()))
            self.phase("student_forward")
        own = parallel.rank() * len(crops[0]) + torch.arange(len(crops[0]), device=self.device)
        losses = [
            info_nce(query, None, parallel.gather_equal(key), temp=temp, labels=own, scale=2 * temp)
            for query, key in zip(queries, keys.flip(0), strict=True)
        ]
        self.phase("loss")
        kept = torch.cat([queries.detach(), keys]).transpose(0, 1)
        return Part(torch.stack(losses).sum(), keys.new_empty(0), kept)

    def after(self, told: Tensor, kept: Tensor, refused: Tensor) -> None:
        if len(self.queue):
            self.queue.push(kept[:, -1], refused)

    def health(self, kept: Tensor, teacher_temp: float) -> dict[str, float]:
        """Spread of the keys, near 1 or, after a collapse, near 0; mean cosine of a query and its key."""
        return {"spread": spread(kept[:, -1]), "positive_cosine": (kept[:, 0] * kept[:, -1]).sum(-1).mean().item()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {"method": self.queue.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.queue.load_state_dict(state["method"])
