"""Attention maps of the class token: images, video, overlap with masks (`visualize_attention.py`,
`video_generation.py`)."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_kernels import PixelScale
from dino_train.common.views import View, as_picture, open_mask, size_of, whole_patches
from dino_train.config.options import require_least
from dino_train.config.presets import EMBEDDED_DATA
from dino_train.data.decode import UnreadableImage, decoded, load_view
from dino_train.data.folder import ImageFolder, split
from dino_train.data.stats import suited
from dino_train.evaluate import ffmpeg
from dino_train.evaluate.metrics import jaccard
from dino_train.evaluate.protocol import Protocol, dense_size
from dino_train.models.plain_vit import ViT
from dino_train.models.weights import Trained

CELL = 128  # side of a cell in the sheet, in pixels
SHEET_ROWS = 16
MOST_ASPECT = 16  # of an image; of a thinner strip each patch of the short side makes many of the long one

Loader = Callable[[], View]
Item = TypeVar("Item")


@torch.no_grad()
def attention_of(backbone: ViT, view: View, working_size: int, scale: PixelScale) -> Tensor:
    """Attention of the class token to each patch, per head: float32 [heads, rows, columns], on the CPU.

    The image is resized so that its short side is about `working_size` and both sides are multiples of the patch size.
    """
    pixels = whole_patches(view, working_size, backbone.patch_size, scale)
    maps = backbone.attention(pixels[None].to(backbone.cls_token.device))[0, :, 1:].float().cpu()
    return maps.unflatten(1, (pixels.shape[1] // backbone.patch_size, -1))


def keep_mass(maps: Tensor, mass: float) -> Tensor:
    """Smallest set of patches with at least the fraction `mass` of each map's sum (visualize_attention.py:172-179).

    Args:
        maps: [heads, rows, columns], nonnegative.
        mass: in (0, 1].

    Returns:
        bool [heads, rows, columns].
    """
    values, order = maps.flatten(1).double().sort(dim=1)
    kept = values.cumsum(1) > (1 - mass) * values.sum(1, keepdim=True)
    return torch.zeros_like(kept).scatter_(1, order, kept).view(maps.shape)


def to_range(values: Tensor) -> np.ndarray:
    """Maps [..., rows, columns], each scaled from its minimum..maximum to [0, 1]."""
    low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    return ((values - low) / (high - low).clamp_min(1e-12)).numpy()


def enlarge(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A mask [rows, columns] resized to (width, height) pixels: bool [height, width]."""
    return np.asarray(Image.fromarray(mask.numpy().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0


def heat(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A map in [0, 1] as colors (inferno), resized (bicubic) to (width, height) pixels."""
    from matplotlib import colormaps

    gray = Image.fromarray(np.uint8(np.clip(values, 0, 1) * 255)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.uint8(colormaps["inferno"](np.asarray(gray))[..., :3] * 255))


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """The image with the map as overlay: dark where the map is low."""
    return Image.blend(image, heat(values, image.size), 0.6)


def write_maps(maps: Tensor, image: Image.Image, stem: Path, mass: float) -> list[Path]:
    """Write PNGs of image size of each head's map and of their mean: the map, an overlay, and a thresholded mask.

    Returns their paths: STEM_head0.png, STEM_head0_overlay.png, STEM_head0_mask.png, ..., STEM_mean_mask.png.
    """
    names = [f"head{i}" for i in range(len(maps))] + ["mean"]
    maps = torch.cat((maps, maps.mean(0, keepdim=True)))
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, values, kept in zip(names, to_range(maps), keep_mass(maps, mass), strict=True):
        mask = Image.fromarray(enlarge(kept, image.size))
        pictures = {"": heat(values, image.size), "_overlay": overlay(image, values), "_mask": mask}
        for suffix, picture in pictures.items():
            paths.append(stem.with_name(f"{stem.name}_{name}{suffix}.png"))
            picture.save(paths[-1])
    return paths


def sheet_row(maps: Tensor, image: Image.Image) -> np.ndarray:
    """The image, an overlay of the heads' mean, and each head's map, in one row: uint8 [height, width, 3]."""
    big = image.resize((CELL, CELL), Image.Resampling.BICUBIC)
    cells = [big, overlay(big, to_range(maps.mean(0))), *(heat(m, big.size) for m in to_range(maps))]
    return np.concatenate([np.pad(np.asarray(c), ((2, 2), (2, 2), (0, 0)), constant_values=255) for c in cells], axis=1)


def frame(maps: Tensor, image: Image.Image, mass: float) -> Image.Image:
    """One frame of a video: the image overlaid with the mean over the heads of their maps, masked by `keep_mass`."""
    return overlay(image, to_range((maps * keep_mass(maps, mass)).mean(0)))


def load_mask(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Foreground of a mask, and the pixels that are evaluated: bool [height, width] each.

    In an image with a palette, as in PASCAL VOC, 0 is background and 255 the border, which is ignored; in other images,
    and where a palette has no other numbers than these, all nonzero pixels are foreground.

    Args:
        path: PNG. size: (width, height) of its image, in pixels.

    Raises:
        ValueError: it cannot be read, has a different size or three channels.
    """
    picture = open_mask(path)
    if picture.size != size:
        raise ValueError(
            f"mask {path} has {picture.width}x{picture.height} pixels, expected {size[0]}x{size[1]} like its image"
        )
    levels = np.asarray(picture)
    if levels.ndim != 2:
        raise ValueError(f"mask {path} has mode {picture.mode}, expected one channel: a palette, gray or 1 bit")
    bordered = picture.mode == "P" and ((levels > 0) & (levels < 255)).any()
    return levels > 0, (levels != 255 if bordered else np.ones(levels.shape, bool))


def _progress(items: Iterable[Item], unit: str) -> Iterable[Item]:
    from tqdm import tqdm

    return tqdm(items, "attention", disable=None, unit=unit, leave=False)


@dataclass(kw_only=True)
class Attention(Protocol):
    """Self-attention maps of the last block: PNGs, a video, or their overlap with masks."""

    data: tuple[Path, ...] = ()
    """Images, folders, .zip or .tar files of them, or a video. Default: 8 held-out images of the run's data."""
    masks: Path | None = None
    """Folder of PNG masks with the names of the images: prints the Jaccard similarity (paper, figure 4) and writes no
    images. Images without a mask are skipped."""
    threshold: float = 0.6
    """Fraction of a map's mass that its mask keeps."""
    output_dir: Path | None = None
    """Folder for the PNGs. Default: attention/ next to the checkpoint."""
    image_size: int | None = None
    """Short side in pixels of the network's input. Default: 2 x its training size (at most 480)."""
    fps: float | None = None
    """Treat the images as frames of a video: write one image each to frames/, and an MP4 at this frame rate if ffmpeg
    is installed. For a video as input this is always done, by default at 25."""

    def check(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        require_least(self, image_size=1)
        if missing := next((path for path in self.data if not path.exists()), None):
            raise ValueError(f"no such image, folder or video: {missing}")

    def run(self) -> None:
        self.check()
        trained, backbone = self.load_vit()
        size = self.image_size or dense_size(trained)
        look = partial(attention_of, backbone, working_size=size, scale=trained.scale)
        videos = [path for path in self.data if ffmpeg.is_video(path)]
        if self.masks:
            self._compare(trained, look)
        elif videos or self.fps:
            self._film(trained, look, videos)
        else:
            self._draw(trained, look)

    @property
    def _output(self) -> Path:
        return self.output_dir or self.folder / "attention"

    def _images(self, trained: Trained) -> Iterator[tuple[str, View]]:
        """(path, view) of each chosen image that is readable; the others are logged."""
        for name, load in _progress(list(self._choose(trained)), "image"):
            try:
                yield name, load()
            except UnreadableImage as error:
                logging.warning("skipped %s", error)

    def _choose(self, trained: Trained) -> Iterator[tuple[str, Loader]]:
        """(path, function that loads it) of each chosen image."""
        for path in self.data:
            if path.is_dir() or path.suffix.lower() in (".zip", ".tar"):
                images = ImageFolder(path)
                images = images.scaled(suited(images, trained.scale, 1))
                yield from ((name, partial(images.view, i)) for i, name in enumerate(images.names))
            else:
                load = partial(load_view, scale=trained.scale)
                yield path.name, partial(decoded, str(path), path.read_bytes, load)
        if not self.data:
            images = split(trained.data or EMBEDDED_DATA)[1].scaled(trained.scale)
            if not len(images):
                raise ValueError(f"no image of {trained.data} is held out: name some with --data")
            for i in range(0, len(images), max(1, len(images) // 8))[:8]:
                yield images.names[i], partial(images.view, i)

    def _draw(self, trained: Trained, look: Callable[[View], Tensor]) -> None:
        stems: set[str] = set()
        rows: list[np.ndarray] = []
        written: list[Path] = []
        for name, view in self._images(trained):
            width, height = size_of(view)
            if max(width, height) > MOST_ASPECT * min(width, height):
                logging.warning("%s is skipped: %d x %d pixels are too long and narrow", name, width, height)
                continue
            image = as_picture(view)
            stem = str(Path(name).with_suffix("")).replace("/", "_")
            free = (stem if number == 1 else f"{stem}_{number}" for number in count(1))
            stem = next(each for each in free if each not in stems)
            stems.add(stem)
            maps = look(view)
            written += write_maps(maps, image, self._output / stem, self.threshold)
            if len(rows) < SHEET_ROWS:
                rows.append(sheet_row(maps, image))
        if not rows:
            raise ValueError("none of the images could be read; name some with --data")
        Image.fromarray(np.concatenate(rows)).save(self._output / "sheet.png")
        self.report(
            {"protocol": "attention", "output": str(self._output), "images": len(stems), "maps": len(written)},
            f"{len(written)} maps and sheet.png in {self._output}",
        )

    def _film(self, trained: Trained, look: Callable[[View], Tensor], videos: list[Path]) -> None:
        if videos:
            self.require_rgb(trained)
        if videos and len(self.data) > 1:
            raise ValueError(f"pass one video at a time, got {len(self.data)} paths")
        fps = self.fps or 25.0
        folder = self._output / "frames"
        if folder.resolve() in [path.resolve() for path in self.data]:
            raise ValueError(f"the output images would overwrite their frames in {folder}: choose another --output-dir")
        folder.mkdir(parents=True, exist_ok=True)
        paths: list[Path] = []
        images = ffmpeg.read(videos[0], fps) if videos else (image for _, image in self._images(trained))
        with closing(images):
            for image in _progress(images, "frame") if videos else images:
                paths.append(folder / f"{len(paths):06d}.png")
                frame(look(image), as_picture(image), self.threshold).save(paths[-1])
        if not paths:
            raise ValueError("none of the frames could be read; name a folder or a video with --data")
        video = ffmpeg.write(paths, self._output / "attention.mp4", fps)
        self.report(
            {"protocol": "attention", "frames": len(paths), "output": str(folder), "video": video and str(video)},
            f"{len(paths)} frames in {folder}" + (f", video {video}" if video else "; no MP4: ffmpeg is not installed"),
        )

    def _compare(self, trained: Trained, look: Callable[[View], Tensor]) -> None:
        assert self.masks is not None
        if not self.masks.is_dir():
            raise ValueError(f"no folder {self.masks}: expected PNG masks with the names of the images")
        overlaps: list[list[float]] = []  # per image: of each head, then of their mean
        for name, view in self._images(trained):
            image = as_picture(view)
            path = self.masks / Path(name).with_suffix(".png")
            path = path if path.exists() else self.masks / path.name
            if not path.exists():
                continue
            foreground, counts = load_mask(path, image.size)
            maps = look(view)
            kept = keep_mass(torch.cat((maps, maps.mean(0, keepdim=True))), self.threshold)
            overlaps.append([jaccard(enlarge(k, image.size)[counts], foreground[counts]) for k in kept])
        if not overlaps:
            raise ValueError(f"no image has a mask in {self.masks}: expected <name of the image>.png")
        scores = 100 * np.array(overlaps)
        values: dict[str, Any] = {
            "protocol": "attention",
            "images": len(scores),
            "kept_mass": self.threshold,
            "jaccard_best_head": scores[:, :-1].max(axis=1).mean(),
            "jaccard_mean_map": scores[:, -1].mean(),
            "jaccard_heads": scores[:, :-1].mean(axis=0).tolist(),
        }
        heads = "  ".join(f"{value:.1f}" for value in values["jaccard_heads"])
        self.report(
            values,
            f"Jaccard similarity over {len(scores)} images, {self.threshold:.0%} of the mass kept: best head of each "
            f"image {values['jaccard_best_head']:.1f} %  heads' mean {values['jaccard_mean_map']:.1f} %  heads {heads}",
        )
