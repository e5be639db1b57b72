"""Images from WebDataset shards: local or remote tar files that are read sequentially.

    urls = shard_urls("train-{000000..000146}.tar")        # or "pipe:aws s3 cp s3://bucket/{000000..000146}.tar -"
    stream = ShardStream(urls, count_samples(urls, folder))

An epoch is one sequence of all samples: the shards in an order that depends on (seed, epoch), each read sequentially.
A rank has one contiguous part of it, so that all ranks have the same number of samples, whatever the sizes of the
shards. It reads only the shards that overlap its part, and shuffles within windows of WINDOW samples. A resume skips
shards and starts at its window.
"""

import json
import logging
import os
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread

import numpy as np
import torch

from dino_train.common import parallel
from dino_train.common.files import atomic
from dino_train.data.archive import plain
from dino_train.data.folder import Candidate, DataError, Sample, generator
from dino_train.data.names import Content, is_data, is_image, listed, of_shard
from dino_train.data.tar_index import ENCODING, each, members

WINDOW = 1024  # samples shuffled together; up to four windows are in memory, each 100 MB for ImageNet

COUNTS = "shards.json"  # in a run's folder: samples of each shard

logger = logging.getLogger(__name__)

File = tuple[str, bytes | None]  # name and content; None if it could not be read


def is_shards(data: str | Path) -> bool:
    """Whether `data` names shards to stream, not a folder or file to read in place: a pattern, or a folder of tar files
    without images and folders."""
    text = str(data)
    if os.path.isdir(text):
        entries = [entry for entry in Path(text).iterdir() if not entry.name.startswith(".")]
        return any(e.suffix == ".tar" for e in entries) and not any(e.is_dir() or is_image(e.name) for e in entries)
    return not os.path.exists(text) and ("{" in text or "://" in text or text.startswith("pipe:"))


def shard_urls(data: str) -> list[str]:
    """All shards that `data` names: the tar files of a folder, or a pattern with braces as in a shell, or several such
    patterns joined by `::`."""
    from webdataset.shardlists import expand_urls

    if os.path.isdir(data):
        return sorted(str(path) for path in Path(data).glob("*.tar"))
    return list(dict.fromkeys(expand_urls(data)))


