"""Copy detection on Copydays (`eval_copy_detection.py`; Douze et al. 2009)."""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_kernels import PixelScale
from dino_train.common.views import to_tensor
from dino_train.config.options import require_least
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import BadImages, image_loader
from dino_train.evaluate.features import Cache, Features
from dino_train.evaluate.metrics import average_precision
from dino_train.evaluate.protocol import Extraction, log_skipped
from dino_train.models.plain_vit import ViT

GEM_POWER = 4
FOUND = 20  # only the first 20 results are evaluated (eval_copy_detection.py:293)
ORIGINAL = "original"


@torch.no_grad()
def class_and_gem(backbone: ViT, pixels: Tensor) -> Tensor:
    """Class token and generalized mean of the patch tokens, (mean of max(x, 1e-6)^4)^(1/4), concatenated.

    pixels: [B, 3, h, w]. Returns [B, 2 C] (eval_copy_detection.py:150-158).
    """
    tokens = backbone.features(pixels, 1)[0].float()
    gem = tokens[:, 1:].clamp_min(1e-6).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)
    return torch.cat((tokens[:, 0], gem), dim=1)


def square(size: int, image: Image.Image, key: object = None, scale: PixelScale | None = None) -> Tensor:
    """The image resized to size x size pixels without keeping its aspect ratio, normalized."""
    return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC), scale)


class Whitening:
    """PCA whitening, learned from the features of other images (`utils.py:655`).

    Subtracts the mean of those features, rotates to their principal axes and scales each axis to variance one. As in
    the reference, axes and variances are those of the second moment about zero; variances are at least 1e-5 of the
    largest.

    Args:
        features: [m, C] of images similar to those that will be whitened, m >= 2.
    """

    def __init__(self, features: Tensor) -> None:
        x = features.double()
        self.mean = x.mean(dim=0)
        variances, axes = torch.linalg.eigh(x.T @ x / len(x))
        self.turn = axes / variances.clamp_min(1e-5 * variances.max()).sqrt()

    def __call__(self, features: Tensor) -> Tensor:
        return ((features.double() - self.mean) @ self.turn).float()


def block_precisions(database: Features, queries: Features) -> dict[str, float]:
    """Mean average precision of each block of queries, in [0, 1], from the first 20 results.

    A block is a folder of queries. The original of a query is the image whose name has the same first four characters.

    Args:
        database: the originals, and optionally distractors; rows of norm 1.
        queries: rows of norm 1.
    """
    k = min(FOUND, len(database.paths))
    order = (queries.values @ database.values.T).topk(k, dim=1).indices.numpy()
    wanted = np.array([_prefix(path) if path.startswith(ORIGINAL + "/") else "" for path in database.paths])
    found: dict[str, list[float]] = defaultdict(list)
    for path, results in zip(queries.paths, order, strict=True):
        places = np.flatnonzero(wanted[results] == _prefix(path))
        found[str(Path(path).parent)].append(average_precision(places, int((wanted == _prefix(path)).sum())))
    return {block: float(np.mean(values)) for block, values in found.items()}


def _prefix(path: str) -> str:
    return Path(path).name[:4]


@dataclass(kw_only=True)
class CopyDetection(Extraction):
    """Mean average precision of finding the original of altered images on Copydays (eval_copy_detection.py)."""

    data: Path
    """Folder with original/ and at least one of strong/, jpegqual/<quality>/ and crops/<percent>/."""
    distractors: Path | None = None
    """Distractor images, added to the originals. The paper uses 10,000 of YFCC100M."""
    whitening: Path | None = None
    """Images to learn the whitening of the features from. The paper uses 20,000 of YFCC100M."""
    image_size: int = 320
    """Side in pixels of the square to which every image is resized."""
    batch_size: int = 16
    """Images per forward pass."""

    def check(self) -> None:
        super().check()
        require_least(self, image_size=1, batch_size=1)

    def run(self) -> None:
        self.check()
        images = ImageFolder(self.data)
        names = images.names
        originals = [i for i, name in enumerate(names) if name.startswith(ORIGINAL + "/")]
        known = {names[i].partition("/")[2][:4] for i in originals}
        others = [i for i, name in enumerate(names) if "/" in name and not name.startswith(ORIGINAL + "/")]
        if not originals or not others:
            folders = sorted({name.partition("/")[0] + "/" for name in names if "/" in name})
            raise ValueError(
                f"{self.data} holds {', '.join(folders[:5]) or 'no two folders of images'}: expected Copydays' "
                "original/ and at least one of strong/, jpegqual/<quality>/ and crops/<percent>/"
            )
        for i in others:
            if _prefix(names[i]) not in known:
                raise ValueError(
                    f"{names[i]} has no original: expected {ORIGINAL}/{_prefix(names[i])}*.jpg in {self.data}"
                )
        trained, backbone = self.load_vit()
        self.require_rgb(trained)
        cache = Cache(backbone, self.folder / "features")
        extract = partial(self._extract, cache, backbone, trained.scale)
        database, queries = extract(images.subset(originals), "original"), extract(images.subset(others), "query")
        if len(database.paths) < len(originals):
            lost = sorted({names[i] for i in originals} - set(database.paths))
            raise ValueError(f"{lost[0]} in {self.data} cannot be read, and every original is needed")
        distractors = 0
        if self.distractors:
            more = extract(ImageFolder(self.distractors), "distractor")
            distractors = len(more.paths)
            database.values = torch.cat((database.values, more.values))
            database.paths += [f"distractors/{path}" for path in more.paths]
        if self.whitening:
            whiten = Whitening(extract(ImageFolder(self.whitening), "whitening").values)
            database.values, queries.values = whiten(database.values), whiten(queries.values)
        database.values, queries.values = F.normalize(database.values, dim=1), F.normalize(queries.values, dim=1)
        blocks = block_precisions(database, queries)
        self.report(
            {"protocol": "copy-detection", "originals": len(originals), "queries": len(queries.paths)}
            | {"distractors": distractors, "whitened": self.whitening is not None, "mAP": blocks},
            "\n".join(f"{block}: mAP {value:.3f}" for block, value in blocks.items()),
        )

    def _extract(self, cache: Cache, backbone: ViT, scale: PixelScale, images: ImageFolder, title: str) -> Features:
        images = images.scaled(scale)
        bad = BadImages(len(images), 0)
        transform = partial(square, self.image_size, scale=images.scale)
        loader = image_loader(images, transform, self.batch_size, self.num_workers)
        kind = f"class and GeM {GEM_POWER}, square {self.image_size}"
        features = cache.features(images, loader, partial(class_and_gem, backbone), bad, kind=kind, title=title)
        log_skipped(bad, title)
        return features
