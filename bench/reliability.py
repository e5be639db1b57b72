"""Kills, damaged files and a full disk: repeats the figures of docs/reliability.md, on Linux.

    python bench/reliability.py [--kills 100] [--images 3000] [--checkpoints 300] [--archives 300] [--disk-full 1]

Prints a Markdown table, and each failure on stderr. The exit status is 1 if anything was lost without a message,
crashed, ended in a traceback or hung. The damage is the same in every call; the moments of the kills are not.
"""

import argparse
import io
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from dino_train.common import checkpoint
from dino_train.common.metrics import read_metrics
from dino_train.data.decode import UnreadableImage
from dino_train.data.folder import DataError, ImageFolder
from dino_train.data.pack import pack
from PIL import Image

from dino_kernels import PixelScale

FILE_LIMIT, RUN_LIMIT = 10, 300  # seconds until reading a file, and training, count as a hang
MEMORY = 16 << 30  # addresses of the process that reads: a damaged size must not take the memory of the machine
RUN = [  # 270 steps, some 6 seconds
    *("--arch", "vit_nano", "--patch-size", "8", "--out-dim", "64", "--head-hidden-dim", "16", "--epochs", "30"),
    *("--global-crops-size", "16", "--local-crops-size", "8", "--local-crops-number", "1", "--device", "cpu"),
    *("--batch-size-per-gpu", "4", "--num-workers", "1", "--log-interval", "2", "--save-minutes", "0.001", "--resume"),
]

Failure = tuple[str, str]  # the kind, a column of the table; what was seen
Failures = Iterator[Failure | None]  # of each try


class SilentLoss(Exception):
    """Something is missing or changed, and no message says so."""


def one_line(error: Exception) -> None:
    assert str(error) and "\n" not in str(error), f"not one line: {error!r}"


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


# --- damaged files, read in a process of their own -----------------------------------------------


def damaged(data: bytes, number: int) -> bytes:
    """With a flipped bit, a hole of zeros or a piece twice, or cut off; often near an end, where headers are. A hole
    does not reach the end: a tar whose last members are zeros is a whole tar of fewer members."""
    rng, size = Random(number), len(data.rstrip(b"\0")) - 1
    near = rng.randrange(min(size, 512))
    at = rng.choice([rng.randrange(size), near, size - 1 - near])
    length = min(rng.choice([1, 16, 512, 4096]), size - at)
    flipped = bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return data[:at] + rng.choice(
        [flipped, b"", bytes(length) + data[at + length :], data[at : at + length] + data[at:]]
    )


def check_image(folder: Path, suffix: str, data: bytes, number: int) -> None:
    """It is pixels, of 8 bits and of more, or an UnreadableImage."""
    (folder / f"0{suffix}").write_bytes(damaged(data, number))
    for scale in (PixelScale(), PixelScale(high=(65535.0,) * 3)):
        try:
            pixels = np.asarray(ImageFolder(folder).scaled(scale).view(0))
            assert pixels.ndim == 3 and pixels.size, pixels.shape
        except UnreadableImage as error:
            one_line(error)


def check_checkpoint(folder: Path, run: Path, number: int) -> None:
    """It gives the same state, or else previous.pt does with a warning, or there is none and it is an error."""
    alone, kind = number % 2 == 1, number // 2 % 10
    last, previous = folder / checkpoint.LAST, folder / checkpoint.PREVIOUS
    if not alone:
        previous.write_bytes((run / checkpoint.PREVIOUS).read_bytes())
    if kind == 0:
        last.mkdir()
    else:
        last.write_bytes(b"" if kind == 1 else damaged((run / checkpoint.LAST).read_bytes(), number))
    if kind == 2:
        last.chmod(0)
    said: list[str] = []
    checkpoint.logger.filters = [lambda record: said.append(record.getMessage())]
    root = os.geteuid() == 0
    try:
        if kind == 2 and root:  # which may read any file
            folder.chmod(0o755)
            os.seteuid(65534)
        state, path = checkpoint.load_newest(folder)
    except checkpoint.CheckpointError as error:
        one_line(error)
        if not alone:
            raise SilentLoss(f"previous.pt was not used: {error}") from error
        return
    finally:
        if root:
            os.seteuid(0)
    if not same(state, checkpoint.load(run / path.name)) or len(said) != (path == previous) or "\n" in "".join(said):
        raise SilentLoss(f"{path.name} was read, with the message {said}")


