"""Metrics of a run: metrics.jsonl and TensorBoard."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dino_train.common.files import atomic

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"


class Metrics:
    """Metrics of a run, appended to metrics.jsonl, and to TensorBoard if it is installed.

    Args:
        folder: the run's folder; None writes nothing.
        step: rows of later steps, written after the checkpoint from which a run resumes, are dropped.
        listeners: called with each row.
    """

    def __init__(
        self, folder: Path | None, step: int, listeners: Sequence[Callable[[dict[str, Any]], object]] = ()
    ) -> None:
        self._board, self._listeners = None, listeners
        if folder is None:
            self._file = open(os.devnull, "wb", buffering=0)  # noqa: SIM115
            return
        path = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= step] if step else []
        with atomic(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  unbuffered: nothing is lost on a kill
        self._board = _tensorboard(folder, step)

    def write(self, step: int, **values: Any) -> None:
        """One row: the number of steps done, and the measured values. On a full disk it is left out, with a warning."""
        row = {"step": step, **values}
        line = json.dumps(row).encode() + b"\n"
        try:
            end = os.fstat(self._file.fileno()).st_size
            if self._file.write(line) < len(line):
                self._file.truncate(end)
                raise OSError("the disk is full")
            if self._board:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            logger.warning("the metrics of step %d cannot be written (%s); training continues", step, error)
        for listener in self._listeners:
            listener(dict(row))

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without a line that a kill left incomplete."""
    path = folder / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)


def class_loss(row: Mapping[str, float]) -> float:
    """What is at ln K if outputs are uniform: the loss, or the first term of iBOT's."""
    return row.get("class_loss", row["loss"])


def collapse_signs(row: Mapping[str, float], log_k: float) -> dict[str, bool]:
    """The ways in which outputs collapse, see `CollapseWatch`, in a row of metrics; entropies are in nats."""
    if "spread" in row:
        return {"constant": row["spread"] < 0.1}

    def constant(of: str, log_k: float) -> bool:
        entropy, single_entropy = row[f"{of}_entropy"], row[f"{of}_single_entropy"]
        return entropy - single_entropy < 1e-3 * log_k and entropy < 0.9 * log_k

    signs = {"uniform": abs(class_loss(row) - log_k) < 1e-3 * log_k, "constant": constant("teacher", log_k)}
    if "patch_entropy" in row:
        log_k = row["patch_entropy"] + row["patch_kl_to_uniform"]  # the patches may have another K
        signs["uniform patches"] = row["patch_single_entropy"] > (1 - 1e-3) * log_k
        signs["constant patches"] = constant("patch", log_k)
    return signs
