"""DAVIS 2016 and 2017: location of its files, and its two metrics of a segmentation.

Region similarity J is the intersection over union of the two regions. Contour accuracy F is the harmonic mean of
precision and recall of the boundary pixels. A boundary pixel is matched if the other boundary has a pixel within 0.8 %
of the frame's diagonal (Perazzi et al. 2016, section 5; davis2017-evaluation, metrics.py).

Dimensions: N objects, H x W pixels of a frame.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_train.common.views import open_mask

TOLERANCE = 0.008  # of the diagonal
VOID = 255  # ignore label of 2017


@dataclass(frozen=True)
class Video:
    """One video: its frames and their annotations, in order."""

    name: str
    frames: list[Path]
    annotations: list[Path]


def validation_videos(root: Path, year: int) -> list[Video]:
    """The validation videos of a DAVIS folder at 480p, in the order of its list.

    Raises:
        ValueError: the list, a frame or an annotation is missing, or a video has fewer than 3 frames.
    """
    lists = [root / f"ImageSets/{part}/val.txt" for part in ((2017,) if year == 2017 else (2016, "480p"))]
    present = [path for path in lists if path.is_file()]
    if not present:
        raise ValueError(
            f"no {' or '.join(map(str, lists))}: expected a DAVIS {year} folder with ImageSets/, JPEGImages/480p/ and "
            "Annotations/480p/"
        )
    words = [line.split()[0] for line in present[0].read_text().splitlines() if line.strip()]
    # 2016 lists frames: /JPEGImages/480p/NAME/00000.jpg
    names = list(dict.fromkeys(Path(word).parent.name if "/" in word else word for word in words))
    if not names:
        raise ValueError(f"{present[0]} is empty: expected one video name per line")
    return [_video(root, name) for name in names]


def _video(root: Path, name: str) -> Video:
    folders = {root / "JPEGImages/480p" / name: ".jpg", root / "Annotations/480p" / name: ".png"}
    frames, annotations = (sorted(folder.glob(f"[!.]*{suffix}")) for folder, suffix in folders.items())
    if len(frames) < 3:  # the first is the input, the last is not scored
        raise ValueError(f"{next(iter(folders))} has {len(frames)} frames: expected at least 3 files NNNNN.jpg")
    for folder, suffix in folders.items():
        for stem in sorted({path.stem for path in frames + annotations}):
            if not (folder / f"{stem}{suffix}").is_file():
                raise ValueError(
                    f"no {folder / stem}{suffix}: expected an annotation for each frame of {name}, got "
                    f"{len(frames)} frames and {len(annotations)} annotations"
                )
    return Video(name, frames, annotations)


def read_mask(path: Path, year: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """An annotation or a result as labels uint8 [H, W], 0 for background; one object in 2016, several in 2017.

    size: required (width, height).

    Raises:
        ValueError: not readable, of a different size, or, in 2017, not an indexed PNG.
    """
    image = open_mask(path)
    if size is not None and image.size != size:
        raise ValueError(
            f"{path} has {image.width} x {image.height} pixels, expected {size[0]} x {size[1]} like the first frame"
        )
    if year == 2016:  # 0 and 255; some files have three channels
        labels = np.asarray(image if image.mode in ("P", "L", "1") else image.convert("L"))
        return (labels > 0).astype(np.uint8)
    if image.mode not in ("P", "L"):
        raise ValueError(f"{path} has colors of mode {image.mode}, expected an indexed PNG whose pixels are labels")
    labels = np.array(image)
    labels[labels == VOID] = 0  # as in davis2017-evaluation
    return labels


def region_similarity(truth: Tensor, guess: Tensor) -> Tensor:
    """Region similarity J of masks, bool [N, H, W]: float64 [N], 1 if both are empty."""
    both, either = (mask.sum((1, 2)).double() for mask in (truth & guess, truth | guess))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def contour_accuracy(truth: Tensor, guess: Tensor) -> Tensor:
    """Contour accuracy F of masks, bool [N, H, W]: float64 [N], 1 if neither has a boundary, 0 if only one has."""
    height, width = truth.shape[1:]
    radius = math.ceil(TOLERANCE * math.hypot(height, width))
    edges = [_boundary(mask) for mask in (truth, guess)]
    recall, precision = (
        (edge & _dilate(other, radius)).sum((1, 2)) / edge.sum((1, 2)).clamp_min(1).double()
        for edge, other in (edges, edges[::-1])
    )
    f = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    none = ~torch.stack(edges).any(3).any(2).any(0)
    return torch.where(none, 1.0, f)


def _boundary(masks: Tensor) -> Tensor:
    """Pixels that differ from their right, lower or lower right neighbor; neighbors outside the frame do not count."""
    padded = F.pad(masks[:, None].float(), (0, 1, 0, 1), mode="replicate")[:, 0] > 0
    right, below, diagonal = padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (masks ^ right) | (masks ^ below) | (masks ^ diagonal)


def _dilate(masks: Tensor, radius: int) -> Tensor:
    """Dilation by a disk of `radius`, drawn around each pixel of the mask: a boundary has few pixels."""
    axis = torch.arange(-radius, radius + 1, device=masks.device)
    down, right = (axis[:, None] ** 2 + axis**2 <= radius**2).nonzero().T
    count, height, width = masks.shape
    padded = masks.new_zeros(count, height + 2 * radius, width + 2 * radius)
    n, y, x = masks.nonzero()[..., None].unbind(1)
    padded[n, y + down, x + right] = True
    return padded[:, radius : radius + height, radius : radius + width]


def score(video: Video, folder: Path, year: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """J and F of each object of a video's first annotation, averaged over all frames but the first and last: [N] each.

    folder: contains a result NNNNN.png for each frame.

    Raises:
        ValueError: as `read_mask`.
    """
    first = read_mask(video.annotations[0], year)
    objects = torch.arange(1, int(first.max()) + 1, device=device).view(-1, 1, 1)
    size = (first.shape[1], first.shape[0])
    regions, contours = [], []
    for path in video.annotations[1:-1]:
        files = (path, folder / path.name)
        truth, guess = (torch.from_numpy(read_mask(file, year, size)).to(device) == objects for file in files)
        regions.append(region_similarity(truth, guess))
        contours.append(contour_accuracy(truth, guess))
    return torch.stack(regions).mean(0).cpu(), torch.stack(contours).mean(0).cpu()
