"""Metrics and settings of a run for Weights & Biases or MLflow."""

import importlib
import json
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from dino_train.common.files import atomic
from dino_train.config.pretrain import PretrainConfig

logger = logging.getLogger(__name__)


class Tracker:
    """The experiment tracker that `config.tracker` names. What it fails in is warned of, and then it gets no more:
    training continues, and metrics.jsonl has everything.

    Raises:
        ValueError: it is not installed.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config, self.name, self.working = config, config.tracker, True
        try:
            self._package: ModuleType = importlib.import_module(self.name)
        except ImportError:
            raise ValueError(f"--tracker {self.name} needs a package: pip install {self.name}") from None

    def begin(self) -> None:
        """Where it sends to is set by its own environment variables, such as WANDB_PROJECT or MLFLOW_TRACKING_URI. A
        resumed run continues the tracker's own, whose id is in tracker.json."""
        self._try(self._begin)

    def _begin(self) -> None:
        folder, settings, package = self.config.output_dir, self.config.plain(), self._package
        name, file = folder.absolute().name, folder / "tracker.json"
        known = json.loads(file.read_text()).get(self.name) if self.config.resume and file.exists() else None
        if self.name == "wandb":
            options = {"name": name, "config": settings, "dir": str(folder), "allow_val_change": True}
            found = package.init(**options, id=known, resume="allow").id
        else:
            found = package.start_run(run_id=known, run_name=name).info.run_id
            if known is None:  # they cannot be changed
                package.log_params(settings)
        with atomic(file) as temporary:
            temporary.write_text(json.dumps({self.name: found}) + "\n")

    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        values = {name: value for name, value in row.items() if name != "step"}
        log = self._package.log if self.name == "wandb" else self._package.log_metrics
        self._try(lambda: log(values, step=row["step"]))

    def close(self) -> None:
        self._try(self._package.finish if self.name == "wandb" else self._package.end_run)

    def _try(self, send: Callable[[], object]) -> None:
        if not self.working:
            return
        try:
            send()
        except Exception as error:  # of any kind: of the network, of an account, of another version
            self.working = False
            why = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("%s gets no more metrics (%s); training continues", self.name, why)
