"""Metrics and settings of a run for Weights & Biases or MLflow."""

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

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
        """Where it sends to is set by its own environment variables, such as WANDB_PROJECT or MLFLOW_TRACKING_URI."""
        name, settings, package = self.config.output_dir.absolute().name, self.config.plain(), self._package
        if self.name == "wandb":
            self._try(lambda: package.init(name=name, config=settings, dir=str(self.config.output_dir)))
        else:
            self._try(lambda: (package.start_run(run_name=name), package.log_params(settings)))

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