def check_archive(folder: Path, path: Path, number: int) -> None:
    """It is a DataError, or each image is the same or an UnreadableImage. A plain tar has no checksums of what is in
    it: there only missing images count."""
    original = ImageFolder(path)
    whole = {name: original.pixels(i) for i, name in enumerate(original.names)}
    copy = folder / path.name
    copy.write_bytes(damaged(path.read_bytes(), number))
    try:
        images = ImageFolder(copy)
    except DataError as error:
        return one_line(error)
    if len(images) < len(whole) and not images.notes:
        raise SilentLoss(f"{len(images)} of {len(whole)} images")
    for i, name in enumerate(images.names):
        try:
            pixels = images.pixels(i)
        except UnreadableImage as error:
            one_line(error)
            continue
        if path.name != "plain.tar" and not (name in whole and np.array_equal(pixels, whole[name])):
            raise SilentLoss(f"{name} has other pixels")


def serve(pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes there about each file
    answer: Failure | str | None = "ready"
    while True:
        pipe.send(answer)
        check, arguments = pipe.recv()
        try:
            with TemporaryDirectory() as folder:
                answer = check(Path(folder), *arguments)
        except SilentLoss as loss:
            answer = "loss", str(loss)
        except BaseException as error:
            answer = "traceback", repr(error)


def checked(check: Callable[..., None], count: int, things: dict[str, tuple]) -> Failures:
    """Each thing in turn, in a process that another one replaces after a crash or a hang."""
    process = None
    for number in range(count):
        if process is None:
            pipe, other = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=serve, args=(other,), daemon=True)
            process.start()
            other.close()
            pipe.recv()
        name = list(things)[number % len(things)]
        pipe.send((check, (*things[name], number)))
        answered, failure = False, None
        try:
            if pipe.poll(FILE_LIMIT):
                failure, answered = pipe.recv(), True
            else:
                failure = "hang", f"longer than {FILE_LIMIT} s"
        except (EOFError, ConnectionError):  # is_alive() may still be true: the pipe closes first
            failure = "traceback", "the process that read it died"
        if not answered:
            process.kill()
            process = None
        yield failure and (failure[0], f"{name}, number {number}: {failure[1]}")


