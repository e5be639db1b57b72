"""Image retrieval on revisited Oxford and Paris (`eval_image_retrieval.py`; Radenovic et al. 2018)."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dino_kernels import PixelScale
from dino_train.common.device import pick_device
from dino_train.common.views import to_tensor
from dino_train.config.options import require_least
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import BadImages, image_loader
from dino_train.evaluate.features import Cache
from dino_train.evaluate.metrics import mean_average_precision
from dino_train.evaluate.protocol import Extraction

KS = (1, 5, 10)
SCALES = (1.0, 2**-0.5, 0.5)  # utils.py:806
# Annotations that are positives and annotations that are ignored; all other images are negatives.
LEVELS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}

_ALLOWED = {("builtins", name) for name in ("dict", "list", "tuple", "set", "int", "float", "str", "bytes", "complex")}
_ALLOWED |= {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
_ALLOWED |= {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


class _PlainUnpickler(pickle.Unpickler):
    """Builds only built-in containers and numpy arrays, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("__builtin__", "builtins")  # the name in Python 2 and in old pickle protocols
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@dataclass
class GroundTruth:
    """Names of the database images and of the queries; for each query, database rows by annotation."""

    images: list[str]
    queries: list[str]
    rows: list[dict[str, np.ndarray]]  # "easy", "hard", "junk"


def load_ground_truth(path: Path) -> GroundTruth:
    """Read gnd_roxford5k.pkl or gnd_rparis6k.pkl: {"imlist", "qimlist", "gnd": [{"easy", "hard", "junk"}, ...]}.

    Raises:
        ValueError: no such file, other values, or more than plain values and numpy arrays (no code is run).
    """
    if not path.is_file():
        raise ValueError(f"no ground truth at {path}: expected the revisited data's <dataset>/{path.name}")
    try:
        with open(path, "rb") as file:
            # Old files were written by Python 2; latin1 reads their byte strings as text.
            found = _PlainUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than lists and numpy arrays and is not loaded for safety ({error})"
        ) from error
    except Exception as error:  # damaged pickles raise almost any exception
        raise ValueError(f"{path} is damaged or not a pickle ({error})") from error
    expected = 'a dict with "imlist", "qimlist" and "gnd", the last with "easy", "hard" and "junk" of each query'
    try:
        images, queries = [str(name) for name in found["imlist"]], [str(name) for name in found["qimlist"]]
        rows = [
            {name: np.asarray(entry[name], dtype=np.int64).reshape(-1) for name in ("easy", "hard", "junk")}
            for entry in found["gnd"]
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} holds no revisited ground truth ({error!r}): expected {expected}") from error
    if len(rows) != len(queries) or not rows:
        raise ValueError(f"{path} has {len(queries)} queries and {len(rows)} annotations, expected equal numbers")
    for query, annotation in zip(queries, rows, strict=True):
        numbers = np.concatenate(list(annotation.values()))
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(images):
            raise ValueError(f"{path} annotates query {query} with rows beyond its {len(images)} images")
    return GroundTruth(images, queries, rows)


def shrink(limit: int, image: Image.Image, key: object = None, scale: PixelScale | None = None) -> Tensor:
    """The image, downscaled if needed so that its long side is at most `limit` pixels, normalized: [3, h, w]."""
    small = image.copy()
    small.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    return to_tensor(small, scale)


def multi_scale(backbone: nn.Module, pixels: Tensor) -> Tensor:
    """Features of an image at 1, 0.71 and 0.5 of its size, averaged (utils.py:803)."""
    smallest = getattr(backbone, "patch_size", 1)
    features = []
    for scale in SCALES:
        scaled = pixels if scale == 1 else F.interpolate(pixels, scale_factor=scale, mode="bilinear")
        if min(scaled.shape[2:]) >= smallest:  # a very small image uses only the larger scales
            features.append(backbone(scaled))
    if not features:
        height, width = pixels.shape[2:]
        raise ValueError(f"an image of {width} x {height} pixels is smaller than a patch of {smallest}: leave it out")
    return torch.stack(features).mean(dim=0)


def rank(database: Tensor, queries: Tensor, device: torch.device) -> np.ndarray:
    """Rows of the database by descending cosine similarity to each query: [queries, database]."""
    database = F.normalize(database, dim=1).to(device)
    return np.stack(
        [
            (row @ database.T).argsort(dim=1, descending=True, stable=True).cpu().numpy()
            for row in F.normalize(queries, dim=1).to(device).split(1)
        ]
    )[:, 0]


@dataclass(kw_only=True)
class Retrieval(Extraction):
    """Mean average precision of image retrieval on revisited Oxford or Paris (eval_image_retrieval.py).

    Whole query images are used, not their annotated boxes, as in the reference.
    """

    data: Path
    """Folder with roxford5k/ or rparis6k/, each with gnd_<dataset>.pkl and jpg/; or one of these two folders."""
    dataset: Literal["roxford5k", "rparis6k"] = "roxford5k"
    """Which of the two data sets."""
    image_size: int = 224
    """Maximum of the long side in pixels; larger images are downscaled."""
    multiscale: bool = False
    """Average the features of an image at three scales."""

    def check(self) -> None:
        super().check()
        require_least(self, image_size=1)

    def run(self) -> None:
        self.check()
        root = self.data / self.dataset if (self.data / self.dataset).is_dir() else self.data
        truth = load_ground_truth(root / f"gnd_{self.dataset}.pkl")
        images = ImageFolder(root / "jpg")
        trained = self.load()
        self.require_rgb(trained)
        images = images.scaled(trained.scale)
        cache = Cache(trained.backbone, self.folder / "features")
        forward: Callable[[Tensor], Tensor] = trained.backbone
        if self.multiscale:
            forward = partial(multi_scale, trained.backbone)
        database = self._extract(cache, images, truth.images, forward, "database")
        queries = self._extract(cache, images, truth.queries, forward, "queries")
        ranks = rank(database, queries, pick_device(self.device))
        levels = {
            level: mean_average_precision(
                ranks,
                [np.concatenate([rows[name] for name in positives]) for rows in truth.rows],
                [np.concatenate([rows[name] for name in passed]) for rows in truth.rows],
                KS,
            )
            for level, (positives, passed) in LEVELS.items()
        }
        self.report(
            {"protocol": "retrieval", "dataset": self.dataset, "images": len(database), "queries": len(queries)}
            | levels,
            "\n".join(
                f"{level}: " + "  ".join(f"{name} {value:.2f} %" for name, value in values.items())
                for level, values in levels.items()
                if values
            ),
        )

    def _extract(
        self, cache: Cache, images: ImageFolder, names: list[str], forward: Callable[[Tensor], Tensor], title: str
    ) -> Tensor:
        """Features of the images with these names (without suffix), in this order."""
        number = {Path(name).stem: i for i, name in enumerate(images.names)}
        missing = [name for name in names if name not in number]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(names)} images of the {title} are not in {images.path}, the first: "
                f"{missing[0]}.jpg"
            )
        chosen = images.subset([number[name] for name in names])
        bad = BadImages(len(chosen), 0)
        # One image at a time: they differ in shape.
        loader = image_loader(chosen, partial(shrink, self.image_size, scale=images.scale), 1, self.num_workers)
        kind = f"retrieval, thumbnail {self.image_size}, multi-scale {self.multiscale}"
        features = cache.features(chosen, loader, forward, bad, kind=kind, title=title)
        if len(features.paths) != len(names):
            lost = sorted(set(chosen.names) - set(features.paths))
            raise ValueError(f"{lost[0]} in {images.path} cannot be read, and the ranks need every image")
        return features.values