class ShardStream:
    """Samples of shards, a source of images for `CropLoader`.

    Args:
        urls: of the shards: paths, or URLs that WebDataset opens (`pipe:COMMAND`, `https://`, `s3://`, ...).
        counts: number of samples of each shard.
    """

    def __init__(self, urls: Sequence[str], counts: Sequence[int]) -> None:
        self.urls, self.counts = list(urls), np.array(counts, np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])  # index of each shard's first sample
        self.names = [f"{url} {count}" for url, count in zip(urls, counts, strict=True)]  # they identify the order

    def __len__(self) -> int:
        return int(self.first[-1])

    def steps(
        self, batch_size: int, seed: int, start_step: int, total_steps: int, rank: int = 0, ranks: int = 1
    ) -> Generator[list[Sample], None, None]:
        """A rank's samples of each of the steps start_step .. total_steps - 1; a thread prefetches the next window."""
        share, steps_per_epoch = batch_size // ranks, len(self) // batch_size
        plan = _plan(start_step, total_steps, steps_per_epoch, share)
        windows: Queue[_Window | Exception] = Queue(maxsize=1)
        stop = Event()
        reader = partial(self._read, plan, seed, rank * (len(self) // ranks), windows, stop)
        Thread(target=reader, name="dino-train shards", daemon=True).start()
        batch: list[Sample] = []
        try:
            for _ in range(start_step, total_steps):
                while len(batch) < share:
                    window = windows.get()
                    if isinstance(window, Exception):
                        raise window
                    batch += window.samples()
                yield batch[:share]
                batch = batch[share:]
        finally:
            stop.set()

    def _read(
        self, plan: Iterator[tuple[int, int, int, int]], seed: int, begin: int, windows: Queue, stop: Event
    ) -> None:
        """Put the windows of a plan into the queue; begin: offset of the rank's part in the sequence of an epoch."""
        try:
            files: Iterator[File] = iter(())
            following = (-1, 0)  # epoch and position of the next item of `files`
            for epoch, first, last, skip in plan:
                shards = generator(seed, epoch).permutation(len(self.urls))
                if following != (epoch, first):
                    files = self._files(shards, begin + first)
                numbers = self._numbers(shards, begin + first, begin + last)
                order = generator(seed, epoch, 1 + begin + first).permutation(last - first)
                window = _Window(epoch, numbers, list(islice(files, last - first)), order, skip)
                following = (epoch, last)
                if not _offer(window, windows, stop):
                    return
        except Exception as error:
            _offer(error, windows, stop)

    def _numbers(self, shards: np.ndarray, first: int, last: int) -> np.ndarray:
        """Indices of the samples at positions first .. last - 1 of the sequence."""
        ends = np.cumsum(self.counts[shards])
        position = np.arange(first, last)
        at = np.searchsorted(ends, position, side="right")
        return self.first[shards[at]] + position - (ends[at] - self.counts[shards[at]])

    def _files(self, shards: np.ndarray, first: int) -> Iterator[File]:
        """The files of the sequence from `first` on; those that are missing in a shard that fails have no content."""
        skip = first
        for shard in shards:
            count = int(self.counts[shard])
            if skip >= count:
                skip -= count
                continue
            url, done, why = self.urls[shard], 0, "it ends there"
            try:
                for done, file in enumerate(islice(shard_files(url), count), 1):
                    if done > skip:
                        yield file
            except Exception as error:
                why = str(error)
            if done < count:
                logger.warning("shard %s: only %d of %d samples could be read: %s", url, done, count, why)
            for i in range(max(done, skip), count):
                yield f"{url}: sample {i}", None
            skip = 0


def _offer(item: object, queue: Queue, stop: Event) -> bool:
    """Wait for a free place in the queue and put the item; False if `stop` is set."""
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.5)
            return True
        except Full:
            continue
    return False


def _plan(start_step: int, total_steps: int, steps_per_epoch: int, share: int) -> Iterator[tuple[int, int, int, int]]:
    """(epoch, first, last, skip) of each window: its samples are first .. last - 1 of a rank's part of the epoch; the
    first `skip` of them, in shuffled order, were used before start_step."""
    if start_step >= total_steps:
        return
    used = share * steps_per_epoch
    epoch, step = divmod(start_step, steps_per_epoch)
    begin = step * share
    while epoch * steps_per_epoch < total_steps:
        for first in range(begin // WINDOW * WINDOW, used, WINDOW):
            yield epoch, first, min(first + WINDOW, used), max(0, begin - first)
        epoch, begin = epoch + 1, 0


class _Window:
    """Samples in shuffled order, with their files."""

    def __init__(self, epoch: int, numbers: np.ndarray, files: list[File], order: np.ndarray, skip: int) -> None:
        self.epoch, self.numbers, self.files, self.order, self.skip = epoch, numbers, files, order, skip

    def samples(self) -> list[Sample]:
        return [
            Sample(self.epoch, int(self.numbers[self.order[i]]), partial(self.candidates, i))
            for i in range(self.skip, len(self.files))
        ]

    def candidates(self, i: int) -> Iterator[Candidate]:
        """Sample i, followed by the samples that replace it if it is unreadable."""
        for k in range(len(self.files)):
            name, data = self.files[self.order[(i + k) % len(self.files)]]
            yield name, partial(_content, data)


def _content(data: bytes | None) -> bytes:
    if data is None:
        raise ValueError("its shard cannot be read")
    return data


def shard_files(url: str) -> Iterator[File]:
    """The images of a shard, in its order; the same as of that tar read in place, but for links."""
    return ((f"{url}: {name}", data) for name, data, why in _images(url) if not why)


def _images(url: str) -> Iterator[tuple[str, bytes | None, str]]:
    """`_of_shard` of a shard that WebDataset opens."""
    from webdataset import gopen

    with tarfile.open(fileobj=gopen(url), mode="r|*", encoding=ENCODING[0], errors=ENCODING[1]) as tar:
        yield from _of_shard(each(tar), lambda member: tar.extractfile(member).read())  # type: ignore[union-attr]


def _of_shard(
    members: Iterable[tarfile.TarInfo], read: Callable[[tarfile.TarInfo], Content]
) -> Iterator[tuple[str, Content | None, str]]:
    """`of_shard` of the images among members, and the links, which a stream cannot follow."""
    links = []

    def images() -> Iterator[tuple[str, Content]]:
        for member in members:
            name = plain(member.name)
            if name and member.isreg() and is_data(name):
                yield name, read(member)
            elif name and (member.issym() or member.islnk()):
                links.append(name)

    yield from of_shard(images())
    yield from ((name, None, "a link, which is not followed in a shard") for name in links)


def count_samples(urls: Sequence[str], folder: Path) -> list[int]:
    """Number of samples of each shard, from `folder`/shards.json. Shards that are not in it are counted, in parallel by
    the ranks, and added to it.

    Raises DataError if a shard cannot be read.
    """
    path = folder / COUNTS
    known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    missing = [url for url in urls if url not in known]
    shares = [missing[rank :: parallel.size()] for rank in range(parallel.size())]
    parallel.barrier()  # all ranks have read the file before rank 0 writes it
    counted = parallel.gather(torch.tensor([_count(url) for url in shares[parallel.rank()]], dtype=torch.int64))
    known.update(zip([url for share in shares for url in share], counted.tolist(), strict=True))
    if missing and parallel.rank() == 0:
        with atomic(path) as temporary:
            temporary.write_text(json.dumps({url: known[url] for url in urls}, indent=1) + "\n")
    return [known[url] for url in urls]


def _count(url: str) -> int:
    try:
        reasons = _reasons(url)
    except Exception as error:
        raise DataError(f"cannot read shard {url}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if left_out := {name: why for name, why in reasons if why}:
        logger.warning("shard %s: images that are not used: %s", url, listed(left_out))
    return sum(not why for _, why in reasons)


def _reasons(url: str) -> list[tuple[str, str]]:
    """Images of a shard, and why they are not used: from the headers of a local tar; a stream or a compressed file must
    be read completely."""
    path = Path(url.removeprefix("file:"))
    if path.exists():
        with suppress(tarfile.ReadError):  # it is compressed
            return [(name, why) for name, _, why in _of_shard(members(path), lambda member: None)]
    return [(name, why) for name, _, why in _images(url)]
