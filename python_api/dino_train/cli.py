"""The command line: dino-train pretrain | stats | pack | embed | evaluate <protocol> | compare | export | --version."""

import errno
import importlib
import io
import json
import logging
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from dino_train import __version__
from dino_train.common import checkpoint
from dino_train.common.files import atomic
from dino_train.common.scale import require_channels
from dino_train.config.options import WeightsOptions
from dino_train.config.presets import METHOD_DEFAULTS, PRESETS, recipe
from dino_train.config.pretrain import PretrainConfig, default_workers
from dino_train.data.decode import limit_pixels
from dino_train.data.folder import ImageFolder
from dino_train.data.pack import pack
from dino_train.data.stats import channels_of, is_deep, measure
from dino_train.engine.compare import Compare
from dino_train.engine.train import Interrupted, NonFiniteLoss, dry_run, pretrain
from dino_train.evaluate.attention import Attention
from dino_train.evaluate.baselines import Baselines
from dino_train.evaluate.copy_detection import CopyDetection
from dino_train.evaluate.embed import Embed
from dino_train.evaluate.finetune import Finetune
from dino_train.evaluate.knn import Knn
from dino_train.evaluate.linear import Linear
from dino_train.evaluate.report import Report
from dino_train.evaluate.retrieval import Retrieval
from dino_train.evaluate.segmentation import Segmentation
from dino_train.evaluate.video_segmentation import VideoSegmentation
from dino_train.models.export import FOLDERS, Format, export

DESCRIPTION = "DINO pretraining, evaluation of the features, and export. --version prints the version."
_WORDS = {"on": True, "true": True, "1": True, "yes": True, "off": False, "false": False, "0": False, "no": False}


def _switch(words: list[str]) -> bool:
    if words[0].lower() not in _WORDS:
        raise ValueError(f"expected true or false (or on, off, yes, no, 1, 0), got {words[0]}")
    return _WORDS[words[0].lower()]


def _word(hint: Any) -> Any:
    """A bool, or None, that takes a word as the reference's flags do: --norm_last_layer false"""
    switch = Annotated[
        bool,
        tyro.conf.FlagConversionOff,
        tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            instance_from_str=_switch,
            is_instance=lambda value: isinstance(value, bool),
            str_from_instance=lambda value: [str(value).lower()],
        ),
    ]
    return switch if hint is bool else switch | None


def _single(hint: Any) -> Any:
    """A bool that is a flag without its opposite: --json, no --no-json"""
    return Annotated[hint, tyro.conf.FlagCreatePairsOff]


def _alias(flag: str) -> Callable[[Any], Any]:
    """An option with a second name."""
    return lambda hint: Annotated[hint, tyro.conf.arg(aliases=[flag])]


def _marked(options: type, **marks: Callable[[Any], Any]) -> Any:
    """A dataclass of options with what tyro must know of some of them besides their types."""
    hints = get_type_hints(options)
    annotations = {name: mark(hints[name]) for name, mark in marks.items()}
    namespace = {"__annotations__": annotations, "__doc__": options.__doc__, "__module__": options.__module__}
    frozen = options.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return dataclass(frozen=frozen, kw_only=True)(type(options.__name__, (options,), namespace))


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

    data: Path
    """Folder, .zip or .tar of images."""
    out: Path
    """File to write; ends in .tar."""
    size: int = 400
    """Largest side of an image, in pixels; larger ones are shrunk."""
    quality: int = 90
    """Quality of the JPEGs, 1 to 95. JPEGs that are small enough are copied."""
    max_megapixels: float = 179
    """Larger images are left out, but for JPEGs that are shrunk. A thread takes 3 MB or more for a megapixel."""
    num_workers: int = field(default_factory=default_workers)
    """Threads."""

    def run(self) -> None:
        if not 0 < self.max_megapixels < math.inf:
            raise ValueError(f"max_megapixels must be a number above 0, got {self.max_megapixels}")
        limit_pixels(self.max_megapixels)
        images = ImageFolder(self.data)
        images.log_notes()
        if is_deep(images):
            raise ValueError(f"pack writes JPEGs of 8 bits, and {self.data} has images of more: train on the folder")
        try:
            count = pack(images, self.out, size=self.size, quality=self.quality, num_workers=self.num_workers)
        except OSError as error:
            raise ValueError(
                f"cannot write {self.out}: {error.strerror}; the same command goes on from {self.out}.partial"
            ) from error
        print(f"{count} of {len(images)} images in {self.out}, {self.out.stat().st_size / 1e6:.1f} MB")


