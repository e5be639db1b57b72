"""Views and uninitialized results of ops, the same for the kernels of every device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def last_segments(weights: Tensor, offsets: Sequence[int], rows: Tensor) -> tuple[Tensor, Tensor]:
    """v [K, D] and g [K, 1] of a weight-normed layer with rows [K, D], whose g and v are the last two segments."""
    v, g = weights[offsets[-2] : offsets[-2] + rows.numel()], weights[offsets[-3] : offsets[-3] + len(rows)]
    return v.view(rows.shape), g.view(-1, 1)


def empty_outputs(x: Tensor, branch: Tensor, normed_rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = len(x if normed_rows is None else normed_rows)
    mean = x.new_empty(count, dtype=torch.float32)
    return torch.empty_like(x), branch.new_empty(count, x.shape[1]), mean, torch.empty_like(mean)


def same_gradient(grad_normed: Tensor, total: Tensor, scale: Tensor | None, rows: Tensor | None) -> bool:
    """Whether the branch's gradient is that of x."""
    return scale is None and rows is None and total.dtype == grad_normed.dtype


def empty_gradients(
    grad_normed: Tensor, total: Tensor, scale: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (
        (0,)
        if same_gradient(grad_normed, total, scale, rows)
        else (len(total if rows is None else rows), total.shape[1])
    )
    return torch.empty_like(total), grad_normed.new_empty(shape)


def empty_output(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(x) if wanted else x.new_empty(0)
