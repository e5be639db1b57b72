"""Ten crops of a photo, 2 of 224 pixels and 8 of 96, compared with the reference's Pillow transforms and others.

    python bench/bench_multicrop.py --photos DIR_OR_ZIP --json multicrop.json

Prints the difference of each step from Pillow's bytes; for each provider the time for the crops of a decoded image on
one core; and images per second of complete loaders, from files to batches, with one and two workers (threads in ours,
processes in the others). Medians over rounds in which the providers alternate; all compute normalized float32 crops.
Without --photos, the images are mosaics of the embedded images. To measure the AVX2 code on a processor with AVX-512,
build only that version (libgcc selects the version and ignores GLIBC_TUNABLES):

    CXX="g++ -march=x86-64-v3 -DDINO_ONE_VERSION" python setup.py build_ext --inplace
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dino_train.common.scale import IMAGENET_MEAN, IMAGENET_STD
from dino_train.config.presets import EMBEDDED_DATA
from dino_train.config.pretrain import PretrainConfig
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import CropLoader
from dino_train.data.pack import pack
from PIL import Image
from PIL import __version__ as pillow_version
from pillow_crops import pillow_crop, pillow_levels, reference_loader

from dino_kernels import CropKind, draw_crops, multicrop
from dino_kernels._core.native import JITTER

STEPS = ("resize", "flip", *JITTER, "grayscale", "blur", "solarize")
KINDS = PretrainConfig().crop_kinds


# --- parity ------------------------------------------------------------------------------------------


def only(step: str, drawn: np.ndarray) -> np.ndarray:
    """Drawn crops with the resize and the given step on in every crop, and all other steps off. The four jitter steps
    are never completely off: the conversion to HSV and back, which rounds, is always part of them."""
    crops = drawn.copy()
    for name in ("flip", "jitter", "grayscale", "solarize"):
        crops[name] = name == step or (name == "jitter" and step in JITTER)
    for name, off in {**dict.fromkeys(JITTER[:3], 1), "hue": 0}.items():
        crops[name] = np.where(name == step, drawn[name], off)
    crops["blur"] = np.maximum(drawn["blur"], 0.1) if step == "blur" else 0
    return crops


def our_levels(image: np.ndarray, crops: np.ndarray) -> list[np.ndarray]:
    out = [torch.empty(1, 3, size, size, dtype=torch.uint8) for size in crops["size"].tolist()]
    multicrop([image], crops[None], out)
    return [view[0].permute(1, 2, 0).numpy() for view in out]


def parity(images: list[Image.Image], tables: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """For each step and for whole crops: fraction of bytes that differ from Pillow, largest and mean difference."""
    report = {}
    for step in (*STEPS, "whole crop"):
        differences = []
        for image, drawn in zip(images, tables, strict=True):
            crops = drawn if step == "whole crop" else only(step, drawn)
            for crop, got in zip(crops, our_levels(np.asarray(image), crops), strict=True):
                differences.append(np.abs(got - pillow_levels(image, crop)).ravel())
        difference = np.concatenate(differences)
        report[step] = {
            "differing": float((difference > 0).mean()),
            "largest": int(difference.max()),
            "mean": float(difference.mean()),
        }
    return report


def picture(image: Image.Image) -> Image.Image:
    """All crops of an image in one row, ours above Pillow's."""
    crops = draw_crops(0, 0, 0, KINDS, image.size[::-1])
    ours = our_levels(np.asarray(image), crops)
    theirs = [pillow_levels(image, crop).astype(np.uint8) for crop in crops]
    tallest, lefts = max(crops["size"]), np.cumsum([0, *(crops["size"] + 4)])
    sheet = Image.new("RGB", (int(lefts[-1]), 2 * int(tallest) + 4), "white")
    for top, levels in ((0, ours), (int(tallest) + 4, theirs)):
        for left, crop in zip(lefts, levels, strict=False):
            sheet.paste(Image.fromarray(crop), (int(left), top))
    return sheet


# --- providers ---------------------------------------------------------------------------------------

# Computes all crops of a decoded image; the index of the image is the random seed.
Provider = Callable[[int, Any], Any]


def ours(batch: list[torch.Tensor]) -> Provider:
    """Fills the rows of a batch, like the loader."""

    def crop(number: int, image: np.ndarray) -> None:
        rows = [view[number : number + 1] for view in batch]
        multicrop([image], draw_crops(0, 0, number, KINDS, image.shape[:2])[None], rows, threads=1)

    return crop


def pillow(number: int, image: Image.Image) -> list[torch.Tensor]:
    return [pillow_crop(image, crop) for crop in draw_crops(0, 0, number, KINDS, image.size[::-1])]