@dataclass
class Stats:
    """What a set of images holds: channels, depth, range, mean and deviation, sizes, unreadable files and near
    duplicates. The file is what `pretrain --stats` takes."""

    data: Path
    """Folder, .zip or .tar of images."""
    channels: int | None = None
    """Channels that an image is read as, 1 to 16. Default: as many as most images have, without alpha; of gray and RGB
    together 3."""
    out: Path = Path("stats.json")
    """File to write."""
    num_workers: int = field(default_factory=default_workers)
    """Threads."""

    def run(self) -> None:
        if self.channels is not None:
            require_channels(self.channels)
        images = ImageFolder(self.data)
        images.log_notes()
        stats = measure(images, self.channels or channels_of(images), self.num_workers)
        with atomic(self.out) as temporary:
            temporary.write_text(json.dumps(stats.plain(), indent=2) + "\n")
        print("\n".join(stats.lines()))
        command = ["dino-train", "pretrain", "--stats", str(self.out), "--data", str(self.data)]
        print(f"wrote {self.out}, for {shlex.join(command)}")


@dataclass(frozen=True)
class Pretrain(PretrainConfig):
    """Complete DINO pretraining. Defaults are the reference's; --preset demo learns something in minutes."""

    config: Path | None = None
    """File of settings under their names here, JSON (config.json of a run is one) or YAML; flags beside it win."""
    stats: Path | None = None
    """File of `dino-train stats`: channels, value_range, mean and std of the images; flags beside it win."""
    dry_run: bool = False
    """Print what the run would train on, and about how much memory, disk and time it needs, and stop."""

    def run(self) -> None:
        if self.dry_run:
            dry_run(self)
        else:
            pretrain(self)


def _evaluate(name: str, protocol: type, **marks: Callable[[Any], Any]) -> Any:
    return Annotated[_marked(protocol, json=_single, **marks), tyro.conf.subcommand(name)]


_SINGLE = ("resume", "allow_changes", "dry_run")
_WORDED = [name for name, hint in get_type_hints(PretrainConfig).items() if hint is bool and name not in _SINGLE]
_Pretrain = _marked(Pretrain, data=_alias("--data-path"), dry_run=_single, **dict.fromkeys(_WORDED, _word))
_Evaluate: Any = Annotated[
    _evaluate("knn", Knn, data=_alias("--data-path"))
    | _evaluate("linear", Linear, data=_alias("--data-path"), reference=_single, avgpool_patchtokens=_word)
    | _evaluate("finetune", Finetune, data=_alias("--data-path"), resume=_single)
    | _evaluate("retrieval", Retrieval, data=_alias("--data-path"), multiscale=_single)
    | _evaluate(
        "copy-detection",
        CopyDetection,
        data=_alias("--data-path"),
        distractors=_alias("--distractors-path"),
        whitening=_alias("--whitening-path"),
    )
    | _evaluate(
        "video-segmentation", VideoSegmentation, data=_alias("--data-path"), radius=_alias("--size-mask-neighborhood")
    )
    | _evaluate("segmentation", Segmentation, data=_alias("--data-path"))
    | _evaluate("attention", Attention, data=_alias("--image"))
    | _evaluate("baselines", Baselines, data=_alias("--data-path"))
    | _evaluate("report", Report, checkpoint=_alias("--run")),
    tyro.conf.subcommand("evaluate", description="Evaluate a trained backbone with one of several protocols."),
]


def _values(argv: Sequence[str], **defaults: str) -> dict[str, str]:
    """Of these flags; the last of each counts."""
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in defaults:
            defaults[name] = value if equals else following
    return defaults


def _defaults(argv: Sequence[str]) -> PretrainConfig:
    """The defaults that --method, --preset and --arch ask for; tyro then reads the rest, and these too, over them."""
    method, preset, arch = _values(argv, method="", preset="none", arch="").values()
    known = method in ("", *METHOD_DEFAULTS) and preset in ("none", *PRESETS)
    return _Pretrain(**recipe(method or None, preset, arch)) if known else _Pretrain()


_MEASURED = ("channels", "value_range", "mean", "std")
# Of the machine or of the call, not of the run.
_NOT_RESUMED = (*_SINGLE, "config", "stats", "output_dir", "num_workers")


