"""An own model and its exponential moving average: ema_update_ in a supervised loop.

python examples/own_model.py [--steps 300]
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from dino_train.config.presets import EMBEDDED_DATA
from dino_train.data.folder import ImageFolder, split
from torch import Tensor, nn

from dino_kernels import ema_update_


class MyModel(nn.Module):
    """Mean-pooled patches of 4 x 4 pixels through an MLP."""

    def __init__(self, classes: int, width: int = 128) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.mlp(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


def tensors(images: ImageFolder) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([torch.from_numpy(images.pixels(i)) for i in range(len(images))])
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(images.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    train, held_out = split(EMBEDDED_DATA)
    (images, labels), (test_images, test_labels) = tensors(train), tensors(held_out)
    model = MyModel(len(train.classes))
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update_(average.parameters(), model.parameters(), 0.98)
    for name, net in (("model", model), ("average", average)):
        correct = (net(test_images).argmax(1) == test_labels).float().mean()
        print(f"{name}: {100 * correct:.1f} % of {len(test_images)} held-out images")


if __name__ == "__main__":
    main()
