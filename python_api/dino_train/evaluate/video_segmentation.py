"""Video object segmentation on DAVIS by label propagation (eval_video_segmentation.py of the reference).

The labels of a video's first frame are propagated frame by frame by the similarity of patch features, without training.
A patch of a new frame takes the labels of the most similar patches near its position in the first frame and in the last
few frames.

Dimensions: h x w patches of a frame, C channels of a feature, K labels (0 is the background), n source frames.
"""

import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dino_kernels import PixelScale
from dino_train.common.files import atomic
from dino_train.common.scale import scale_settings
from dino_train.config.options import require_least
from dino_train.data.decode import load_file
from dino_train.evaluate.davis import Video, read_mask, score, validation_videos
from dino_train.evaluate.features import weights_digest
from dino_train.evaluate.protocol import Protocol
from dino_train.models.plain_vit import ViT

RGB = PixelScale()
TEMPERATURE = 0.1  # eval_video_segmentation.py:140
TILE = 12  # side of the squares of patches that are processed together: limits the size of the similarity matrix
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Propagation:
    """Options of the propagation. Defaults are those of the reference (eval_video_segmentation.py:262-267).

    year: 2016 (one object per video) or 2017. n_last_frames: source frames in addition to the first. topk: source
    patches that give a patch its labels. radius: their maximum distance from its position, in patches; 0 means no
    limit. image_size: short side of the network's input, in pixels.
    """

    year: int = 2017
    n_last_frames: int = 7
    topk: int = 5
    radius: int = 12
    image_size: int = 480

    def __post_init__(self) -> None:
        require_least(self, n_last_frames=0, topk=1, radius=0, image_size=1)


def propagate(query: Tensor, sources: Sequence[Tensor], labels: Sequence[Tensor], *, topk: int, radius: int) -> Tensor:
    """Labels of a frame's patches: a weighted mean of the labels of the most similar source patches (:115-154).

    label_i = sum_j softmax_j(cosine(i, j) / 0.1) label_j over the `topk` most similar patches j of all sources, and
    those with the same similarity as the last of them, among the patches at most `radius` rows and columns from i.

    Similarities are computed in a band: a square of the frame with the source patches within its radius, not with all.

    Args:
        query: features of the frame [h, w, C], of norm 1.
        sources: n tensors of the same shape.
        labels: n tensors [h, w, K], soft labels of each source patch.
        topk, radius: as in `Propagation`.

    Returns:
        [h, w, K].
    """
    h, w, _ = query.shape
    reach = radius or max(h, w)
    result = torch.empty_like(labels[0])
    for top, left in itertools.product(range(0, h, TILE), range(0, w, TILE)):
        down, right = (torch.arange(a, min(a + TILE, end), device=query.device) for a, end in ((top, h), (left, w)))
        tile = slice(top, top + TILE), slice(left, left + TILE)
        # Source patches within the radius of any patch of the tile.
        near = slice(max(0, top - reach), top + TILE + reach), slice(max(0, left - reach), left + TILE + reach)
        rows, columns = (torch.arange(end, device=query.device)[part] for part, end in zip(near, (h, w), strict=True))
        inside = ((down[:, None] - rows).abs() <= reach)[:, None, :, None]
        inside = inside & ((right[:, None] - columns).abs() <= reach)[None, :, None, :]
        keys = torch.stack([source[near] for source in sources])
        values = torch.stack([label[near] for label in labels])
        similarity = query[tile].flatten(0, 1) @ keys.flatten(0, 2).T
        outside = ~inside.flatten(2).flatten(0, 1)[:, None]
        similarity = similarity.unflatten(1, (len(sources), -1)).masked_fill_(outside, -torch.inf).flatten(1)
        last = similarity.topk(min(topk, similarity.shape[1])).values[:, -1:]
        weights = similarity.masked_fill_(similarity < last, -torch.inf).div_(TEMPERATURE).softmax(1)
        result[tile] = (weights @ values.flatten(0, 2)).unflatten(0, (len(down), len(right)))
    return result


