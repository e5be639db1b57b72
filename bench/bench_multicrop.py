"""Ten crops of a photo, 2 of 224 pixels and 8 of 96: ours against the reference's transforms on Pillow, and others.

    python bench/bench_multicrop.py --photos DIR_OR_ZIP --json multicrop.json

Prints how far each step is from Pillow's bytes, then of each provider the time for the crops of a decoded image and the
images a second with decoding, the best of several rounds in which the providers take turns; one process, and one thread
where the name says nothing else. All make normalized float32 crops. The AVX2 code is measured on a processor with
AVX-512 by building for it alone (libgcc chooses among the versions, which heeds no GLIBC_TUNABLES):

    CXX="g++ -march=x86-64-v3 -DDINO_ONE_VERSION" python setup.py build_ext --inplace
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dino_train.augment import IMAGENET_MEAN, IMAGENET_STD, Crop, CropKind, MultiCrop, apply_crop
from dino_train.data import ImageFolder
from PIL import Image
from PIL import __version__ as pillow_version

from dino_kernels.multicrop import JITTER, draw_crops, multicrop

STEPS = ("resize", "flip", *JITTER, "grayscale", "blur", "solarize")
KINDS = MultiCrop().kinds


# --- parity ------------------------------------------------------------------------------------------


def pillow_levels(image: Image.Image, crop: np.void) -> np.ndarray:
    """A row of CROP by Pillow: int [size, size, 3]; rows before columns, which Pillow 13 does not always do."""
    size = int(crop["size"])
    image = image.crop(tuple(crop["box"].tolist()))
    for shape in ((size, image.height), (size, size)):
        image = image.resize(shape, Image.Resampling.BICUBIC)
    factors = [(JITTER[i], float(crop[JITTER[i]])) for i in crop["order"]] if crop["jitter"] else []
    steps = Crop(
        (0, 0, size, size),
        size,
        bool(crop["flip"]),
        tuple(factors),
        bool(crop["grayscale"]),
        float(crop["blur"]),
        bool(crop["solarize"]),
    )
    value = apply_crop(image, steps).permute(1, 2, 0).double().numpy()
    return np.round((value * IMAGENET_STD + IMAGENET_MEAN) * 255).astype(int)


def only(step: str, drawn: np.ndarray) -> np.ndarray:
    """Drawn crops with all steps but the resize and the given one off, and that one on in each of them. The four of the
    jitter are never quite off together: the way to hue and back, which also rounds, is part of them."""
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
    """Of each step and of whole crops: the share of bytes that are not Pillow's, largest and mean difference."""
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


# --- providers ---------------------------------------------------------------------------------------

# Makes all crops of a decoded image; its number seeds the random draws.
Provider = Callable[[int, Any], Any]


def ours(batch: list[torch.Tensor], threads: int) -> Provider:
    """Fills the rows of a batch, as a loader does."""

    def crop(number: int, image: np.ndarray) -> None:
        rows = [view[number : number + 1] for view in batch]
        multicrop([image], draw_crops(0, 0, number, KINDS, image.shape[:2])[None], rows, threads=threads)

    return crop


def pillow(number: int, image: Image.Image) -> list[torch.Tensor]:
    return MultiCrop()(image, (0, 0, number))


def albumentations() -> Provider:
    """The same law with its closest transforms: resized by area, since its bicubic has no antialiasing."""
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


def providers(images: int) -> dict[str, tuple[Provider, int]]:
    """Of each name what crops, and the number of threads."""
    batch = [torch.zeros(images, 3, kind.size, kind.size) for kind in KINDS]
    found: dict[str, tuple[Provider, int]] = {
        "ours": (ours(batch, 1), 1),
        "ours, 2 threads": (ours(batch, 2), 2),
        "reference transforms on Pillow": (pillow, 1),
    }
    try:
        found["albumentations, area"] = (albumentations(), 1)
    except ImportError:
        print("albumentations is not installed: left out")
    return found


# --- measuring ---------------------------------------------------------------------------------------


def milliseconds(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return 1000 * (time.perf_counter() - start)


def as_taken(name: str, image: Image.Image) -> Any:
    return image if "Pillow" in name else np.asarray(image)


def work_off(folder: ImageFolder, numbers: range, name: str, provider: Provider, threads: int) -> None:
    """What workers of a loader do: each decodes an image and crops it."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: provider(i, as_taken(name, folder.load(i))), numbers))


def measure(folder: ImageFolder, images: list[Image.Image], rounds: int) -> dict[str, dict[str, float]]:
    """Each image and each pass over all with decoding at its fastest, since other programs run too."""
    found, numbers = providers(len(images)), range(len(images))
    crop = {name: np.full(len(images), np.inf) for name in found}
    total = dict.fromkeys(found, np.inf)
    for _ in range(rounds):
        for name, (provider, threads) in found.items():
            for i, image in enumerate(images):
                crop[name][i] = min(crop[name][i], milliseconds(provider, i, as_taken(name, image)))
            worker = found["ours"][0] if threads > 1 else provider
            total[name] = min(total[name], milliseconds(work_off, folder, numbers, name, worker, threads))
    return {
        name: {"ms_per_image": float(crop[name].mean()), "images_per_s": 1000 * len(images) / total[name]}
        for name in found
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder or .zip of images")
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--images", type=int, default=24, help="how many of them")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = ImageFolder(args.photos)
    images = [folder.load(i) for i in range(min(args.images, len(folder)))]
    tables = [draw_crops(0, 0, i, KINDS, image.size[::-1]) for i, image in enumerate(images)]

    report = parity(images, tables)
    print(f"{'step':24} bytes that differ   largest   mean difference from Pillow {pillow_version}")
    for step, row in report.items():
        print(f"{step:24} {100 * row['differing']:15.4f} %   {row['largest']:7}   {row['mean']:.6f}")

    results = measure(folder, images, args.rounds)
    print(f"\n{len(images)} images, {processor()}\n{'provider':32} ms per image   images/s with decoding")
    for name, result in results.items():
        speedup = results["reference transforms on Pillow"]["ms_per_image"] / result["ms_per_image"]
        print(f"{name:32} {result['ms_per_image']:12.2f} ({speedup:4.1f}x) {result['images_per_s']:17.0f}")
    if args.json:
        machine = {"processor": processor(), "pillow": pillow_version, "torch": torch.__version__}
        content = {"machine": machine, "images": len(images), "parity": report, "providers": results}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
