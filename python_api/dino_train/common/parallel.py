"""Data parallel training: one process per device, started by torchrun. In a single process, nothing is communicated."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dino_train.common.device import gpu_of


def join(device: torch.device) -> torch.device:
    """Join the process group of torchrun's environment variables, if set; returns this process's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    options: dict[str, Any] = {"backend": "gloo"}
    if (gpu := gpu_of(device)) is not None:
        device = gpu.of_rank(int(os.environ["LOCAL_RANK"]))
        own = gpu_of(device)
        assert own is not None
        options = own.group()
    # torchrun keeps its store over a restart, with the addresses of processes that have ended.
    store, number, count = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(store=store, rank=number, world_size=count, timeout=timedelta(minutes=10), **options)
    return device


def leave() -> None:
    """Leave the group together at the normal end of a run: otherwise a gloo thread can abort a process at its exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if size() > 1:
        dist.barrier()


def largest(values: Sequence[int], device: torch.device) -> list[int]:
    """The maximum of each value over the ranks; every rank must call it."""
    if size() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def differing(values: Mapping[str, object], device: torch.device) -> list[str]:
    """Names of the values that are not the same on all ranks; every rank must call it with as many."""
    if size() == 1:
        return []
    digests = [hashlib.sha256(repr(value).encode("utf-8", "surrogateescape")).digest() for value in values.values()]
    numbers = [int.from_bytes(digest[:7], "big") for digest in digests]
    both = largest([*numbers, *(-number for number in numbers)], device)
    most, least = both[: len(numbers)], both[len(numbers) :]
    return [name for name, high, low in zip(values, most, least, strict=True) if high != -low]


def gather(rows: Tensor) -> Tensor:
    """The rows [n, ...] of all ranks, in rank order, without a gradient; n may differ, and a rank without rows may pass
    any shape."""
    if size() == 1:
        return rows
    counts = torch.zeros(size(), dtype=torch.int64, device=rows.device)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    shape = torch.tensor([*counts.max().view(1).tolist(), *rows.shape[1:]], device=rows.device)
    dist.all_reduce(shape, dist.ReduceOp.MAX)
    padded = rows.new_zeros(shape.tolist())
    if len(rows):
        padded[: len(rows)] = rows
    parts = gather_equal(padded).chunk(size())
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def gather_equal(rows: Tensor) -> Tensor:
    """`gather` where n is the same on all ranks: nothing is read on the host."""
    if size() == 1:
        return rows
    parts = [rows.new_empty(rows.shape) for _ in range(size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Copy the values of rank 0 to all ranks, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, 0)


def mean(values: Tensor) -> "Pending":
    """Start the mean over the ranks, in place."""
    if size() > 1:
        values /= size()
    return Pending([values])


def combine_mass(temp: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Of `dino_kernels.sinkhorn_center`: from [2, K] of each rank, column maxima and sums of exponentials below them,
    those over all ranks. None in a single process."""
    if size() == 1:
        return None

    def combine(mass: Tensor) -> Tensor:
        top = mass[0].clone()
        dist.all_reduce(top, dist.ReduceOp.MAX)
        total = mass[1] * ((mass[0] - top) / temp).exp()
        dist.all_reduce(total)
        return torch.stack([top, total])

    return combine


class Pending:
    """Asynchronous all-reduces (sums over the ranks)."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.handles: list[dist.Work] = []
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        if size() > 1:
            self.handles.append(dist.all_reduce(tensor, async_op=True))

    def wait(self) -> None:
        for handle in self.handles:
            handle.wait()
        self.handles.clear()