def working_size(width: int, height: int, short: int, patch: int) -> tuple[int, int]:
    """(width, height) of the network's input: the short side is `short`, the long side is rounded down to a multiple of
    64 (:217-222). If the patch size does not divide these, both sides are rounded down to a multiple of it.

    Raises:
        ValueError: `short` is below one patch.
    """
    if short < patch:
        raise ValueError(f"image_size must be at least one patch, {patch}, got {short}")
    unit = 64 if 64 % patch == 0 and short >= 64 else patch
    long = int(short * max(width, height) / min(width, height)) // unit * unit
    short = short // patch * patch
    return (short, long) if height > width else (long, short)


def frame_features(backbone: ViT, frame: Image.Image, size: tuple[int, int], scale: PixelScale = RGB) -> Tensor:
    """Patch tokens of the last block, of norm 1: [h, w, C] float32. The frame is resized to `size` without antialiasing
    (as in OpenCV; :209-232) and normalized as in training (0.228 instead of 0.229 in the reference is an error)."""
    device = backbone.cls_token.device
    pixels = torch.from_numpy(np.array(frame)).to(device).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size[::-1], mode="bilinear", align_corners=False).round_().div_(255)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (scale.mean, scale.std))
    tokens = backbone.features((pixels - mean) / std)[-1][0, 1:].float()
    p = backbone.patch_size
    return F.normalize(tokens, dim=-1).unflatten(0, (size[1] // p, size[0] // p))


def labels_of(soft: Tensor, patch: int, size: tuple[int, int]) -> np.ndarray:
    """Labels of patches [h, w, K] to labels of pixels, uint8 [H, W] (:63-74).

    Upsampled (bilinear) by the patch size, each label's map scaled to [0, 1], argmax over the labels, then resized
    (nearest) to `size`, (width, height).
    """
    maps = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = torch.where(high > low, (maps - low) / (high - low), maps)
    labels = Image.fromarray(maps.argmax(0).to(torch.uint8).cpu().numpy())
    return np.asarray(labels.resize(size, Image.Resampling.NEAREST))


@torch.no_grad()
def segment(backbone: ViT, video: Video, options: Propagation, scale: PixelScale = RGB) -> Iterator[np.ndarray]:
    """Labels uint8 [H, W] of each frame: the first annotation, then the propagated labels.

    Raises:
        ValueError: a frame or the annotation cannot be read, they differ in size, or its labels are not 1, 2, ...
    """
    frame = load_file(video.frames[0])
    size, patch = frame.size, backbone.patch_size
    first = read_mask(video.annotations[0], options.year, size)
    labels = np.unique(first[first > 0])
    if not len(labels) or labels[-1] != len(labels):
        raise ValueError(
            f"{video.annotations[0]} has {len(labels)} labels, the largest {first.max()}: expected 1 to the number of "
            "objects (year 2016 takes black and white masks)"
        )
    yield first
    inner = working_size(*size, options.image_size, patch)
    small = Image.fromarray(first).resize((inner[0] // patch, inner[1] // patch), Image.Resampling.NEAREST)
    device = backbone.cls_token.device
    soft = F.one_hot(torch.from_numpy(np.array(small)).long(), int(first.max()) + 1).float().to(device)
    origin = (frame_features(backbone, frame, inner, scale), soft)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=options.n_last_frames)
    for path in video.frames[1:]:
        frame = load_file(path)
        if frame.size != size:
            raise ValueError(f"{path} has {frame.width} x {frame.height} pixels, the first frame {size[0]} x {size[1]}")
        features = frame_features(backbone, frame, inner, scale)
        sources, source_labels = zip(origin, *recent, strict=True)
        soft = propagate(features, sources, source_labels, topk=options.topk, radius=options.radius)
        recent.append((features, soft))
        yield labels_of(soft, patch, size)


def evaluate_videos(
    backbone: ViT, root: Path, folder: Path, options: Propagation, scale: PixelScale = RGB
) -> dict[str, Any]:
    """Segment the validation videos of a DAVIS folder and compare with its annotations.

    Writes `folder`/VIDEO/NNNNN.png, indexed PNGs that the DAVIS tools can read. The folder of a video appears when it
    is complete; a second run skips complete videos.

    Returns:
        {"J&F", "J", "F": percent, mean over all objects of all videos, "videos": {name: {"J": [percent of each object],
        "F": [...]}}}.

    Raises:
        ValueError: `folder` contains results of other weights, data or options, or other files; and as in `segment`,
            `score` and `validation_videos`.
    """
    from tqdm import tqdm

    videos = validation_videos(root, options.year)
    settings = {**asdict(options), **scale_settings(scale)}
    _claim(folder, {**settings, "data": str(root.resolve()), "weights": weights_digest(backbone)})
    scores: dict[str, tuple[Tensor, Tensor]] = {}
    with tqdm(total=sum(len(video.frames) for video in videos), unit="frame", disable=None) as bar:
        for video in videos:
            bar.set_description(video.name)
            if all((folder / video.name / path.name).exists() for path in video.annotations):
                bar.update(len(video.frames))
            else:
                _write(folder / video.name, video, segment(backbone, video, options, scale), bar)
            scores[video.name] = score(video, folder / video.name, options.year, backbone.cls_token.device)
    regions, contours = (100 * torch.cat([pair[i] for pair in scores.values()]).mean().item() for i in (0, 1))
    percent = {name: {"J": (100 * j).tolist(), "F": (100 * f).tolist()} for name, (j, f) in scores.items()}
    return {"J&F": (regions + contours) / 2, "J": regions, "F": contours, "videos": percent}


def _write(folder: Path, video: Video, masks: Iterable[np.ndarray], bar: Any) -> None:
    """Write the masks as indexed PNGs to `folder`, which appears when all are written."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for path, labels in zip(video.annotations, masks, strict=True):
            image = Image.fromarray(labels)
            image.putpalette(_palette())
            image.save(partial / path.name)
            bar.update()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _palette() -> bytes:
    """The colors of DAVIS and PASCAL VOC: bits 3 j to 3 j + 2 of a label are bit 7 - j of red, green and blue."""
    label, channel, j = np.ogrid[:256, :3, :8]
    return ((label >> (3 * j + channel) & 1) << (7 - j)).sum(2).astype(np.uint8).tobytes()


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Record the source of the results in `folder`, so that other results are not reused or overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    text = json.dumps(settings, indent=2) + "\n"
    if any(other != path for other in folder.iterdir()):
        if not path.exists():
            raise ValueError(f"{folder} holds files but no segmentations of ours: choose another --output-dir")
        if path.read_text() != text:
            raise ValueError(
                f"{folder} holds segmentations of other weights, data or options: choose another --output-dir or "
                "delete it"
            )
    with atomic(path) as temporary:
        temporary.write_text(text)


@dataclass(kw_only=True)
class VideoSegmentation(Protocol):
    """Video object segmentation on DAVIS 2016 or 2017 by label propagation (eval_video_segmentation.py)."""

    data: Path
    """DAVIS folder, with JPEGImages/480p/, Annotations/480p/ and ImageSets/."""
    year: Literal[2016, 2017] = 2017
    """2016 has one object per video, 2017 several."""
    n_last_frames: int = 7
    """Source frames of the labels, in addition to the first."""
    topk: int = 5
    """Number of most similar patches from which a patch takes its labels."""
    radius: int = 12
    """Their maximum distance from its position, in patches; 0 means no limit."""
    image_size: int = 480
    """Short side in pixels of the network's input."""
    output_dir: Path | None = None
    """Folder for the indexed PNGs. Default: davis2016/ or davis2017/ next to the checkpoint."""

    def run(self) -> None:
        options = Propagation(self.year, self.n_last_frames, self.topk, self.radius, self.image_size)
        folder = self.output_dir or self.folder / f"davis{self.year}"
        trained, backbone = self.load_vit()
        self.require_rgb(trained)
        values = evaluate_videos(backbone, self.data, folder, options, trained.scale)
        lines = [f"{name}: J {_mean(v['J']):.1f} %  F {_mean(v['F']):.1f} %" for name, v in values["videos"].items()]
        total = f"DAVIS {self.year}: J&F {values['J&F']:.2f} %  J {values['J']:.2f} %  F {values['F']:.2f} %"
        self.report(
            {"protocol": "video-segmentation", "year": self.year, "output": str(folder)} | values,
            "\n".join([*lines, f"{total}, segmentations in {folder}"]),
        )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
