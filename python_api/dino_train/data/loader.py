"""Batches of crops, prefetched by threads, and batches of whole images for evaluation.

    loader = CropLoader(
        train, config.crop_kinds, batch_size=64, seed=0, start_step=0, total_steps=1000, num_workers=2
    )
    bad_images = BadImages(len(train), batch_size=64)
    for crops, bad in loader:       # one global step each
        bad_images.add(bad)

A sample depends only on (seed, epoch, index), not on the number of threads or processes, and not on a resume; the sizes
of its masks also on its place in the micro-batch.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dino_kernels import CropKind, PixelScale, draw_crops, multicrop, multicrop_packed
from dino_train.common.device import Event, Gpu, gpu_of
from dino_train.common.masks import MaskKind
from dino_train.common.views import View, eval_transform
from dino_train.data.decode import UnreadableImage, decode, decode_smaller, jpeg_size, reason
from dino_train.data.deep import decode_deep
from dino_train.data.folder import DataError, ImageFolder, Sample
from dino_train.data.names import listed
from dino_train.data.threads import Threads, in_order

STALL_SECONDS = 60.0  # a file that takes longer to read is skipped

_DTYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.uint16): torch.uint16,
    np.dtype(np.float32): torch.float32,
}

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Bad = list[tuple[str, str]]  # (name, reason) of unreadable images
Batch = tuple[Tensor, Tensor, Tensor, Bad]  # pixels, labels and indices of images, and the unreadable images


class Images(Protocol):
    """A source of images: an ImageFolder or a ShardStream."""

    def __len__(self) -> int: ...

    def steps(
        self, batch_size: int, seed: int, start_step: int, total_steps: int, rank: int, ranks: int
    ) -> Generator[list[Sample], None, None]:
        """This rank's samples of each step start_step .. total_steps - 1."""


# --- crops -------------------------------------------------------------------------------------------


class _Attempt:
    """The work of one thread on a row; it is abandoned if it hangs in a read."""

    def __init__(self) -> None:
        self._lock, self._since, self._over = Lock(), float("inf"), False
        self.name = ""

    def begin(self, name: str) -> None:
        with self._lock:
            self.name, self._since = name, time.monotonic()

    def has_read(self) -> bool:
        """False if the attempt was abandoned and another thread computes the row; if True, it cannot be abandoned."""
        with self._lock:
            self._since = float("inf")
            return not self._over

    def give_up(self) -> bool:
        """True if the read hangs: this attempt will not write to the row."""
        with self._lock:
            self._over = time.monotonic() - self._since > STALL_SECONDS
            return self._over


@dataclass
class _Row:
    """One image of a batch."""

    number: int  # in the batch
    sample: Sample
    views: list[Tensor]  # [1, C, size, size] each; empty if a GPU computes the crops
    attempt: _Attempt = field(default_factory=_Attempt)
    slow: set[str] = field(default_factory=set)  # images that were not read in time
    bad: Bad = field(default_factory=list)  # images that could not be read
    future: Future = field(default_factory=Future)
    image: np.ndarray = field(default_factory=lambda: np.empty(0))  # decoded image and table of its crops, for a GPU
    table: np.ndarray = field(default_factory=lambda: np.empty(0))
    hidden: np.ndarray = field(default_factory=lambda: np.empty(0))  # masks of its global crops


class _Slot:
    """Rows of a batch in progress, and on a CPU the memory of its crops."""

    def __init__(self, crops: list[Tensor], rows: int) -> None:
        self.rows: list[_Row] = []
        self.crops = crops
        self.views = [[crop[i : i + 1] for crop in crops] for i in range(rows)]  # crops of each row


