"""Projection and prediction heads of BYOL, MoCo and SwAV, and the networks that have them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kernels.nn import Linear
from dino_train.config.pretrain import PretrainConfig
from dino_train.models.head import normalize
from dino_train.models.resnet import ResNet
from dino_train.models.vit import Net, VisionTransformer


def mlp(*dims: int, bias: bool = True, bn: bool = True, last_bias: bool = True, last_bn: bool = False) -> nn.Sequential:
    """Linear layers of these widths, with batch norm (`bn`) and ReLU after all but the last, which can have a batch
    norm without weights (`last_bn`)."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(dims[:-1]):
        layers.append(Linear(wide, narrow, bias))
        if bn:
            layers.append(nn.BatchNorm1d(narrow))
        layers.append(nn.ReLU(inplace=True))
    layers.append(Linear(dims[-2], dims[-1], last_bias))
    if last_bn:
        layers.append(nn.BatchNorm1d(dims[-1], affine=False))
    return nn.Sequential(*layers)


def projector_of(backbone: VisionTransformer | ResNet, config: PretrainConfig, **options: bool) -> nn.Sequential:
    """Three layers behind a ViT (MoCo v3, arXiv 2104.02057, section 5), two behind a convnet."""
    hidden = [config.head_hidden_dim] * (2 if isinstance(backbone, VisionTransformer) else 1)
    return mlp(backbone.embed_dim, *hidden, config.out_dim, **options)


class Projected(Net):
    """Backbone, projector and perhaps a predictor. Batch norm sees one view at a time.

    A ViT takes all views in one pass, a convnet each by itself. The teacher has a predictor too, which is never called:
    its parameters are then those of the student.
    """

    def __init__(self, backbone: VisionTransformer | ResNet, projector: nn.Module, predictor: nn.Module | None = None):
        super().__init__(backbone)
        self.projector = projector
        self.predictor = predictor

    def project(self, crops: Sequence[Tensor]) -> Tensor:
        """V crops [B, 3, h, w] -> projections [V, B, D]."""
        if isinstance(self.backbone, VisionTransformer):
            views = self.features(crops).chunk(len(crops))
        else:
            views = tuple(self.backbone(crop) for crop in crops)
        return torch.stack([self.projector(view) for view in views])

    def predict(self, projections: Sequence[Tensor]) -> Tensor:
        """Projections of V views [B, D] -> predictions [V, B, D]; without a predictor the projections themselves."""
        return torch.stack([view if self.predictor is None else self.predictor(view) for view in projections])


class Prototypes(nn.Module):
    """SwAV's head: two linear layers, features of norm 1, and their products with K prototypes of norm 1."""

    def __init__(self, in_dim: int, out_dim: int, *, use_bn: bool, hidden_dim: int, bottleneck_dim: int):
        super().__init__()
        self.mlp = mlp(in_dim, hidden_dim, bottleneck_dim, bn=use_bn)
        self.last_layer = Linear(bottleneck_dim, out_dim, bias=False)
        with torch.no_grad():
            self.last_layer.weight.copy_(F.normalize(self.last_layer.weight, dim=1))

    def bottleneck(self, x: Tensor) -> Tensor:
        """x [N, in_dim] -> rows of norm 1 [N, bottleneck_dim], float32 or wider."""
        return normalize(self.mlp(x))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_dim] -> products with the prototypes [N, K]."""
        return self.last_layer(self.bottleneck(x))

    @torch.no_grad()
    def normalize_prototypes(self, refused: Tensor) -> None:
        """After a step, unless it was refused. Not a weight norm, whose gradient has no part along the prototypes."""
        weight = self.last_layer.weight
        weight.copy_(torch.where(refused, weight, F.normalize(weight, dim=1)))
        if self.last_layer.copies is not None:
            self.last_layer.copies[0].copy_(weight)


def spread(rows: Tensor) -> float:
    """Mean standard deviation of the channels of rows of norm 1 [..., D], times sqrt(D): near 1 they are spread over
    the sphere, near 0 all the same (SimSiam, arXiv 2011.10566, section 4.1)."""
    rows = rows.flatten(0, -2).float()
    return rows.std(dim=0).mean().item() * rows.shape[1] ** 0.5
