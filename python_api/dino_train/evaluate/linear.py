"""Linear classification of frozen features (`eval_linear.py`), with many learning rates at once (as in DINOv2)."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_train.common import checkpoint
from dino_train.data.folder import ImageFolder, parts
from dino_train.data.loader import BadImages, require_batch
from dino_train.data.stats import suited
from dino_train.evaluate.features import Features
from dino_train.evaluate.images import training_loader
from dino_train.evaluate.metrics import accuracy, label_ranks
from dino_train.evaluate.protocol import Frozen, log_skipped, require_labels
from dino_train.models.plain_vit import ViT
from dino_train.models.weights import Backbone, Trained, load_linear

# For a batch of 256. The grid of DINOv2, and larger rates for data sets of a few thousand images.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
REFERENCE_RATE = 0.001  # eval_linear.py:262
MOMENTUM = 0.9
TEXT = "top-1 {top1:.2f} %  top-5 {top5:.2f} %"


@torch.no_grad()
def block_features(backbone: nn.Module, blocks: int, avgpool: bool, pixels: Tensor) -> Tensor:
    """Concatenated class tokens of a ViT's last blocks, optionally with the mean patch token (eval_linear.py:171-177).

    Args:
        blocks: number of blocks, at most all blocks of the ViT. For a ResNet, its features are returned.
        avgpool: whether to add the mean of the last block's patch tokens. Its channels are interleaved with those of
            the last class token, as in the reference and its published classifiers.
        pixels: [B, 3, h, w].

    Returns:
        [B, (blocks + avgpool) * C].
    """
    if not isinstance(backbone, ViT):
        return backbone(pixels)
    maps = backbone.features(pixels, min(blocks, len(backbone.blocks)))
    parts = [tokens[:, 0] for tokens in maps]
    if avgpool:
        parts[-1] = torch.stack((parts[-1], maps[-1][:, 1:].mean(dim=1)), dim=2).flatten(1)
    return torch.cat(parts, dim=1)


def n_features(backbone: Backbone, blocks: int, avgpool: bool) -> int:
    """Length of `block_features`."""
    parts = min(blocks, len(backbone.blocks)) + avgpool if isinstance(backbone, ViT) else 1
    return parts * backbone.embed_dim


class Probes:
    """G linear classifiers of the same features with different learning rates, trained as one layer.

    Equivalent to G classifiers trained separately by SGD with momentum 0.9: their gradients are independent. All have
    the same initial weights, normal with a standard deviation of 0.01, and zero biases (eval_linear.py:227).

    Args:
        dim, classes: sizes C and K of a classifier.
        rates: learning rates [G].
        seed: of the initial weights.
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
        """One update of all classifiers with `factor` times their learning rates; returns their losses [G]."""
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
        """Top-1 and top-5 of each classifier, in percent; `features` and `labels` may be on another device."""
        device = self.rates.device
        ranks = []
        for x, y in zip(features.split(1024), labels.split(1024), strict=True):
            scores = self.scores(x.to(device)).unbind(1)
            ranks.append(torch.stack([label_ranks(each, y.to(device)) for each in scores]))
        return [accuracy(row) for row in torch.cat(ranks, dim=1)]

    def state(self) -> dict[str, Any]:
        """State for `load_state` to continue the training."""
        return {"weight": self.weight.detach(), "bias": self.bias.detach(), "velocity": self.velocity}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        for own, saved in zip(self._tensors, (state["weight"], state["bias"], *state["velocity"]), strict=True):
            own.copy_(saved)

    @property
    def _tensors(self) -> list[Tensor]:
        return [self.weight, self.bias, *self.velocity]


def cosine(epoch: int, epochs: int) -> float:
    """Factor of the learning rate in an epoch: a cosine from 1 to 0 (eval_linear.py:109)."""
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def train_probes(probes: Probes, features: Features, epochs: int, batch_size: int, seed: int) -> None:
    """Train on extracted features, in an order determined by the seed."""
    from tqdm import tqdm

    device = probes.rates.device
    generator = torch.Generator().manual_seed(seed)
    for epoch in tqdm(range(epochs), "linear", disable=None, unit="epoch", leave=False):
        for rows in torch.randperm(len(features.labels), generator=generator).split(batch_size):
            x, labels = features.values[rows].to(device), features.labels[rows].to(device)
            probes.step(x, labels, cosine(epoch, epochs))


