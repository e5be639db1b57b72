"""Cross-entropy of each query's positive key against many keys, whose logits [R, K] are never stored: InfoNCE.

    loss = scale mean_r [ln sum_j exp(<q_r, k_j> / temp) - <q_r, k+_r> / temp]
    dL/dq_r = scale (sum_j p_rj k_j - k+_r) / (temp R)                              p_rj = softmax over j

The keys j are either all of `keys` and the positive k+_r (van den Oord et al. 2018, He et al. 2020, section 3.2), or
`keys`, of which k+_r is the one with number labels[r]. The gradient needs only an average of keys, as in flash
attention with keys as keys and values, so that the keys are read once.

Dimensions: R queries, K keys, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES, address
from dino_kernels._core.registry import custom_op
from dino_kernels.ops.dino_loss import backward_of, keep_gradient, temperature

__all__ = ["info_nce", "info_nce_reference"]


def info_nce(
    query: Tensor,
    positive: Tensor | None,
    keys: Tensor,
    *,
    temp: float | Tensor = 0.2,
    labels: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """InfoNCE with a positive key for each query and common negatives, or with common keys that hold the positives.

    van den Oord et al. 2018, arXiv 1807.03748, equation 4. Logits and statistics are float32; a repeated call is
    bitwise equal. Gradients flow to query alone. The gradient is made in the forward pass; the first backward takes it
    over and a second one is refused.

    Args:
        query: [R, D], R >= 1, 1 <= D <= 256; float32, float16 or bfloat16; rows of norm 1, which is not checked.
        positive: [R, D], the positive key of each query, which the other queries do not see; None with labels.
        keys: [K, D], K >= 1; all three of one dtype and contiguous.
        temp: temperature > 0, a float or a 0-d tensor (read on its device: no synchronization).
        labels: int64 [R], contiguous: the row of keys that is a query's positive. On a GPU their range is not checked.
        scale: multiplies the loss and the gradient.

    Returns:
        float32 scalar, the mean over the queries.

    Raises:
        ValueError: a shape, dtype, stride, device, label or temperature that does not fit the above; not exactly one of
            positive and labels.
    """
    _check(query, positive, keys, labels)
    loss, _ = torch.ops.dino_kernels.info_nce(
        query,
        None if positive is None else positive.detach(),
        keys.detach(),
        labels,
        temperature("temp", temp, query.device),
        scale,
    )
    return loss


def info_nce_reference(
    query: Tensor,
    positive: Tensor | None,
    keys: Tensor,
    *,
    temp: float | Tensor = 0.2,
    labels: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`info_nce` in plain PyTorch."""
    logits = query @ keys.detach().t()
    if labels is None:
        assert positive is not None
        logits = torch.cat([(query * positive.detach()).sum(1, keepdim=True), logits], dim=1)
        labels = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return scale * F.cross_entropy(logits / temp, labels)


def _check(query: Tensor, positive: Tensor | None, keys: Tensor, labels: Tensor | None) -> None:
    if (positive is None) == (labels is None):
        raise ValueError("exactly one of positive and labels must be given")
    named = {"query": query, "keys": keys} | ({} if positive is None else {"positive": positive})
    for name, x in named.items():
        if x.ndim != 2 or not len(x) or x.dtype not in DTYPES or x.dtype != query.dtype or not x.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous matrix of float32, float16 or bfloat16, of the dtype of query, with at "
                f"least one row, got shape {list(x.shape)}, {x.dtype}, strides {list(x.stride())}; query is "
                f"{query.dtype}"
            )
    rows, channels = query.shape
    if not 1 <= channels <= 256 or keys.shape[1] != channels:
        raise ValueError(
            "query and keys must have shapes [R, D] and [K, D] with 1 <= D <= 256, "
            f"got {list(query.shape)} and {list(keys.shape)}"
        )
    if positive is not None and positive.shape != query.shape:
        raise ValueError(f"positive must have the shape of query {list(query.shape)}, got {list(positive.shape)}")
    if labels is not None and (
        list(labels.shape) != [rows] or labels.dtype != torch.int64 or not labels.is_contiguous()
    ):
        raise ValueError(
            f"labels must have shape [{rows}], dtype int64 and be contiguous, got {list(labels.shape)}, "
            f"{labels.dtype}, strides {list(labels.stride())}"
        )
    devices = {name: x.device for name, x in named.items()} | ({} if labels is None else {"labels": labels.device})
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")


# --- registration ------------------------------------------------------------------------------------


@custom_op("info_nce", triton="info_nce.forward_triton")
def _loss(
    query: Tensor, positive: Tensor | None, keys: Tensor, labels: Tensor | None, temp: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(loss, its gradient for query)"""
    return _forward_cpu(query, positive, keys, labels, temp, scale)


@_loss.register_fake
def _(query, positive, keys, labels, temp, scale):
    return query.new_empty((), dtype=torch.float32), torch.empty_like(query)


_loss.register_autograd(backward_of("info_nce"), setup_context=keep_gradient)


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(query, positive, keys, labels, temp, scale):
    if labels is not None and not 0 <= labels.min() <= labels.max() < len(keys):
        raise ValueError(f"labels must be in [0, {len(keys)}), got {labels.min()} to {labels.max()}")
    grad = torch.empty_like(query)
    loss = _C.info_nce(
        query=query.data_ptr(),
        positive=address(positive),
        labels=address(labels),
        keys=keys.data_ptr(),
        grad=grad.data_ptr(),
        rows=len(query),
        outputs=len(keys),
        channels=query.shape[1],
        dtype=DTYPES[query.dtype],
        temp=float(temp),
        scale=scale,
        threads=torch.get_num_threads(),
    )
    return torch.tensor(loss, dtype=torch.float32, device="cpu"), grad
