"""The head of DINO, behind the backbone, and the normalization that heads of other methods share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_kernels.nn import Linear, WeightNormLinear
from dino_train.models.init import init_linear


class DINOHead(nn.Module):
    """MLP, L2 normalization, weight-normed linear layer (paper section 3.2, `vision_transformer.py:258`).

    Args:
        in_dim: channels of the backbone's features.
        out_dim: number of outputs K.
        use_bn: batch norm after the first two layers.
        norm_last_layer: freeze the norms g of the last layer at 1, so that logits are cosines.
        hidden_dim: width of the MLP.
        bottleneck_dim: width of the normalized features.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for dim in (in_dim, hidden_dim):
            layers.append(Linear(dim, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, Linear(hidden_dim, bottleneck_dim))
        self.apply(init_linear)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_dim] -> logits [N, K]."""
        return self.last_layer(self.bottleneck(x))

    def bottleneck(self, x: Tensor) -> Tensor:
        """x [N, in_dim] -> rows of norm 1 [N, bottleneck_dim], float32 or wider."""
        return normalize(self.mlp(x))


def normalize(x: Tensor) -> Tensor:
    """Rows of norm 1, float32 or wider: in 16 bit the rounded norm would scale all products with a row alike."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12)