def albumentations() -> Provider:
    """The closest transforms to the same distribution; resized by area, since its bicubic has no antialiasing."""
    import albumentations as A  # noqa: N812
    import cv2

    cv2.setNumThreads(1)

    def pipeline(kind: CropKind) -> Any:
        return A.Compose(
            [
                A.RandomResizedCrop((kind.size, kind.size), scale=kind.scale, interpolation=cv2.INTER_AREA),
                A.HorizontalFlip(),
                A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=kind.blur),
                A.Solarize(p=kind.solarize),
                A.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    pipelines = [pipeline(kind) for kind in KINDS]

    def crop(number: int, image: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(p(image=image)["image"].transpose(2, 0, 1).copy()) for p in pipelines]

    return crop


# --- measuring ---------------------------------------------------------------------------------------

REFERENCE = "reference transforms on Pillow"
BATCH, SKIPPED, STEPS_MEASURED = 4, 15, 60  # steps of the slowest loader; ours runs ten times as many


def crop_times(images: list[Image.Image], rounds: int) -> dict[str, float]:
    """Milliseconds per decoded image of each provider on one core."""
    batch = [torch.zeros(len(images), 3, kind.size, kind.size) for kind in KINDS]
    found: dict[str, Provider] = {"ours": ours(batch), REFERENCE: pillow}
    try:
        found["albumentations, area"] = albumentations()
    except ImportError:
        print("albumentations is not installed: left out")
    arrays = [np.asarray(image) for image in images]
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, provider in found.items():
            taken = images if name == REFERENCE else arrays
            start = time.perf_counter()
            for i, image in enumerate(taken):
                provider(i, image)
            times[name].append(1000 * (time.perf_counter() - start) / len(images))
    return {name: statistics.median(values) for name, values in times.items()}


def our_loader(images: ImageFolder, workers: int) -> CropLoader:
    steps = {"start_step": 0, "total_steps": SKIPPED + 10 * STEPS_MEASURED}
    return CropLoader(images, KINDS, batch_size=BATCH, seed=0, num_workers=workers, **steps)


def rate(batches: Iterable[Any]) -> float:
    """Images per second in steady state: the first batches are skipped, since some of them are already prefetched."""
    iterator, count = iter(batches), 0
    for _ in range(SKIPPED):
        next(iterator)
    start = time.perf_counter()
    for _ in iterator:
        count += BATCH
    return count / (time.perf_counter() - start)


def loader_rates(images: ImageFolder, packed: ImageFolder, rounds: int) -> dict[str, dict[int, float]]:
    """Images per second of each loader by number of workers."""
    loaders: dict[str, Callable[[int], Iterable[Any]]] = {
        "ours": lambda workers: our_loader(images, workers),
        "ours, packed to 400 pixels": lambda workers: our_loader(packed, workers),
        REFERENCE: lambda workers: reference_loader(images, KINDS, BATCH, SKIPPED + STEPS_MEASURED, workers),
    }
    rates: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in loaders}
    for _ in range(rounds):
        for name, loader in loaders.items():
            for workers, values in rates[name].items():
                values.append(rate(loader(workers)))
    return {name: {w: statistics.median(v) for w, v in values.items()} for name, values in rates.items()}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def copies(images: ImageFolder, folder: Path, count: int) -> None:
    """Copy the images to plain files, which several processes can read at the same time."""
    for i, name in enumerate(images.names[:count]):
        (folder / f"{i}{Path(name).suffix}").write_bytes(images.read(i))


def mosaics(folder: Path, count: int) -> None:
    """Write images of 512 x 384 pixels, each a mosaic of 192 embedded images."""
    small = ImageFolder(EMBEDDED_DATA)
    for number in range(count):
        image = Image.new("RGB", (512, 384))
        for i in range(192):
            tile = small.load((192 * number + i) % len(small))
            image.paste(tile, (32 * (i % 16), 32 * (i // 16)))
        image.save(folder / f"{number}.jpg", quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder, .zip or .tar of images; default: mosaics of the embedded images")
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--picture", help="PNG to draw ten crops of the first image to, ours above Pillow's")
    parser.add_argument("--images", type=int, default=40, help="number of images")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        files, packed = Path(temporary) / "files", Path(temporary) / "packed.tar"
        files.mkdir()
        copies(ImageFolder(args.photos), files, args.images) if args.photos else mosaics(files, args.images)
        pack(ImageFolder(files), packed, size=400, quality=90, num_workers=2)
        if args.picture:
            picture(ImageFolder(files).load(0)).save(args.picture)
        run(ImageFolder(files), ImageFolder(packed), args.rounds, args.json)


def run(folder: ImageFolder, packed: ImageFolder, rounds: int, path: str | None) -> None:
    images = [folder.load(i) for i in range(len(folder))]
    report = parity(images, [draw_crops(0, 0, i, KINDS, image.size[::-1]) for i, image in enumerate(images)])
    print(f"{'step':24} bytes that differ   largest   mean difference from Pillow {pillow_version}")
    for step, row in report.items():
        print(f"{step:24} {100 * row['differing']:15.4f} %   {row['largest']:7}   {row['mean']:.6f}")

    times, rates = crop_times(images, rounds), loader_rates(folder, packed, rounds)
    print(f"\n{len(images)} images, {processor()}")
    print(f"{'provider':32} {'ms per image':>20} {'images/s, 1 worker':>24} {'2 workers':>20}")
    results: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys((*times, *rates)):
        cells = ["", "", ""]
        results[name] = {}
        if name in times:
            results[name]["ms_per_image"] = times[name]
            cells[0] = f"{times[name]:.2f} ({times[REFERENCE] / times[name]:.1f}x)"
        if name in rates:
            results[name]["images_per_s"] = rates[name]
            cells[1:] = [f"{value:.0f} ({value / rates[REFERENCE][w]:.1f}x)" for w, value in rates[name].items()]
        print(f"{name:32} {cells[0]:>20} {cells[1]:>24} {cells[2]:>20}")
    if path:
        machine = {"processor": processor(), "pillow": pillow_version, "torch": torch.__version__}
        content = {"machine": machine, "images": len(images), "parity": report, "providers": results}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
