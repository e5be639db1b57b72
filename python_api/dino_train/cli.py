"""The command line: dino-train pretrain | evaluate <protocol> | export."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dino_train.config import PRESETS, PretrainConfig
from dino_train.evaluate.commands import Evaluate
from dino_train.learner import NonFiniteLoss
from dino_train.options import WeightsOptions
from dino_train.train import Interrupted, pretrain
from dino_train.weights import export


@dataclass
class Export(WeightsOptions):
    """The backbone's weights as a safetensors file."""

    output: Path = Path("backbone.safetensors")
    """File to write."""

    def run(self) -> None:
        export(self.load(), self.output)
        print(f"wrote {self.output}")


@dataclass(frozen=True)
class Pretrain(PretrainConfig):
    """Complete DINO pretraining. Defaults are the reference's; --preset demo learns something in minutes."""

    def run(self) -> None:
        pretrain(self)


def _preset(argv: Sequence[str]) -> Pretrain:
    """The defaults that --preset asks for; tyro then reads the rest, and the flag itself, over them."""
    name = "none"
    for i, word in enumerate(argv):
        if word == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif word.startswith("--preset="):
            name = word.partition("=")[2]
    return Pretrain(preset=name, **PRESETS[name]) if name in PRESETS else Pretrain()  # type: ignore[arg-type]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. What a user got wrong is one line, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="dino-train: %(message)s", level=logging.WARNING)
    command = (
        Annotated[Pretrain, tyro.conf.subcommand("pretrain", default=_preset(argv))]
        | Evaluate
        | Annotated[Export, tyro.conf.subcommand("export")]
    )
    try:
        tyro.cli(command, args=argv, prog="dino-train").run()  # type: ignore[call-overload]
    except Interrupted as stop:
        print(f"dino-train: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("dino-train: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, NonFiniteLoss) as error:
        print(f"dino-train: error: {error}", file=sys.stderr)
        return 1
    return 0
