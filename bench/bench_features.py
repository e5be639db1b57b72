"""Extraction of features for k-NN from photos: images per second, compared with the reference (eval_knn.py:30-120).

    python bench/bench_features.py --photos DIR_OR_ZIP --arch vit_small

The reference decodes, resizes and crops with Pillow in worker processes and runs a plain float32 ViT; ours is the code
of `dino-train evaluate knn --precision bfloat16`. Both run from files to features, alternating; medians. Batches of 32
images of 224 pixels, two workers and two torch threads on the same cores. Without --photos, the images are mosaics of
the embedded images.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_multicrop import copies, mosaics, processor
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import BadImages, eval_loader
from dino_train.evaluate.features import extract
from dino_train.models.vit import vit
from PIL import Image
from pillow_crops import normalized, pillow_decode
from step_peers import Backbone, Setting
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_kernels.nn import hold_copies

BATCH, WORKERS, SIZE = 32, 2, 224


class Views(Dataset):
    """Resize(256), CenterCrop(224) and normalization of each image."""

    def __init__(self, images: ImageFolder) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        image = pillow_decode(self.images.read(i))
        short = min(image.size)
        width, height = (int(256 * side / short) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        return normalized(image.crop((left, top, left + SIZE, top + SIZE)))


@torch.no_grad()
def reference(images: ImageFolder, backbone: Backbone) -> Tensor:
    loader = DataLoader(Views(images), BATCH, num_workers=WORKERS)
    return torch.cat([backbone(pixels) for pixels in loader])


def ours(images: ImageFolder, backbone: torch.nn.Module) -> Tensor:
    loader = eval_loader(images, SIZE, BATCH, WORKERS)
    return extract(backbone, backbone, loader, len(images), BadImages(len(images), 0))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder, .zip or .tar of images; default: mosaics of the embedded images")
    parser.add_argument("--arch", default="vit_small", choices=["vit_nano", "vit_tiny", "vit_small", "vit_base"])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    net = vit(args.arch, patch_size=16, img_size=SIZE).eval()
    plain = Backbone(Setting(args.arch, BATCH, "cpu"), 0.0, fused=False).eval()
    plain.load_state_dict(net.state_dict())
    low = vit(args.arch, patch_size=16, img_size=SIZE).eval()
    low.load_state_dict(net.state_dict())
    hold_copies(low, torch.bfloat16)
    with tempfile.TemporaryDirectory() as temporary:
        copies(ImageFolder(args.photos), Path(temporary), args.images) if args.photos else mosaics(
            Path(temporary), args.images
        )
        images = ImageFolder(temporary)
        providers: dict[str, Callable[[], Tensor]] = {
            "ours, bfloat16": lambda: ours(images, low),
            "ours, float32": lambda: ours(images, net),
            "reference": lambda: reference(images, plain),
        }
        rates: dict[str, list[float]] = {name: [] for name in providers}
        found: dict[str, Tensor] = {}
        for _ in range(args.rounds):
            for name, provider in providers.items():
                start = time.perf_counter()
                found[name] = provider()
                rates[name].append(len(images) / (time.perf_counter() - start))
    print(f"{args.arch}/16, {args.images} images, {processor()}")
    for name, values in rates.items():
        rate = statistics.median(values)
        similarity = torch.cosine_similarity(found[name], found["reference"]).min()
        ratio = rate / statistics.median(rates["reference"])
        print(f"{name:16} {rate:7.1f} images/s ({ratio:.1f}x)   minimum cosine to the reference {similarity:.6f}")


if __name__ == "__main__":
    main()