def _expanded(argv: list[str]) -> list[str]:
    """With the settings of the run that --resume continues, then those of --config, before the flags that are given."""
    if argv[:1] != ["pretrain"]:
        return argv
    given = _values(argv, output_dir="", config="", preset="", stats="")
    stated = _settings(Path(given["config"])) if given["config"] else {}
    folder = Path(given["output_dir"] or stated.get("output_dir", PretrainConfig.output_dir))
    saved = {}
    if "--resume" in argv and checkpoint.exists(folder):
        try:
            saved = _settings(folder / "config.json")
        except ValueError as error:
            logging.warning("%s: settings that are not given are the defaults", error)
    known = PretrainConfig.__dataclass_fields__.keys() - set(_NOT_RESUMED)  # another version may have had others
    words = _flags({name: value for name, value in saved.items() if name in known})
    if saved and given["preset"] in PRESETS and given["preset"] != saved.get("preset"):
        words += _flags({name: value for name, value in recipe(None, given["preset"]).items() if name != "data"})
    words += _flags({name: value for name, value in stated.items() if name not in (*_SINGLE, "config", "stats")})
    if given["stats"]:
        measured = _settings(Path(given["stats"]))
        if missing := [name for name in _MEASURED if name not in measured]:
            raise ValueError(f"{given['stats']} has no {missing[0]}: expected a file of dino-train stats")
        words += _flags({name: measured[name] for name in _MEASURED})
    return ["pretrain", *words, *argv[1:]]


def _settings(path: Path) -> dict[str, Any]:
    """The values of a JSON or YAML file.

    Raises:
        ValueError: it cannot be read, or is something else.
    """
    loads: Callable[[str], Any] = json.loads
    if path.suffix in (".yaml", ".yml"):
        try:
            loads = importlib.import_module("yaml").safe_load
        except ImportError:
            raise ValueError(f"{path} needs a package to be read, pip install pyyaml; or write it as JSON") from None
    try:
        values = loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # YAML's errors have no common base with those of JSON and of UTF-8
        raise ValueError(f"{path} is not a file of settings ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected settings by their names")
    return values


def _flags(values: Mapping[str, Any]) -> list[str]:
    """As they would be typed."""
    words = []
    for name, value in values.items():
        if value is not None:
            items = value if isinstance(value, list | tuple) else [value]
            words += [
                f"--{name.replace('_', '-')}",
                *(str(x).lower() if isinstance(x, bool) else str(x) for x in items),
            ]
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. What a user got wrong is one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that is not UTF-8 must not end the work when it is printed
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(f"dino-train {__version__}")
        return 0
    logging.basicConfig(format="dino-train: %(message)s", level=logging.WARNING)
    logging.getLogger("dino_train.models.weights").setLevel(logging.INFO)  # says which weights of a file it takes
    try:
        argv = _expanded(argv)
        return _run(argv)
    except Interrupted as stop:
        print(f"dino-train: {stop}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("dino-train: interrupted", file=sys.stderr)
        return 130
    except (ValueError, NonFiniteLoss) as error:
        print(f"dino-train: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"dino-train: error: {_described(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        less = "take a smaller --batch-size"
        if argv[:1] == ["pretrain"]:
            less = "take fewer images a step (--batch-size-per-gpu), --accumulate or --checkpoint-activations true"
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"dino-train: error: out of memory: {less} ({first_line})", file=sys.stderr)
        return 1


def _described(error: OSError) -> str:
    """With what helps where nothing can be written."""
    text = ": ".join(str(part) for part in (error.filename, error.strerror) if part) or str(error)
    if error.errno == errno.ENOSPC:
        return f"{text}: make room, or write to another disk"
    if error.errno in (errno.EACCES, errno.EROFS):
        return f"{text}: give this user the right to it, or write to another place (--output-dir, --out or --output)"
    return text


def _is_out_of_memory(error: Exception) -> bool:
    """torch reports it as a RuntimeError, on a GPU of a class of its own."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _run(argv: Sequence[str]) -> int:
    command = (
        Annotated[_Pretrain, tyro.conf.subcommand("pretrain", default=_defaults(argv))]
        | Annotated[_marked(Pack, data=_alias("--data-path")), tyro.conf.subcommand("pack")]
        | Annotated[_marked(Stats, data=_alias("--data-path")), tyro.conf.subcommand("stats")]
        | Annotated[_marked(Embed, data=_alias("--data-path"), json=_single), tyro.conf.subcommand("embed")]
        | _Evaluate
        | Annotated[
            _marked(Compare, data=_alias("--data-path"), sweep=_single, equal_time=_word),
            tyro.conf.subcommand("compare"),
        ]
        | Annotated[Export, tyro.conf.subcommand("export")]
    )
    tyro.cli(command, args=argv, prog="dino-train", description=DESCRIPTION).run()  # type: ignore[call-overload]
    return 0
