"""The mass that each output gets from all rows, and the center that a few such sweeps give: Sinkhorn-Knopp.

    without a center    top_k = max_b s_bk        mass_k = sum_b exp((s_bk - top_k) / temp)
    with a center c     top_k = 0                 mass_k = sum_b softmax_k((s_b - c) / temp)

Sinkhorn-Knopp divides the columns of exp(s / temp) by their sums, then the rows, n times (Caron et al. 2020, section
3.1). What the columns were divided by in all is a center, and the last division of the rows is a softmax:

    c(1)_k   = temp ln sum_b exp(s_bk / temp)
    c(i+1)_k = c(i)_k + temp ln sum_b softmax_k((s_b - c(i)) / temp)
    q_b      = softmax((s_b - c(n)) / temp)                                   the assignments after n iterations

No assignments are stored and nothing overflows. A constant of all columns, as the number of rows, cancels in q.

Dimensions: R rows b, K outputs k.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dino_kernels._core.native import _C, DTYPES, address
from dino_kernels._core.registry import custom_op
from dino_kernels.ops.dino_loss import temperature

__all__ = ["column_mass", "column_mass_reference", "sinkhorn_center", "sinkhorn_center_reference"]

_SMALLEST = 1.2e-38  # float32's smallest normal number is 1.18e-38


def column_mass(
    logits: Tensor, center: Tensor | None, *, temp: float | Tensor, counted: Tensor | None = None
) -> Tensor:
    """One sweep of Sinkhorn-Knopp over the rows of one process; formula in the module's docstring.

    Statistics are float32; a repeated call is bitwise equal. Not differentiable.

    Args:
        logits: [R, K]; float32, float16 or bfloat16; rows may be strided.
        center: [K], float32; None in the first sweep.
        temp: temperature > 0, a float or a 0-d tensor (read on its device: no synchronization).
        counted: bool [R], contiguous: the other rows are not read. None: all rows.

    Returns:
        float32 [2, K], top and mass; -inf and 0 where no row is counted and there is no center. Results of several
        processes are combined by: top = max over p of top_p, mass = sum over p of mass_p exp((top_p - top) / temp).

    Raises:
        ValueError: a shape, dtype, stride, device or temperature that does not fit the above.
    """
    if logits.ndim != 2 or not logits.numel() or logits.dtype not in DTYPES or logits.stride(1) != 1:
        raise ValueError(
            "logits must have shape [R, K] with R >= 1 and K >= 1, dtype float32, float16 or bfloat16 and adjacent "
            f"columns (stride 1), got shape {list(logits.shape)}, {logits.dtype}, strides {list(logits.stride())}"
        )
    rows, outputs = logits.shape
    for name, x, size, dtype in (("center", center, outputs, torch.float32), ("counted", counted, rows, torch.bool)):
        if x is not None and (
            list(x.shape) != [size] or x.dtype != dtype or not x.is_contiguous() or x.device != logits.device
        ):
            raise ValueError(
                f"{name} must have shape [{size}], dtype {dtype}, be contiguous and on {logits.device}, got "
                f"{list(x.shape)}, {x.dtype}, strides {list(x.stride())}, {x.device}"
            )
    center = None if center is None else center.detach()
    temp = temperature("temp", temp, logits.device)
    return torch.ops.dino_kernels.column_mass(logits.detach(), center, counted, temp)


def column_mass_reference(
    logits: Tensor, center: Tensor | None, *, temp: float | Tensor, counted: Tensor | None = None
) -> Tensor:
    """`column_mass` in plain PyTorch; some row must be counted."""
    logits = logits.detach() if counted is None else logits.detach()[counted]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if center is None:
        top = logits.amax(dim=0)
        return torch.stack([top, ((logits - top) / temp).exp().sum(dim=0)])
    mass = ((logits - center) / temp).softmax(dim=1).sum(dim=0)
    return torch.stack([torch.zeros_like(mass), mass])


def sinkhorn_center(
    logits: Tensor,
    *,
    temp: float | Tensor,
    iterations: int = 3,
    counted: Tensor | None = None,
    combine: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The center c with which softmax((logits - c) / temp) is what `iterations` of Sinkhorn-Knopp make of the logits.

    Caron et al. 2020, section 3.1; Oquab et al. 2023, section 4. One iteration is a softmax over the rows and then over
    the outputs. A mass that underflows is taken as 1.2e-38: the center of that output falls by 87 temp a sweep.

    Args:
        logits: rows of all views that share the center [R, K]; as in `column_mass`.
        temp: temperature > 0, a float or a 0-d tensor (read on its device: no synchronization).
        iterations: at least 1; as many sweeps over the logits.
        counted: bool [R], the rows that are read; None: all. Some row of some process must be.
        combine: from the [2, K] of this process, as `column_mass` returns it, that of all processes. None: one process.

    Returns:
        float32 [K], a center for `dino_loss` and `dino_head_loss` with teacher_temp = temp.

    Raises:
        ValueError: what `column_mass` raises; iterations < 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be >= 1, got {iterations}")

    def change(center: Tensor | None) -> Tensor:
        sweep = column_mass(logits, center, temp=temp, counted=counted)
        top, mass = sweep if combine is None else combine(sweep)
        return mass.clamp_min(_SMALLEST).log_().mul_(temp).add_(top)

    center = change(None)
    for _ in range(iterations - 1):
        center = change(center).add_(center)
    return center


def sinkhorn_center_reference(logits: Tensor, *, temp: float | Tensor, iterations: int = 3) -> Tensor:
    """`sinkhorn_center` as the iterations themselves, in plain PyTorch; `logits` are those of all processes.

    q = exp(log_q) is divided by the sums of its columns and then of its rows, `iterations` times.
    """
    log_q = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)) / temp
    center = torch.zeros_like(log_q[0])
    for _ in range(iterations):
        sums = log_q.logsumexp(dim=0)
        log_q = (log_q - sums).log_softmax(dim=1)
        center += temp * sums
    return center


# --- registration ------------------------------------------------------------------------------------


@custom_op("column_mass", triton="column_mass.forward_triton")
def _mass(logits: Tensor, center: Tensor | None, counted: Tensor | None, temp: Tensor) -> Tensor:
    return _forward_cpu(logits, center, counted, temp)


@_mass.register_fake
def _(logits, center, counted, temp):
    return logits.new_empty(2, logits.shape[1], dtype=torch.float32)


# --- CPU ---------------------------------------------------------------------------------------------


def _forward_cpu(logits, center, counted, temp):
    (rows, outputs), mass = logits.shape, logits.new_empty(2, logits.shape[1], dtype=torch.float32)
    _C.column_mass(
        logits=logits.data_ptr(),
        center=address(center),
        counted=address(counted),
        mass=mass.data_ptr(),
        rows=rows,
        outputs=outputs,
        stride=logits.stride(0),
        dtype=DTYPES[logits.dtype],
        temp=float(temp),
        threads=torch.get_num_threads(),
    )
    return mass
