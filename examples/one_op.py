"""DINO in a plain PyTorch loop: the crops and the loss are fused ops, everything else is stock.

python examples/one_op.py [--steps 50]
"""

import argparse
import copy

import numpy as np
import torch
from dino_train.config.presets import EMBEDDED_DATA
from dino_train.data.folder import split
from torch import nn

from dino_kernels import CropKind, dino_loss, draw_crops, ema_update_, multicrop

BATCH, OUTPUTS, SIZE = 32, 256, 32
KINDS = [CropKind(SIZE, (0.5, 1.0), blur=0.5, solarize=0.1)] * 2  # two global crops
KINDS += [CropKind(SIZE, (0.2, 0.5), blur=0.5, solarize=0.0)] * 4  # and four local ones


def convnet() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, OUTPUTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    images, _ = split(EMBEDDED_DATA)
    student = convnet()
    teacher = copy.deepcopy(student).requires_grad_(False)
    center = torch.zeros(OUTPUTS)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(steps):
        indices = torch.randint(len(images), (BATCH,)).tolist()
        pixels = [images.pixels(i) for i in indices]
        crops = [draw_crops(0, step, i, KINDS, p.shape[:2]) for i, p in zip(indices, pixels, strict=True)]
        views = torch.empty(len(KINDS), BATCH, 3, SIZE, SIZE)
        multicrop(pixels, np.stack(crops), list(views))
        loss, batch_center = dino_loss(student(views.flatten(0, 1)), teacher(views[:2].flatten(0, 1)), center)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update_(teacher.parameters(), student.parameters(), 0.99)
        center = 0.9 * center + 0.1 * batch_center
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
