"""Linear classification of frozen features (`eval_linear.py`), many learning rates at once (as DINOv2 does)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from dino_train.config import Switch
from dino_train.data import ImageFolder
from dino_train.evaluate.features import Cache, Features
from dino_train.evaluate.images import training_loader
from dino_train.evaluate.metrics import accuracy
from dino_train.evaluate.protocol import Frozen, labelled
from dino_train.loader import BadImages
from dino_train.model import VisionTransformer

# For a batch of 256. DINOv2's grid, and what a few thousand images need beyond it.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
REFERENCE_RATE = 0.001  # eval_linear.py:262
MOMENTUM = 0.9


@torch.no_grad()
def block_features(backbone: nn.Module, blocks: int, avgpool: bool, pixels: Tensor) -> Tensor:
    """Class tokens of a ViT's last blocks side by side, then the mean patch token (eval_linear.py:171-177).

    Args:
        blocks: how many of them; those that the ViT has, where it has fewer. A ResNet's features are taken as they are.
        avgpool: whether the mean of the last block's patch tokens is added.
        pixels: [B, 3, h, w].

    Returns:
        [B, (blocks + avgpool) * C].
    """
    if not isinstance(backbone, VisionTransformer):
        return backbone(pixels)
    maps = backbone.features(pixels, min(blocks, len(backbone.blocks)))
    parts = [tokens[:, 0] for tokens in maps]
    if avgpool:
        parts.append(maps[-1][:, 1:].mean(dim=1))
    return torch.cat(parts, dim=1)


class Probes:
    """G linear classifiers of the same features, each with a learning rate of its own, trained as one layer.

    Equal to G classifiers trained alone by SGD with momentum 0.9: no gradient of one depends on another. All start
    from the same weights, normal with a standard deviation of 0.01, and biases of 0 (eval_linear.py:227).

    Args:
        dim, classes: sizes C and K of a classifier.
        rates: learning rates [G].
        seed: of the first weights.
    """

    def __init__(self, dim: int, classes: int, rates: Sequence[float], seed: int, device: torch.device) -> None:
        first = 0.01 * torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed))
        self.weight = first.repeat(len(rates), 1, 1).to(device).requires_grad_()  # [G, K, C]
        self.bias = torch.zeros(len(rates), classes, device=device).requires_grad_()  # [G, K]
        self.rates = torch.tensor(rates, device=device)
        self.velocity = [torch.zeros_like(p) for p in (self.weight, self.bias)]

    def scores(self, x: Tensor) -> Tensor:
        """[B, C] -> [B, G, K]."""
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(1, self.bias.shape)

    def step(self, x: Tensor, labels: Tensor, factor: float) -> Tensor:
        """One update of all at `factor` times their learning rates; returns their losses [G]."""
        scores = self.scores(x)
        targets = labels[:, None].expand(-1, len(self.rates))
        losses = F.cross_entropy(scores.transpose(1, 2), targets, reduction="none").mean(dim=0)
        gradients = torch.autograd.grad(losses.sum(), (self.weight, self.bias))
        with torch.no_grad():
            for parameter, gradient, velocity in zip((self.weight, self.bias), gradients, self.velocity, strict=True):
                velocity.mul_(MOMENTUM).add_(gradient)
                parameter -= (factor * self.rates).view(-1, *[1] * (parameter.dim() - 1)) * velocity
        return losses.detach()

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor) -> list[dict[str, float]]:
        """Top-1 and top-5 of each, in percent; `features` may lie on another device."""
        device = self.rates.device
        blocks = [self.scores(block.to(device)).cpu() for block in features.split(1024)]
        return [accuracy(torch.cat([block[:, g] for block in blocks]), labels) for g in range(len(self.rates))]


def cosine(epoch: int, epochs: int) -> float:
    """Factor of the learning rate in an epoch: from 1 in the first towards 0 (eval_linear.py:109)."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


