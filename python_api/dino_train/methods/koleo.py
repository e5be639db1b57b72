"""KoLeo (Sablayrolles et al. 2019, arXiv 1806.03198): features of a batch are spread apart."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["koleo"]

_EPS = 1e-8


def koleo(features: Tensor) -> Tensor:
    """The loss that pushes each row away from the nearest other row.

    x_i  = f_i / max(|f_i|, 1e-8)
    n(i) = argmax over j != i of <x_i, x_j>                             no gradient
    loss = -mean over i of ln(|x_i - x_n(i) + 1e-8| + 1e-8)             the first 1e-8 is added to each channel

    As in DINOv2 (loss/koleo_loss.py:23-47): equal rows give a finite loss and gradient. The gradient reaches both rows
    of a pair; backward is bitwise repeatable, and nothing is read on the host.

    Args:
        features: [B, C] of any floating dtype; computed in float32.

    Returns:
        float32 scalar; 0 with zero gradient for a single row, which has no neighbor.
    """
    features = features.float()
    if len(features) == 1:
        return (0 * features).sum()
    x = F.normalize(features, dim=1, eps=_EPS)
    nearest = (x @ x.t()).detach().fill_diagonal_(float("-inf")).argmax(dim=1)
    # A product with one-hot rows, because the backward of an index adds its rows in any order.
    chosen = nearest[:, None] == torch.arange(len(x), device=x.device)
    distances = F.pairwise_distance(x, chosen.float() @ x, eps=_EPS)
    return -(distances + _EPS).log().mean()
