"""The command line: dino-train pretrain | pack | evaluate <protocol> | export | --version."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dino_train import __version__
from dino_train.config.options import WeightsOptions
from dino_train.config.pretrain import PRESETS, PretrainConfig, default_workers
from dino_train.data.folder import ImageFolder
from dino_train.data.pack import pack
from dino_train.engine.learner import NonFiniteLoss
from dino_train.engine.train import Interrupted, pretrain
from dino_train.evaluate.commands import Evaluate
from dino_train.models.export import FOLDERS, Format, export

DESCRIPTION = "DINO pretraining, evaluation of the features, and export. --version prints the version."


@dataclass
class Export(WeightsOptions):
    """The backbone for other libraries: safetensors, timm, Hugging Face or ONNX."""

    format: Format = "safetensors"
    """safetensors or onnx: a file. timm: a folder for create_model("local-dir:FOLDER", pretrained=True). huggingface:
    a folder for ViTModel.from_pretrained(FOLDER, add_pooling_layer=False) and AutoImageProcessor."""
    output: Path | None = None
    """What to write. Default: backbone.safetensors, backbone.onnx, backbone-timm or backbone-huggingface."""

    def run(self) -> None:
        name = f"backbone{'-' if self.format in FOLDERS else '.'}{self.format}"
        output = self.output or Path(name)
        export(self.load(), output, self.format)
        print(f"wrote {output}")


@dataclass
class Pack:
    """Write a folder of images as one tar of small JPEGs, which `pretrain --data` reads faster and other programs as
    WebDataset. Called again after an interruption, it goes on."""

    data: Annotated[Path, tyro.conf.arg(aliases=["--data-path"])]
    """Folder, .zip or .tar of images."""
    out: Path
    """File to write; ends in .tar."""
    size: int = 400
    """Largest side of an image, in pixels; larger ones are shrunk."""
    quality: int = 90
    """Quality of the JPEGs, 1 to 95. JPEGs that are small enough are copied."""
    num_workers: int = field(default_factory=default_workers)
    """Threads."""

    def run(self) -> None:
        images = ImageFolder(self.data)
        try:
            count = pack(images, self.out, size=self.size, quality=self.quality, num_workers=self.num_workers)
        except OSError as error:
            raise ValueError(
                f"cannot write {self.out}: {error.strerror}; the same command goes on from {self.out}.partial"
            ) from error
        print(f"{count} of {len(images)} images in {self.out}, {self.out.stat().st_size / 1e6:.1f} MB")


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
    if argv == ["--version"]:
        print(f"dino-train {__version__}")
        return 0
    logging.basicConfig(format="dino-train: %(message)s", level=logging.WARNING)
    logging.getLogger("dino_train.models.weights").setLevel(logging.INFO)  # says which weights of a file it takes
    command = (
        Annotated[Pretrain, tyro.conf.subcommand("pretrain", default=_preset(argv))]
        | Annotated[Pack, tyro.conf.subcommand("pack")]
        | Evaluate
        | Annotated[Export, tyro.conf.subcommand("export")]
    )
    try:
        tyro.cli(command, args=argv, prog="dino-train", description=DESCRIPTION).run()  # type: ignore[call-overload]
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
