"""Features of a folder of images with a trained backbone, and the nearest neighbors of some of them.

python examples/backbone.py --checkpoint runs/demo [--images FOLDER_OR_ZIP] [--queries 5]
"""

import argparse

import torch
import torch.nn.functional as F
from dino_train import load_backbone
from dino_train.common.scale import IMAGENET_MEAN, IMAGENET_STD
from dino_train.config.presets import EMBEDDED_DATA
from dino_train.data.folder import ImageFolder
from torch import Tensor

SIZE, BATCH = 32, 64


def prepared(images: ImageFolder, i: int) -> Tensor:
    """Image i [3, SIZE, SIZE], normalized by ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(images.pixels(i)).permute(2, 0, 1)[None] / 255
    pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True)[0]
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run's folder, a checkpoint or a published .pth")
    parser.add_argument("--images", default=EMBEDDED_DATA, help="folder, .zip or .tar; default: embedded CIFAR-10")
    parser.add_argument("--limit", type=int, default=500, help="look at so many images only")
    parser.add_argument("--queries", type=int, default=5)
    options = parser.parse_args()
    backbone, images = load_backbone(options.checkpoint), ImageFolder(options.images)
    chosen = range(0, len(images), -(-len(images) // options.limit))  # evenly spread
    batches = torch.stack([prepared(images, i) for i in chosen]).split(BATCH)
    with torch.inference_mode():
        features = F.normalize(torch.cat([backbone(batch) for batch in batches]), dim=1)
    queries = torch.linspace(0, len(chosen) - 1, options.queries).long().tolist()
    for query in queries:
        similarity = features @ features[query]
        similarity[query] = -1  # not itself
        best = similarity.topk(3)
        found = ", ".join(
            f"{images.names[chosen[i]]} ({value:.2f})" for value, i in zip(*map(Tensor.tolist, best), strict=True)
        )
        print(f"{images.names[chosen[query]]}: {found}")


if __name__ == "__main__":
    main()
