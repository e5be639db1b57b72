"""Sequences of tokens packed into one tensor, and the ones that drop path leaves of them.

Dimensions: S sequences, T tokens of all sequences together, C channels.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dino_kernels._core.device import on_gpu

__all__ = ["Branch", "Packing", "drop_path", "split_sequences"]


class Packing:
    """How sequences lie in [T, C], one after the other.

    Args:
        cu_seqlens: bounds of the sequences [S + 1], int32, on the device of the tokens. Their values are not checked,
            since on a GPU that would need a device-to-host sync: `Packing.of` makes right ones.
        groups: the same on the host: (number of sequences, tokens of each), in order.

    Raises:
        ValueError: cu_seqlens has another shape or dtype.
    """

    def __init__(self, cu_seqlens: Tensor, groups: Sequence[tuple[int, int]]) -> None:
        self.cu_seqlens, self.groups = cu_seqlens, list(groups)
        self.flat = [n for group in self.groups for n in group]
        self.tokens = sum(count * length for count, length in self.groups)
        bounds = 1 + sum(self.flat[::2])
        if cu_seqlens.shape != (bounds,) or cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_contiguous():
            raise ValueError(
                f"cu_seqlens must have shape [{bounds}], as groups say, dtype int32 and be contiguous, "
                f"got {list(cu_seqlens.shape)}, {cu_seqlens.dtype}"
            )

    @staticmethod
    def of(groups: Sequence[tuple[int, int]], device: torch.device | str) -> "Packing":
        """The packing of groups, (number of sequences, tokens of each); nothing is copied to the device.

        Raises:
            ValueError: no group, a negative number or a group of sequences without tokens.
        """
        if not groups or any(count < 0 or length < 1 for count, length in groups):
            raise ValueError(
                f"groups must be (number of sequences >= 0, tokens of each >= 1), at least one, got {list(groups)[:8]}"
            )
        first = [0, *accumulate(count * length for count, length in groups)]
        first[-1] += 1  # the end is a bound, too
        bounds = [
            torch.arange(first[i], first[i + 1], length, dtype=torch.int32, device=device)
            for i, (_, length) in enumerate(groups)
        ]
        return Packing(bounds[0] if len(bounds) == 1 else torch.cat(bounds), groups)


def split_sequences(x: Tensor, groups: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[T, C] -> a view [sequences, tokens, C] for each group (number of sequences, tokens of each)"""
    parts = x.split([count * length for count, length in groups])
    return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]


class Branch(NamedTuple):
    """The sequences that drop path leaves of a block's branch: some of them, or all with factors of zero.

    packing: of the sequences that are left.
    scale: factor of each of their tokens, float32; None: 1.
    rows, sequences: indices of the tokens and sequences that are left, int32 and sorted; None: all.
    """

    packing: Packing
    scale: Tensor | None = None
    rows: Tensor | None = None
    sequences: Tensor | None = None

    @staticmethod
    def of_kept(packing: Packing, kept: np.ndarray, factors: np.ndarray) -> "list[Branch]":
        """For each row of kept [R, S] the sequences of a packing on the CPU for which it is true, times its factor.

        kept: bool. factors: float32 [R].
        """
        counts, lengths = np.array(packing.groups).T
        tokens, count = lengths.repeat(counts), len(kept)
        left = np.stack([part.sum(1) for part in np.split(kept, counts.cumsum()[:-1], 1)], 1).tolist()
        bounds = np.zeros((count, 1 + len(tokens)), np.int32)
        (kept * tokens).cumsum(1, out=bounds[:, 1:])
        sizes, of_tokens = kept.sum(1), kept.repeat(tokens, 1)

        def pieces(values: np.ndarray, chosen: np.ndarray, sizes: np.ndarray) -> tuple[Tensor, ...]:
            return torch.from_numpy(np.broadcast_to(values, chosen.shape)[chosen]).split(sizes.tolist())

        columns = zip(
            pieces(bounds, np.hstack((np.ones((count, 1), bool), kept)), 1 + sizes),
            pieces(factors[:, None], of_tokens, bounds[:, -1]),
            pieces(np.arange(packing.tokens, dtype=np.int32), of_tokens, bounds[:, -1]),
            pieces(np.arange(len(tokens), dtype=np.int32), kept, sizes),
            left,
            strict=True,
        )
        return [
            Branch(packing, scale)
            if len(sequences) == len(tokens)
            else Branch(Packing(bound, list(zip(groups, lengths.tolist(), strict=True))), scale, rows, sequences)
            for bound, scale, rows, sequences, groups in columns
        ]

    def class_tokens(self) -> "Branch":
        """The same of sequences of one token."""
        first = self.packing.cu_seqlens[:-1]
        scale = None if self.scale is None else self.scale.index_select(0, first)
        return Branch(self.packing, scale, self.sequences, self.sequences)


def drop_path(packing: Packing, depth: int, rate: float, uniform: bool = False) -> list[tuple[Branch, Branch, Branch]]:
    """Stochastic depth (Huang et al. 2016), drawn from torch's generator, for `depth` blocks in a row.

    A sequence's branch is multiplied by a random 0 or 1 / keep, where 1 - keep rises linearly from 0 in the first block
    to `rate` in the last. On a CPU the sequences of zero are left out; on a GPU they are multiplied: shapes that depend
    on random numbers would need a device-to-host sync and fit no CUDA graph.

    Args:
        packing: of all sequences.
        depth: number of blocks, >= 1.
        rate: probability in [0, 1).
        uniform: `rate` is that of every block, as in DINOv2 (dinov2/models/vision_transformer.py:117-120).

    Returns:
        For each block the branches of its attention, its MLP and the next block's attention: `drop_path` of `Block`.

    Raises:
        ValueError: depth or rate is out of range.
    """
    if depth < 1 or not 0 <= rate < 1:
        raise ValueError(f"depth must be at least 1 and rate in [0, 1), got {depth} and {rate}")
    return _draw(packing, depth, rate if uniform else 0.0, rate)


def _draw(packing: Packing, depth: int, first: float, last: float) -> list[tuple[Branch, Branch, Branch]]:
    device, sequences = packing.cu_seqlens.device, len(packing.cu_seqlens) - 1
    keep = 1 - torch.linspace(first, last, depth, device=device).view(-1, 1, 1)
    kept = torch.rand(depth, 2, sequences, device=device) < keep
    if not on_gpu(device):
        factors = (1 / keep).expand(-1, 2, 1).flatten().numpy()
        branches = Branch.of_kept(packing, kept.flatten(0, 1).numpy(), factors)
    else:
        scale = keep.new_empty(depth, 2, packing.tokens)
        of_sequences = kept.unsqueeze(3).split([count for count, _ in packing.groups], 2)
        of_tokens = scale.split([count * length for count, length in packing.groups], 2)
        for chosen, to, group in zip(of_sequences, of_tokens, packing.groups, strict=True):
            torch.div(chosen.expand(depth, 2, *group), keep.unsqueeze(3), out=to.unflatten(2, group))
        branches = [Branch(packing, row) for row in scale.flatten(0, 1)]
    branches.append(Branch(packing))
    return [(branches[i], branches[i + 1], branches[i + 2]) for i in range(0, 2 * depth, 2)]