class _DeviceBatch:
    """Memory of a batch for a GPU: pinned host memory for the decoded images and masks, and device memory for the crops
    and masks."""

    def __init__(self, gpu: Gpu, crops: list[Tensor], masks: list[Tensor]) -> None:
        self.gpu, self.crops, self.masks = gpu, crops, masks
        self.pixels = gpu.pinned(0)  # bytes
        self.hidden = [gpu.pinned(mask.numel()).view(mask.shape) for mask in masks]
        self.copied: Event | None = None  # after it, the host may overwrite the pixels
        self.made: Event | None = None  # after it, the crops are complete
        self.used = gpu.record()  # after it, the crops may be overwritten

    def pack(self, rows: list[_Row]) -> tuple[Tensor, np.ndarray]:
        """The images of the rows, concatenated, and their offsets and sizes: the arguments of `multicrop_packed`."""
        if self.copied:
            self.copied.synchronize()
        sizes = [row.image.size for row in rows]
        dtype = np.result_type(*(row.image for row in rows))
        if (need := sum(sizes) * dtype.itemsize) > len(self.pixels):
            self.pixels = self.gpu.pinned(need * 5 // 4)
        pixels = self.pixels[:need].view(_DTYPES[dtype])
        starts = np.cumsum([0, *sizes])
        for row, start, size in zip(rows, starts, sizes, strict=False):
            pixels[start : start + size] = torch.from_numpy(row.image.reshape(-1).astype(dtype, copy=False))
        for hidden in self.hidden:
            hidden.copy_(torch.from_numpy(np.stack([row.hidden for row in rows])))
        places = [(start, *row.image.shape[:2]) for row, start in zip(rows, starts, strict=False)]
        return pixels, np.array(places, np.int64)


class CropLoader:
    """Iterating yields ([B, C, size, size] of each kind, newly found unreadable images) for each step; with `masks`,
    bool [B, 2, patches] follows the crops.

    A batch is valid until the next one is requested. An unreadable image is replaced by the next candidate of the
    sample; it is decoded and reported only once. An image that takes longer than STALL_SECONDS to read is replaced in
    this batch only.

    Args:
        images: the source of images.
        kinds: kinds of crops of an image.
        masks: masks of the first two crops, or None.
        batch_size: images per step over all ranks.
        seed: of the order and of the crops.
        start_step, total_steps: the steps start_step .. total_steps - 1 are yielded.
        num_workers: number of threads.
        rank, ranks: this process gets 1 / ranks of every batch.
        dtype: of the crops: float32, float16 or bfloat16.
        device: device of the crops. A GPU computes them from the uploaded decoded images.
        scale: what the values of the images mean, and how they are normalized.
        scaled_decode: decode a JPEG at reduced size if all of its crops are still downscaled from that size.

    On a GPU, crops are computed in a separate stream, one batch ahead of the step if its images are decoded in time.

    Raises:
        DataError: the images do not fill one batch; while iterating: none can be read.
        RuntimeError: while iterating: there are fewer batches than steps.
    """

    def __init__(
        self,
        images: Images,
        kinds: Sequence[CropKind],
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        total_steps: int,
        num_workers: int,
        rank: int = 0,
        ranks: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scale: PixelScale | None = None,
        scaled_decode: bool = False,
        masks: MaskKind | None = None,
    ) -> None:
        require_batch(len(images), batch_size)
        self.scale = scale or PixelScale()
        self.kinds, self.masks, self.seed = kinds, masks, seed
        self.num_workers, self.scaled_decode = num_workers, scaled_decode
        self.device, self.dtype, self.rows = torch.device(device), dtype, batch_size // ranks
        self._gpu = gpu_of(self.device)
        self._images, self._total = len(images), max(0, total_steps - start_step)
        self._steps = images.steps(batch_size, seed, start_step, total_steps, rank, ranks)
        self._bad: dict[str, str] = {}
        self._lock = Lock()

    def __iter__(self) -> Generator[tuple[list[Tensor], Bad], None, None]:
        self._threads = Threads(self.num_workers)
        ahead = 1 + max(1, -(-2 * self.num_workers // self.rows))  # so that threads do not wait for the step
        spare = [
            _Slot([] if self._gpu else [*self._empty_crops(), *self._empty_masks()], self.rows) for _ in range(ahead)
        ]
        batches = self._batches(spare) if self._gpu is None else self._batches_on_gpu(self._gpu, spare)
        try:
            yield from exactly(batches, self._total, "steps")
        finally:
            batches.close()
            self._steps.close()
            self._threads.close()

    def _batches(self, spare: list[_Slot]) -> Generator[tuple[list[Tensor], Bad], None, None]:
        begun = deque[_Slot]()
        while True:
            self._begin(spare, begun)
            if not begun:
                return
            slot = begun.popleft()
            yield slot.crops, self._finish(slot)
            spare.append(slot)

    def _batches_on_gpu(self, gpu: Gpu, spare: list[_Slot]) -> Generator[tuple[list[Tensor], Bad], None, None]:
        begun, stream = deque[_Slot](), gpu.stream()
        free = [
            _DeviceBatch(gpu, self._empty_crops(), self._empty_masks()) for _ in range(2)
        ]  # one in use, one prefetched
        made = deque[tuple[_DeviceBatch, Bad]]()
        try:
            while True:
                self._begin(spare, begun)
                while begun and free and (not made or all(row.future.done() for row in begun[0].rows)):
                    slot, batch = begun.popleft(), free.pop()
                    made.append((batch, self._finish(slot, batch, stream)))
                    spare.append(slot)
                    self._begin(spare, begun)
                if not made:
                    return
                batch, bad = made.popleft()
                assert batch.made
                gpu.wait(batch.made)
                yield [*batch.crops, *batch.masks], bad
                batch.used = gpu.record()
                free.append(batch)
        finally:
            for batch, _ in made:  # not yielded: their memory must not be freed while it is still written
                assert batch.made
                gpu.wait(batch.made)

    def _begin(self, spare: list[_Slot], begun: "deque[_Slot]") -> None:
        """Start the threads on batches in all spare slots."""
        while spare and (samples := next(self._steps, None)):
            slot = spare.pop()
            slot.rows = [_Row(i, *row) for i, row in enumerate(zip(samples, slot.views, strict=True))]
            for row in slot.rows:
                row.future = self._threads.submit(self._make, row, row.attempt)
            begun.append(slot)

    def _empty_crops(self) -> list[Tensor]:
        shapes = [(self.rows, self.scale.channels, kind.size, kind.size) for kind in self.kinds]
        return [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]

    def _empty_masks(self) -> list[Tensor]:
        shape = None if self.masks is None else (self.rows, 2, self.masks.side**2)
        return [] if shape is None else [torch.empty(shape, dtype=torch.bool, device=self.device)]

    def _finish(self, slot: _Slot, batch: _DeviceBatch | None = None, stream: object = None) -> Bad:
        """Wait for the rows of a batch; for a GPU, queue the upload and the crops."""
        bad = self._join(slot.rows)
        if batch is not None:
            pixels, places = batch.pack(slot.rows)
            table = np.stack([row.table for row in slot.rows])
            with batch.gpu.using(stream):
                on_device, *hidden = map(batch.gpu.upload, (pixels, *batch.hidden))
                batch.copied = batch.gpu.record()
                batch.gpu.wait(batch.used)
                multicrop_packed(on_device, places, table, batch.crops, scale=self.scale)
                for mask, uploaded in zip(batch.masks, hidden, strict=True):
                    mask.copy_(uploaded)
                batch.made = batch.gpu.record()
        slot.rows = []
        return bad

    def _join(self, rows: list[_Row]) -> Bad:
        """Wait for the rows; if a thread hangs, another one takes over its row."""
        while pending := [row for row in rows if not row.future.done()]:
            wait([row.future for row in pending], timeout=1)
            for row in pending:
                if row.attempt.give_up():
                    row.bad.append((row.attempt.name, f"not read within {STALL_SECONDS:.0f} s"))
                    row.slow.add(row.attempt.name)
                    row.attempt = _Attempt()
                    self._threads.add()
                    row.future = self._threads.submit(self._make, row, row.attempt)
        for row in rows:
            row.future.result()  # raises the exception of the thread
        return [entry for row in rows for entry in row.bad]

    def _make(self, row: _Row, attempt: _Attempt) -> None:
        """Fill the views of a row (CPU), or its image and table (GPU)."""
        for name, read in row.sample.candidates():
            if name in self._bad or name in row.slow:
                continue
            try:
                attempt.begin(name)
                data = read()
                if not attempt.has_read():
                    return
                image, crops = self._decode(data, row.sample)
            except Exception as error:  # damaged files raise almost any exception
                if not attempt.has_read():
                    return
                with self._lock:
                    if name not in self._bad:
                        self._bad[name] = reason(error)
                        row.bad.append((name, self._bad[name]))
                continue
            self._crop(row, image, crops)
            return
        first = next(iter(self._bad.items()), ("", "all too slow"))
        raise DataError(f"none of the {self._images} images could be read, the first: {': '.join(first)}")

    def _crop(self, row: _Row, image: np.ndarray, crops: np.ndarray) -> None:
        """Compute the crops on a CPU; for a GPU, keep the image and the table for the upload."""
        if self.masks is not None:
            row.hidden = self.masks.draw(self.seed, row.sample.epoch, row.sample.index, row.number)
        if self._gpu is not None:
            row.image, row.table = image, crops
            return
        multicrop([image], crops[None], row.views[: len(self.kinds)], scale=self.scale, threads=1)
        for mask in row.views[len(self.kinds) :]:
            mask[0] = torch.from_numpy(row.hidden)

    def _decode(self, data: bytes, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of an image and the table of its crops."""
        rgb = self.scale.is_8_bit_rgb
        if rgb and self.scaled_decode and (size := jpeg_size(data, any_size=True)):
            crops = self._draw(sample, size)
            sides = crops["box"][:, 2:] - crops["box"][:, :2]
            shrink = (sides.min(1) / crops["size"]).min()
            if shrink >= 2:
                with suppress(ValueError):  # decode() below reports the error
                    image = decode_smaller(data, shrink)
                    return image, _shrunk(crops, size, image)
        image = decode(data) if rgb else decode_deep(data, self.scale.channels)
        return image, self._draw(sample, image.shape[:2])

    def _draw(self, sample: Sample, image_size: tuple[int, ...]) -> np.ndarray:
        return draw_crops(self.seed, sample.epoch, sample.index, self.kinds, (image_size[0], image_size[1]))


def _shrunk(crops: np.ndarray, size: tuple[int, int], image: np.ndarray) -> np.ndarray:
    """Crop boxes of an image of `size` (height, width), scaled to a smaller copy of it."""
    height, width = image.shape[:2]
    scale = np.array([width / size[1], height / size[0]] * 2)
    box = np.rint(crops["box"] * scale).astype(np.int32)
    box[:, :2] = np.minimum(box[:, :2], [width - 1, height - 1])
    box[:, 2:] = np.clip(box[:, 2:], box[:, :2] + 1, [width, height])
    crops["box"] = box
    return crops


def exactly(items: Iterable[Item], count: int, what: str) -> Generator[Item, None, None]:
    """The items; RuntimeError if their number is not `count`, so that missing items do not go unnoticed."""
    given = 0
    for given, item in enumerate(items, 1):  # noqa: B007
        yield item
    if given != count:
        raise RuntimeError(f"expected {count} {what}, got {given}")


def require_batch(n_images: int, batch_size: int) -> None:
    """Raise DataError if the images do not fill one batch."""
    if not n_images:
        raise DataError("there is no image to train on")
    if n_images < batch_size:
        raise DataError(
            f"{n_images} images are fewer than one batch of {batch_size}: "
            f"add images or set the batch size to {n_images} or less"
        )


# --- evaluation --------------------------------------------------------------------------------------


def image_loader(
    images: ImageFolder,
    transform: Callable[[View, tuple[int, int]], Tensor],
    batch_size: int,
    num_workers: int,
    keys: Iterable[tuple[int, int]] | None = None,
) -> Iterator[Batch]:
    """`transform(view, key)` of each key (epoch, index), in order, by threads. Without keys: every image once.

    Yields (pixels [B, ...], labels int64 [B], -1 without labels, indices int64 [B], bad). Unreadable images are not in
    the tensors (B may be below batch_size, even 0) but listed in bad.
    """
    keys = ((0, index) for index in range(len(images))) if keys is None else keys

    def view(key: tuple[int, int]) -> tuple[int, Tensor | tuple[str, str]]:
        try:
            return key[1], transform(images.view(key[1]), key)
        except UnreadableImage as error:
            return key[1], (error.name, error.reason)

    views = in_order(view, keys, threads=num_workers, ahead=2 * max(batch_size, num_workers))
    while batch := list(islice(views, batch_size)):
        pixels = [one for _, one in batch if isinstance(one, Tensor)]
        bad = [one for _, one in batch if not isinstance(one, Tensor)]
        read = [index for index, one in batch if isinstance(one, Tensor)]
        labels = [-1 if images.labels is None else images.labels[i] for i in read]
        stacked = torch.stack(pixels) if pixels else torch.empty(0)
        yield stacked, torch.tensor(labels, dtype=torch.int64), torch.tensor(read, dtype=torch.int64), bad


def eval_loader(images: ImageFolder, size: int, batch_size: int, num_workers: int) -> Iterator[Batch]:
    """`eval_transform` of every image once, as `image_loader` yields it."""
    return image_loader(images, lambda view, _: eval_transform(view, size, images.scale), batch_size, num_workers)


class BadImages:
    """Counts the unreadable images of a run, and logs each of them once.

    n_images: images of the data set; batch_size: the minimum number of readable images (0 for evaluation). share: of
    them, the most that may be unreadable; FEW of them may be in any case, unless it is 0.
    """

    FEW = 10  # a few damaged files are a large share of a small data set

    def __init__(self, n_images: int, batch_size: int, share: float = 1.0) -> None:
        self.n_images, self.batch_size, self.share = n_images, batch_size, share
        self._names: dict[str, str] = {}

    @property
    def count(self) -> int:
        """Unreadable images so far."""
        return len(self._names)

    def add(self, bad: Bad) -> None:
        """Log the new ones in `bad`. Raises DataError if they are too many, or the others no longer fill one batch."""
        for name, why in bad:
            if name in self._names:
                continue
            self._names[name] = why
            logger.warning("skipped unreadable image %s: %s", name, why)
            if self.n_images - self.count < self.batch_size:
                raise DataError(
                    f"only {self.n_images - self.count} of {self.n_images} images could be read, "
                    f"fewer than one batch of {self.batch_size}: {name}: {why}"
                )
            if self.count > max(self.share * self.n_images, self.FEW if self.share else 0):
                raise DataError(
                    f"more than {self.share:.3g} of the {self.n_images} images cannot be read: mend or remove them, or "
                    f"allow more with --max-unreadable. {listed(self._names)}"
                )