def image_files() -> dict[str, tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    deep = (np.add.outer(np.arange(40), np.arange(56)) * 400 + rng.integers(0, 999, (40, 56))).astype(np.uint16)
    color = Image.fromarray((np.stack([deep, deep // 2, deep[::-1]], -1) >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    files: dict[str, tuple[str, bytes]] = {}
    for kind, suffix, image, options in (
        ("JPEG", ".jpg", color, {}),
        ("JPEG with EXIF", ".jpg", color, {"exif": exif, "progressive": True}),
        ("PNG", ".png", color, {}),
        ("PNG of 16 bits", ".png", Image.fromarray(deep), {}),
        ("TIFF", ".tif", color, {}),
        ("TIFF of 16 bits", ".tif", Image.fromarray(deep), {"compression": "tiff_lzw"}),
        ("WEBP", ".webp", color, {}),
    ):
        file = io.BytesIO()
        image.save(file, kind.split()[0], **options)
        files[kind] = suffix, file.getvalue()
    file = io.BytesIO()
    np.save(file, deep)
    return {**files, "npy": (".npy", file.getvalue())}


def make_images(folder: Path) -> None:
    """40 images of two classes; the same as pack.tar, plain.tar and images.zip beside the folder."""
    rng = np.random.default_rng(0)
    with (
        tarfile.open(folder.parent / "plain.tar", "w") as tar,
        zipfile.ZipFile(folder.with_suffix(".zip"), "w") as zipped,
    ):
        for i in range(40):
            name = f"class{i % 2}/{i:03d}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / name)
            tar.add(folder / name, name)
            zipped.write(folder / name, name)
    pack(ImageFolder(folder), folder.parent / "pack.tar", size=400, quality=90, num_workers=1)


# --- runs ----------------------------------------------------------------------------------------


class Run:
    """A run of `dino-train pretrain`, started any number of times."""

    def __init__(self, work: Path, name: str) -> None:
        self.folder, self.log = work / name, work / f"{name.replace('/', '-')}.txt"
        self.command = ["pretrain", "--data", str(work / "images"), "--output-dir", str(self.folder), *RUN]

    def start(self) -> subprocess.Popen:
        with open(self.log, "a") as log:
            command = [sys.executable, "-m", "dino_train", *self.command]
            return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def end(self, process: subprocess.Popen, status: int = 0) -> Failure | None:
        """What is wrong with the end of it."""
        try:
            process.wait(RUN_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            return "hang", f"{self.folder.name}: longer than {RUN_LIMIT} s"
        said = self.log.read_text()
        if "Traceback" in said or process.returncode != status:
            return "traceback", f"{self.folder.name}: exit status {process.returncode}: {said[-2000:]}"
        return None

    def differs(self, other: "Run") -> Failure | None:
        names = ("student", "teacher", "optimizer", "dino_loss", "step", "rng")
        a, b = (checkpoint.load(run.folder / checkpoint.LAST) for run in (self, other))
        return None if all(same(a[name], b[name]) for name in names) else ("loss", f"{self.folder.name}: other weights")


def kills(work: Path, whole: Run, count: int) -> Failures:
    """Runs that are killed at random moments and resumed until they end."""
    killed, steps = 0, [row["step"] for row in read_metrics(whole.folder)]
    while killed < count:
        run = Run(work, f"killed{killed}")
        process = run.start()
        while killed < count:
            try:
                process.wait(Random().uniform(0.5, 6))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                process = run.start()
        failure = run.end(process) or run.differs(whole)
        if not failure and [row["step"] for row in read_metrics(run.folder)] != steps:
            failure = "loss", f"{run.folder.name}: other rows of metrics"
        yield failure


def disk_full(work: Path, whole: Run, count: int) -> Failures:
    """The disk is full from the first checkpoint on; once there is space again, the run is resumed."""
    for number in range(count):
        disk, run = work / f"disk{number}", Run(work, f"disk{number}/run")
        last, filler = run.folder / checkpoint.LAST, disk / "filler"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
        try:
            process, began = run.start(), time.monotonic()
            while process.poll() is None and time.monotonic() - began < RUN_LIMIT:
                if not last.exists():
                    time.sleep(0.01)
                elif mounted:
                    with suppress(OSError), open(filler, "ab", buffering=0) as file:
                        while file.write(bytes(1 << 16)):
                            pass
                else:  # a limit on the size of files instead: writes fail in the same way
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
            failure = run.end(process, status=1)  # the last checkpoint must be written
            said = run.log.read_text()
            if not failure and not all(
                part in said for part in (f"cannot write {last}", "training continues", "step 270/270")
            ):
                failure = "loss", f"the run ended early, or did not say what it could not write: {said[-2000:]}"
            filler.unlink(missing_ok=True)
            checkpoint.load(last)
            yield failure or run.end(run.start()) or run.differs(whole)
        except checkpoint.CheckpointError as error:
            yield "loss", str(error)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(disk)], check=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--checkpoints", type=int, default=300)
    parser.add_argument("--archives", type=int, default=300)
    parser.add_argument("--disk-full", type=int, default=1)
    n = parser.parse_args(argv)
    failed = False
    print("| case | count | silent losses | tracebacks, crashes | hangs | seconds |\n|---|---|---|---|---|---|")
    with TemporaryDirectory() as name:
        work = Path(name)
        make_images(work / "images")
        whole = Run(work, "whole")
        if failure := whole.end(whole.start()):
            raise SystemExit(f"{failure}")
        archives = {name: (work / name,) for name in ("pack.tar", "plain.tar", "images.zip")}
        for case, count, failures in (
            ("kills", n.kills, kills(work, whole, n.kills)),
            ("damaged images", n.images, checked(check_image, n.images, image_files())),
            (
                "damaged checkpoints",
                n.checkpoints,
                checked(check_checkpoint, n.checkpoints, {"last.pt": (whole.folder,)}),
            ),
            ("damaged archives", n.archives, checked(check_archive, n.archives, archives)),
            ("full disk", n.disk_full, disk_full(work, whole, n.disk_full)),
        ):
            began, found = time.monotonic(), Counter[str]()
            for kind, seen in filter(None, failures):
                found[kind] += 1
                print(f"{case}: {kind}: {seen}", file=sys.stderr)
            numbers = " | ".join(str(found[kind]) for kind in ("loss", "traceback", "hang"))
            print(f"| {case} | {count} | {numbers} | {time.monotonic() - began:.0f} |", flush=True)
            failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
