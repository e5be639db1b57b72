"""Rows of earlier steps that a step compares with."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dino_train.common import parallel


class Queue:
    """The last K rows [K, ...] of all ranks, the same on each; any number of rows a step fits.

    Args:
        rows: what it holds at first.
        batch: rows of a rank and step.

    Raises:
        ValueError: a step of all ranks has more rows than it holds.
    """

    def __init__(self, rows: Tensor, batch: int) -> None:
        if 0 < len(rows) < batch * parallel.size():
            raise ValueError(
                f"queue_size must be 0 or at least the {batch * parallel.size()} images of a step, got {len(rows)}"
            )
        self.rows = rows
        self.position = torch.zeros((), dtype=torch.int64, device=rows.device)  # of the oldest

    def __len__(self) -> int:
        return len(self.rows)

    def push(self, rows: Tensor, refused: Tensor) -> None:
        """Replace the oldest by this rank's and the others' rows; without a sync, and not at all if `refused`."""
        rows = parallel.gather_equal(rows).to(self.rows.dtype)
        places = (self.position + torch.arange(len(rows), device=rows.device)) % len(self)
        self.rows.index_copy_(0, places, torch.where(refused, self.rows[places], rows))
        self.position.copy_((self.position + torch.where(refused, 0, len(rows))) % len(self))

    def state_dict(self) -> dict[str, Tensor]:
        return {"queue": self.rows, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rows.copy_(state["queue"])
        self.position.copy_(state["position"])