@dataclass(kw_only=True)
class Linear(Frozen):
    """A linear classifier of frozen features, with the best of a grid of learning rates (eval_linear.py).

    Features of center crops are extracted once; classifiers for all learning rates are trained on them together. The
    best one is chosen on the held-out images, so its accuracy is slightly optimistic if there are few of them.
    """

    reference: bool = False
    """The reference's protocol: one learning rate, 0.001, and new random crops and flips in each epoch. After an
    interruption, the same command continues from the last complete epoch."""
    linear_weights: Path | None = None
    """A published linear classifier of the reference: it is evaluated without training on val/ (or on all images if
    there is no val/), whose sorted class folders must be the classes that it was trained on."""
    lrs: tuple[float, ...] | None = None
    """Learning rates for a batch of 256, scaled with the batch. Default: 16 from 1e-5 to 1."""
    epochs: int = 100
    """Passes over the training images."""
    n_last_blocks: int | None = None
    """Number of last blocks of a ViT whose class tokens are concatenated. Default: 4, or 1 for ViT-B."""
    avgpool_patchtokens: bool | None = None
    """Whether the mean patch token is added. Default: for ViT-B only."""
    seed: int = 0
    """Seed of the initial weights, the order of the images and the random crops."""

    def check(self) -> None:
        super().check()
        self.lrs = self.lrs or ((REFERENCE_RATE,) if self.reference else RATES)
        if not all(0 < rate < math.inf for rate in self.lrs) or self.epochs < 1 or (self.n_last_blocks or 1) < 1:
            raise ValueError(
                "lrs must be above 0, epochs and n_last_blocks at least 1, "
                f"got {self.lrs}, {self.epochs} and {self.n_last_blocks}"
            )

    def run(self) -> None:
        self.check()
        trained = self.load()
        large = trained.arch == "vit_base"
        blocks = self.n_last_blocks or (1 if large else 4)
        avgpool = large if self.avgpool_patchtokens is None else self.avgpool_patchtokens
        forward = partial(block_features, trained.backbone, blocks, avgpool)
        name, size = f"{blocks} blocks, average {avgpool}", self.image_size or trained.image_size
        cache = self.cache(trained)
        extract = partial(self.extract, cache, forward=forward, name=name, size=size)
        dim = n_features(trained.backbone, blocks, avgpool)
        if self.linear_weights:
            self._evaluate(self.linear_weights, trained, dim, extract)
            return
        train, val = self.split(trained)
        held_out = extract(val, what="held-out")
        device = next(trained.backbone.parameters()).device
        assert self.lrs is not None
        rates = [rate * self.batch_size / 256 for rate in self.lrs]
        probes = Probes(dim, len(train.classes), rates, self.seed, device)
        if self.reference:
            settings = f"{self.lrs} {self.epochs} {self.batch_size} {self.seed}"
            path = cache.path(train, kind=f"{self.kind(name, size)}, random crops, {settings}", title="linear")
            count = self._train_on_crops(train, probes, forward, size, path.with_suffix(".pt"))
        else:
            features = extract(train, what="training")
            train_probes(probes, features, self.epochs, self.batch_size, self.seed)
            count = len(features.paths)
        self._report(probes.accuracies(held_out.values, held_out.labels), count, len(held_out.paths))

    def _report(self, accuracies: list[dict[str, float]], train: int, val: int) -> None:
        assert self.lrs is not None
        found: list[dict[str, Any]] = [
            {"lr": rate, **values} for rate, values in zip(self.lrs, accuracies, strict=True)
        ]
        best = max(found, key=lambda values: values["top1"])
        text = "lr {lr:g}: " + TEXT
        lines = [text.format_map(values) for values in found]
        self.report(
            {"protocol": "linear", "train": train, "val": val, "best": best, "rates": found},
            "\n".join([*lines, f"best: {text.format_map(best)}"] if len(lines) > 1 else lines),
        )

    def _train_on_crops(
        self, images: ImageFolder, probes: Probes, forward: Callable[[Tensor], Tensor], size: int, path: Path
    ) -> int:
        """Train on random crops, with a checkpoint per epoch at `path`; an incomplete last batch is dropped."""
        from tqdm import tqdm

        device = probes.rates.device
        bad = BadImages(len(images), 0)
        require_batch(len(images), self.batch_size)
        steps = len(images) // self.batch_size
        first, total = self._resume(path, probes) * steps, self.epochs * steps
        loader = training_loader(
            images, size, self.batch_size, self.num_workers, seed=self.seed, start_step=first, total_steps=total
        )
        batches = tqdm(loader, "linear", initial=first, total=total, disable=None, unit="batch", leave=False)
        for step, (pixels, labels, _, unreadable) in enumerate(batches, first):
            bad.add(unreadable)
            epoch, place = divmod(step, steps)
            if len(pixels):
                x = forward(pixels.to(device, non_blocking=True))
                probes.step(x, labels.to(device), cosine(epoch, self.epochs))
            if place == steps - 1:
                self._keep(path, probes, epoch + 1)
        log_skipped(bad, "training")
        return len(images) - bad.count

    def _keep(self, path: Path, probes: Probes, epochs: int) -> None:
        try:
            checkpoint.save({"epochs": epochs, **probes.state()}, path)
        except checkpoint.CheckpointError as error:
            logging.warning("%s; an interruption would lose %d epochs", error, epochs)

    def _resume(self, path: Path, probes: Probes) -> int:
        """Load the state of an interrupted training; returns the number of epochs already trained."""
        if not path.exists():
            return 0
        try:
            state = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            logging.warning("%s; starting again", error)
            return 0
        probes.load_state(state)
        logging.warning("continuing after %d of %d epochs, saved in %s", state["epochs"], self.epochs, path)
        return state["epochs"]

    def _evaluate(self, path: Path, trained: Trained, dim: int, extract: Callable[..., Features]) -> None:
        """Evaluate a published classifier on the held-out images."""
        linear = load_linear(path)
        images = ImageFolder(self.images(trained))
        images = images.scaled(suited(images, trained.scale, self.num_workers))
        images.log_notes()
        found = parts(images)
        if held := [*found.get("val", ()), *found.get("test", ())]:
            images = images.below(held[0])
        require_labels({"held-out": images})
        if (linear.in_features, linear.out_features) != (dim, len(images.classes)):
            raise ValueError(
                f"{path} has {linear.out_features} classes and {linear.in_features} features, but "
                f"{images.path} has {len(images.classes)} class folders and {trained.arch} gives {dim} features: "
                "expected the classes, backbone, --n-last-blocks and --avgpool-patchtokens that it was trained with"
            )
        held_out = extract(images, what="held-out")
        with torch.no_grad():
            blocks = zip(held_out.values.split(1024), held_out.labels.split(1024), strict=True)
            values = accuracy(torch.cat([label_ranks(linear(x), labels) for x, labels in blocks]))
        self.report(
            {"protocol": "linear", "val": len(held_out.paths), "linear_weights": str(path), **values},
            TEXT.format_map(values),
        )