@dataclass(kw_only=True)
class Linear(Frozen):
    """A linear classifier of frozen features, with the best of a grid of learning rates (eval_linear.py).

    Features of central crops are extracted once; all rates are trained on them together. Which one is best is read
    from the held-out images, so its accuracy is a little optimistic where these are few.
    """

    reference: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The reference's protocol: one learning rate, 0.001, and new random crops and flips in each epoch."""
    lrs: tuple[float, ...] | None = None
    """Learning rates for a batch of 256, scaled with the batch. Default: 16 from 1e-5 to 1."""
    epochs: int = 100
    """Passes over the training images."""
    n_last_blocks: int | None = None
    """Blocks of a ViT whose class tokens are joined. Default: 4, or 1 for ViT-B."""
    avgpool_patchtokens: Switch | None = None
    """Whether the mean patch token is added. Default: for ViT-B only."""
    seed: int = 0
    """Of the first weights, the order of the images and the random crops."""

    def check(self) -> None:
        super().check()
        self.lrs = self.lrs or ((REFERENCE_RATE,) if self.reference else RATES)
        if min(self.lrs) <= 0 or self.epochs < 1 or (self.n_last_blocks or 1) < 1:
            raise ValueError(
                "lrs must be above 0, epochs and n_last_blocks at least 1, "
                f"got {self.lrs}, {self.epochs} and {self.n_last_blocks}"
            )

    def run(self) -> None:
        self.check()
        from tqdm import tqdm

        assert self.lrs is not None
        trained = self.load()
        large = trained.arch == "vit_base"
        blocks = self.n_last_blocks or (1 if large else 4)
        avgpool = large if self.avgpool_patchtokens is None else self.avgpool_patchtokens
        size = self.image_size or trained.image_size
        forward = partial(block_features, trained.backbone, blocks, avgpool)
        extract = partial(self.extract, Cache(trained.backbone, self.folder / "features"), forward=forward, size=size)
        kind = f"{blocks} blocks, average {avgpool}"
        train, val = self.split()
        bad = labelled(train, "training")
        held_out = extract(val, kind=kind, what="held-out")
        device = next(trained.backbone.parameters()).device
        if self.reference:
            batches = self._augmented(train, bad, forward, size, device)
        else:
            batches = self._shuffled(extract(train, kind=kind, what="training"))
        rates = [rate * self.batch_size / 256 for rate in self.lrs]
        probes = Probes(held_out.values.shape[1], len(train.classes), rates, self.seed, device)
        with tqdm(total=self.epochs, desc="linear", disable=None, unit="epoch", leave=False) as progress:
            for epoch, x, labels in batches:
                progress.update(epoch - progress.n)
                probes.step(x.to(device), labels.to(device), cosine(epoch, self.epochs))
        self._report(probes.accuracies(held_out.values, held_out.labels), len(train), len(held_out.paths))

    def _report(self, accuracies: list[dict[str, float]], train: int, val: int) -> None:
        assert self.lrs is not None
        found: list[dict[str, Any]] = [
            {"lr": rate, **values} for rate, values in zip(self.lrs, accuracies, strict=True)
        ]
        best = max(found, key=lambda values: values["top1"])
        text = "lr {lr:g}: top-1 {top1:.2f} %  top-5 {top5:.2f} %"
        lines = [text.format_map(values) for values in found]
        self.report(
            {"protocol": "linear", "train": train, "val": val, "best": best, "rates": found},
            "\n".join([*lines, f"best: {text.format_map(best)}"] if len(lines) > 1 else lines),
        )

    def _shuffled(self, features: Features) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(epoch, features, labels) of each batch, in an order that follows from the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.epochs):
            for rows in torch.randperm(len(features.labels), generator=generator).split(self.batch_size):
                yield epoch, features.values[rows], features.labels[rows]

    def _augmented(
        self, images: ImageFolder, bad: BadImages, forward: Callable[[Tensor], Tensor], size: int, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(epoch, features, labels) of each batch of random crops; an epoch's last images that fill none are left."""
        steps = len(images) // self.batch_size
        total = self.epochs * steps
        loader = training_loader(
            images, size, self.batch_size, self.num_workers, seed=self.seed, start_step=0, total_steps=total
        )
        for step, (pixels, labels, _, unreadable) in enumerate(loader):
            bad.add(unreadable)
            if len(pixels):
                yield step // steps, forward(pixels.to(device, non_blocking=True)), labels
