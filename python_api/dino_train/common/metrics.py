"""Metrics of a run: metrics.jsonl and TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_train.common.files import atomic

METRICS = "metrics.jsonl"


class Metrics:
    """Metrics of a run, appended to metrics.jsonl, and to TensorBoard if it is installed.

    Args:
        folder: the run's folder; None writes nothing.
        step: rows of later steps, written after the checkpoint from which a run resumes, are dropped.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._board = None
        if folder is None:
            self._file = open(os.devnull, "w")  # noqa: SIM115
            return
        path = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        with atomic(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  line-buffered: nothing is lost on a kill
        self._board = _tensorboard(folder, step)

    def write(self, step: int, **values: Any) -> None:
        """One row: the number of steps done, and the measured values."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without an incomplete last line after a kill."""
    path = folder / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)


def collapse_signs(row: Mapping[str, float], log_k: float) -> dict[str, bool]:
    """The ways in which outputs collapse, see `CollapseWatch`, in a row of metrics; entropies are in nats."""
    if "spread" in row:
        return {"constant": row["spread"] < 0.1}
    entropy, single_entropy = row["teacher_entropy"], row["teacher_single_entropy"]
    return {
        "uniform": abs(row["loss"] - log_k) < 1e-3 * log_k,
        "constant": entropy - single_entropy < 1e-3 * log_k and entropy < 0.9 * log_k,
    }
