"""The command line: dino-train pretrain | pack | knn | attention | export."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from PIL.Image import Image

from dino_train.config import EMBEDDED_DATA, PRESETS, PretrainConfig, default_workers
from dino_train.data import ImageFolder, split
from dino_train.decode import UnreadableImage, load_file
from dino_train.export import FOLDERS, Format, export
from dino_train.learner import NonFiniteLoss
from dino_train.model import ARCHS, VisionTransformer
from dino_train.pack import pack
from dino_train.train import Interrupted, pick_device, pretrain
from dino_train.weights import Trained, load_trained


@dataclass
class _Weights:
    """Where a trained backbone comes from."""

    checkpoint: Path
    """A run's folder, a checkpoint, or a file of published weights."""
    arch: Literal[ARCHS] | None = None  # type: ignore[valid-type]
    """Backbone that the weights must be of. Default: what they are of."""
    patch_size: int | None = None
    """Side of a ViT's patch, in pixels, that the weights must be of. Default: what they are of."""
    net: Literal["teacher", "student"] = "teacher"
    """Which of the two networks."""
    allow_partial: bool = False
    """Load the weights that match and warn of the others, in place of an error."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def load(self) -> Trained:
        return load_trained(
            self.checkpoint,
            arch=self.arch,
            patch_size=self.patch_size,
            net=self.net,
            allow_partial=self.allow_partial,
            device=pick_device(self.device),
        )


@dataclass
class Knn(_Weights):
    """Weighted k-NN accuracy of a trained backbone on images in class folders."""

    data: Annotated[Path, tyro.conf.arg(aliases=["--data-path"])] = EMBEDDED_DATA
    """Folder, .zip or .tar with train/<class>/ and val/<class>/, or <class>/ (then a few images are held out)."""
    nb_knn: tuple[int, ...] = (10, 20)
    """Numbers of neighbors."""
    num_workers: int = 2
    """Threads that read images."""

    def run(self) -> None:
        from dino_train.evaluate import knn_accuracy

        trained = self.load()
        train, held_out = split(self.data)
        values = knn_accuracy(
            trained.backbone, train, held_out, trained.image_size, ks=self.nb_knn, num_workers=self.num_workers
        )
        print("  ".join(f"{name} {value:.2f} %" for name, value in values.items()))


@dataclass
class Attention(_Weights):
    """Self-attention maps of the last block as PNGs: per head, over the image, and one sheet of all."""

    image: tuple[Path, ...] = ()
    """Image files, or folders or .zip files of images. Default: 8 held-out images of the run's data."""
    output_dir: Path | None = None
    """Where the PNGs go. Default: attention/ beside the checkpoint."""
    image_size: int | None = None
    """Short side in pixels at which the network sees an image. Default: 2 x its training size (at most 480)."""

    def run(self) -> None:
        from dino_train.attention import sheet, write_maps

        trained = self.load()
        backbone = trained.backbone
        if not isinstance(backbone, VisionTransformer):
            raise ValueError(f"{trained.arch} has no self-attention; choose a run of a ViT")
        folder = (
            self.output_dir or (self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent) / "attention"
        )
        size = self.image_size or max(trained.image_size, min(480, 2 * trained.image_size))
        loaded: dict[str, Image] = {}
        for name, load in self._choose(trained):
            try:
                stem = str(Path(name).with_suffix("")).replace("/", "_")
                loaded[stem if stem not in loaded else f"{stem}_{len(loaded)}"] = load()
            except UnreadableImage as error:
                logging.warning("skipped %s", error)
        if not loaded:
            raise ValueError("none of the images could be read; name some with --image")
        written = [path for stem, image in loaded.items() for path in write_maps(backbone, image, folder / stem, size)]
        sheet(backbone, list(loaded.values()), size).save(folder / "sheet.png")
        print(f"{len(written)} maps and sheet.png in {folder}")

    def _choose(self, trained: Trained) -> Iterator[tuple[str, Callable[[], Image]]]:
        """(name, function that loads it) of each image asked for."""
        for path in self.image:
            if path.is_file() and path.suffix.lower() != ".zip":
                yield path.name, partial(load_file, path)
            else:
                images = ImageFolder(path)
                yield from ((name, partial(images.load, i)) for i, name in enumerate(images.names))
        if not self.image:
            images = split(trained.data or EMBEDDED_DATA)[1]
            for i in range(0, len(images), max(1, len(images) // 8))[:8]:
                yield images.names[i], partial(images.load, i)


@dataclass
class Export(_Weights):
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
    logging.basicConfig(format="dino-train: %(message)s", level=logging.WARNING)
    logging.getLogger("dino_train.weights").setLevel(logging.INFO)  # says which weights of a file it takes
    command = (
        Annotated[Pretrain, tyro.conf.subcommand("pretrain", default=_preset(argv))]
        | Annotated[Pack, tyro.conf.subcommand("pack")]
        | Annotated[Knn, tyro.conf.subcommand("knn")]
        | Annotated[Attention, tyro.conf.subcommand("attention")]
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
