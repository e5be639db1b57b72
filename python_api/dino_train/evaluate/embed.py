"""`dino-train embed`: features of any images, without labels, for other programs; and each image's nearest ones."""

import csv
import importlib.util
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_train.common.device import pick_device
from dino_train.common.files import atomic, locked
from dino_train.config.options import require_least
from dino_train.data.folder import ImageFolder
from dino_train.data.stats import suited
from dino_train.evaluate.features import Cache, Features, NoneReadable
from dino_train.evaluate.knn import nearest
from dino_train.evaluate.protocol import Frozen
from dino_train.models.weights import Trained

CHUNK = 4096  # images that an interruption costs at most
SHEET_ROWS, SHEET_COLUMNS, SHEET_SIDE = 12, 9, 96  # of the picture of neighbors; its images in pixels


@dataclass(kw_only=True)
class Embed(Frozen):
    """Features of all images of a folder, which needs no labels, and with --neighbors the most similar images of each.

    Called again after an interruption, it goes on.
    """

    data: Path | None = None
    """Folder, .zip or .tar of images. Default: the run's images."""
    out: Path = Path("features.safetensors")
    """File to write. .safetensors: tensors values [n, C] and labels [n], names of images and class folders as bytes
    that end in zeros. .npz: the same as arrays. .csv: columns path, class and a column for each feature. .parquet:
    columns path, class and features; needs pyarrow."""
    neighbors: int = 0
    """Also write the most similar other images of each, with cosines, to OUT-neighbors.csv, and a picture of some."""

    def check(self) -> None:
        super().check()
        require_least(self, neighbors=0)
        if self.out.suffix not in _WRITERS:
            raise ValueError(f"out must end in {', '.join(_WRITERS)}, got {self.out}")
        if self.out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ValueError("a .parquet file needs pyarrow: pip install pyarrow, or write .csv or .npz")

    def run(self) -> None:
        self.check()
        trained = self.load()
        images = ImageFolder(self.images(trained))
        images = images.scaled(suited(images, trained.scale, self.num_workers))
        images.log_notes()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_name(self.out.name + ".partial")
        with locked(self.out.with_name(self.out.name + ".lock"), self.out):
            features = self._features(trained, images, partial)
            count, width = features.values.shape
            if self.neighbors >= count:
                raise ValueError(f"neighbors must be less than the number of images, {count}, got {self.neighbors}")
            written = [str(path) for path in self._write_neighbors(features, images)] if self.neighbors else []
            _WRITERS[self.out.suffix](features, self.out)
            written.insert(0, str(self.out))
            shutil.rmtree(partial, ignore_errors=True)
        self.report(
            {"images": count, "unreadable": len(images) - count, "features": width, "written": written},
            f"{count} of {len(images)} images, {width} features each: {', '.join(written)}",
        )

    def _features(self, trained: Trained, images: ImageFolder, partial: Path) -> Features:
        """Chunk by chunk, each of which is kept until the output is complete."""
        cache = Cache(trained.backbone, partial)
        size = self.image_size or trained.image_size
        parts = []
        for start in range(0, len(images), CHUNK):
            chunk = images.subset(range(start, min(start + CHUNK, len(images))))
            what = f"images {start + 1} to {start + len(chunk)}"
            try:
                parts.append(self.extract(cache, chunk, trained.backbone, "output", size, what))
            except NoneReadable as error:
                logging.warning("%s", error)
        if not parts:
            raise NoneReadable(f"none of {len(images)} images in {images.path} could be read")
        return Features(
            torch.cat([part.values for part in parts]),
            torch.cat([part.labels for part in parts]),
            [images.prefix + path for part in parts for path in part.paths],
            images.classes,
        )

    def _write_neighbors(self, features: Features, images: ImageFolder) -> list[Path]:
        device = pick_device(self.device)
        values = F.normalize(features.values, dim=1).to(device)
        similarity, rows = (x.cpu() for x in nearest(values, values, self.neighbors + 1, "neighbors"))
        similarity, rows = without_self(similarity, rows)
        table, sheet = (self.out.with_name(f"{self.out.stem}-neighbors{suffix}") for suffix in (".csv", ".png"))
        with atomic(table) as temporary, open(temporary, "w", newline="", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "rank", "neighbor", "cosine"])
            for path, cosines, found in zip(features.paths, similarity.tolist(), rows.tolist(), strict=True):
                for rank, (cosine, row) in enumerate(zip(cosines, found, strict=True), 1):
                    writer.writerow([path, rank, features.paths[row], f"{cosine:.4f}"])
        with atomic(sheet) as temporary:
            self._sheet(features, images, rows).save(temporary, "PNG")
        return [table, sheet]

    def _sheet(self, features: Features, images: ImageFolder, rows: Tensor) -> Image.Image:
        """Some images, evenly spaced, at the left of their neighbors."""
        number = {images.prefix + name: i for i, name in enumerate(images.names)}
        queries = torch.linspace(0, len(rows) - 1, min(SHEET_ROWS, len(rows))).round().long().tolist()
        columns = min(SHEET_COLUMNS, 1 + rows.shape[1])
        step, gap = SHEET_SIDE + 4, 12  # a gap after the first column
        sheet = Image.new("RGB", (columns * step + gap, len(queries) * step), "white")
        for y, query in enumerate(queries):
            for x, row in enumerate([query, *rows[query, : columns - 1].tolist()]):
                picture = images.load(number[features.paths[row]])
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                picture = picture.resize(
                    (SHEET_SIDE, SHEET_SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
                )
                sheet.paste(picture, (x * step + (gap if x else 0), y * step))
        return sheet


def without_self(similarity: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of the k + 1 nearest rows [n, k + 1] of each row the k others; of equal images any may come first."""
    own = rows == torch.arange(len(rows))[:, None]
    own[:, -1] |= ~own.any(dim=1)  # more equal images than k + 1: the last goes
    keep = ~own
    shape = len(rows), rows.shape[1] - 1
    return similarity[keep].view(shape), rows[keep].view(shape)


def _write_npz(features: Features, path: Path) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            values=features.values.numpy(),
            labels=features.labels.numpy(),
            paths=np.array(features.paths, dtype=str),
            classes=np.array(features.classes, dtype=str),
        )


def _classes(features: Features) -> list[str | None]:
    """Of each image."""
    return [features.classes[i] if i >= 0 else None for i in features.labels.tolist()]


def _write_csv(features: Features, path: Path) -> None:
    with atomic(path) as temporary, open(temporary, "w", newline="", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", *(f"feature{i}" for i in range(features.values.shape[1]))])
        for name, of, values in zip(features.paths, _classes(features), features.values.tolist(), strict=True):
            writer.writerow([name, of, *(f"{value:.9g}" for value in values)])  # 9 digits identify a float32


def _write_parquet(features: Features, path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    def utf8(name: str) -> str:  # of which parquet's strings are
        return name.encode(errors="backslashreplace").decode()

    values = pyarrow.array(features.values.numpy().ravel())
    classes = [None if name is None else utf8(name) for name in _classes(features)]
    columns = {
        "path": list(map(utf8, features.paths)),
        "class": pyarrow.array(classes, pyarrow.string()),
        "features": pyarrow.FixedSizeListArray.from_arrays(values, features.values.shape[1]),
    }
    with atomic(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


_WRITERS: dict[str, Callable[[Features, Path], None]] = {
    ".safetensors": Features.save,
    ".npz": _write_npz,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
