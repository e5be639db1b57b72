"""Supervised fine-tuning of the whole backbone with a linear head.

The recipe of BEiT and MAE without mixup and cutmix: AdamW, layer-wise learning rate decay, label smoothing, drop path,
random crops and flips.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_train.common import checkpoint
from dino_train.common.files import locked
from dino_train.common.metrics import Metrics
from dino_train.common.scale import scale_settings
from dino_train.config.options import require_least
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import BadImages, eval_loader
from dino_train.evaluate.features import extract, weights_digest
from dino_train.evaluate.images import training_loader
from dino_train.evaluate.metrics import accuracy, label_ranks
from dino_train.evaluate.protocol import Classification, log_skipped
from dino_train.models.plain_vit import ViT
from dino_train.models.vit import VisionTransformer
from dino_train.models.weights import Trained

WARMUP = 0.05  # fraction of the steps
MIN_FACTOR = 1e-3  # final learning rate relative to the maximum


class Classifier(nn.Module):
    """A backbone and a linear layer on its features: images [B, 3, h, w] to logits [B, classes]."""

    def __init__(self, backbone: nn.Module, dim: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def depth_of(name: str, layers: int) -> int:
    """Layer index of a parameter: 0 before the blocks (or the stages of a ResNet), `layers` + 1 after them."""
    parts = name.split(".")
    if parts[:2] == ["backbone", "blocks"]:
        return int(parts[2]) + 1
    if parts[0] == "backbone" and parts[1].startswith("layer"):
        return int(parts[1].removeprefix("layer"))
    return layers + 1 if parts[0] == "head" or parts[1] == "norm" else 0


def parameter_groups(model: Classifier, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: "scale" is layer_decay^(number of later layers). Weight decay is applied to all
    tensors of two or more dimensions but the class token, registers and the position embedding."""
    backbone = model.backbone
    layers = len(backbone.blocks) if isinstance(backbone, ViT) else 4
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        depth = depth_of(name, layers)
        decayed = parameter.dim() > 1 and not name.endswith(("cls_token", "register_tokens", "pos_embed"))
        scale = layer_decay ** (layers + 1 - depth)
        group = {"params": [], "scale": scale, "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault((depth, decayed), group)["params"].append(parameter)
    return list(groups.values())


def rate_factor(step: int, total: int) -> float:
    """Factor of the learning rate: linear warm-up during the first 5 % of the steps, then a cosine to 0.001."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    fall = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return MIN_FACTOR + (1 - MIN_FACTOR) * fall


@dataclass(kw_only=True)
class Finetune(Classification):
    """Supervised fine-tuning of the whole backbone; the result is a checkpoint like that of a pretraining run."""

    output_dir: Path | None = None
    """Folder for last.pt and metrics.jsonl. Default: finetune/ next to the checkpoint."""
    resume: bool = False
    """Continue from last.pt in output_dir, if it exists, after the last complete epoch."""
    epochs: int = 100
    """Passes over the training images."""
    lr: float = 5e-4
    """Learning rate of the head for a batch of 256, scaled with the batch."""
    layer_decay: float = 0.75
    """Layer-wise decay: the learning rate of a layer is this times that of the next layer."""
    weight_decay: float = 0.05
    """Weight decay of AdamW; not applied to biases, norms, class token and position embedding."""
    drop_path_rate: float = 0.1
    """Drop path probability in the last block of a ViT; it increases linearly from 0 in the first block."""
    label_smoothing: float = 0.1
    """Fraction of the target probability that is distributed over all classes."""
    seed: int = 0
    """Seed of the head, the order of the images, the random crops and drop path."""

    def check(self) -> None:
        super().check()
        require_least(self, seed=0)
        fine = self.epochs >= 1 and 0 < self.lr < math.inf and 0 < self.layer_decay <= 1 and self.weight_decay >= 0
        if not (fine and 0 <= self.drop_path_rate < 1 and 0 <= self.label_smoothing <= 1):
            raise ValueError(
                "expected epochs of at least 1, lr above 0, layer_decay in (0, 1], weight_decay of at least 0, "
                "drop_path_rate in [0, 1) and label_smoothing in [0, 1], got "
                f"{self.epochs}, {self.lr}, {self.layer_decay}, {self.weight_decay}, {self.drop_path_rate} and "
                f"{self.label_smoothing}"
            )

    def run(self) -> None:
        self.check()
        trained = self.load()
        train, val = self.split(trained)
        bad, bad_held_out = BadImages(len(train), 0), BadImages(len(val), 0)
        tuning = _Tuning(self, trained, train, val)
        tuning.folder.mkdir(parents=True, exist_ok=True)
        with locked(tuning.folder / "lock", tuning.folder):
            values = tuning.train(bad, bad_held_out)
        log_skipped(bad, "training")
        log_skipped(bad_held_out, "held-out")
        self.report(
            {
                "protocol": "finetune",
                "train": len(train) - bad.count,
                "val": len(val) - bad_held_out.count,
                "checkpoint": str(tuning.path),
                **values,
            },
            f"top-1 {values['top1']:.2f} %  top-5 {values['top5']:.2f} %  {tuning.path}",
        )


class _Tuning:
    """One fine-tuning run: its state and its loop."""

    def __init__(self, options: Finetune, trained: Trained, train: ImageFolder, val: ImageFolder) -> None:
        self.options, self.trained, self.train_images, self.val = options, trained, train, val
        self.size = options.image_size or trained.image_size
        self.steps = len(train) // options.batch_size
        self.folder = options.output_dir or options.folder / "finetune"
        self.path = self.folder / checkpoint.LAST
        backbone = trained.backbone
        self.digest = weights_digest(backbone)
        if isinstance(backbone, VisionTransformer):
            backbone.drop_path_rate = options.drop_path_rate
        self.device = next(backbone.parameters()).device
        torch.manual_seed(options.seed)
        dim: int = backbone.embed_dim  # type: ignore[assignment]
        self.model = Classifier(backbone, dim, len(train.classes)).to(self.device)
        groups = parameter_groups(self.model, options.layer_decay, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr)
        self.epoch = self._resume() if options.resume and checkpoint.exists(self.folder) else self._start_new()

    def train(self, bad: BadImages, bad_held_out: BadImages) -> dict[str, float]:
        """Train the remaining epochs; returns the final accuracy in percent."""
        from tqdm import tqdm

        options = self.options
        first, total = self.epoch * self.steps, options.epochs * self.steps
        loader = training_loader(
            self.train_images,
            self.size,
            options.batch_size,
            options.num_workers,
            seed=options.seed,
            start_step=first,
            total_steps=total,
        )
        metrics = Metrics(self.folder, first)
        values: dict[str, float] = {}
        losses: list[Tensor] = []
        try:
            if first == total:
                values = self._evaluate(bad_held_out)
            with tqdm(
                loader, "finetune", initial=first, total=total, disable=None, unit="batch", leave=False
            ) as batches:
                for step, (pixels, labels, _, unreadable) in enumerate(batches, first):
                    bad.add(unreadable)
                    if step % self.steps == 0:
                        torch.manual_seed(options.seed + 1 + self.epoch)  # the same drop path in a resumed run
                    if len(pixels):
                        losses.append(self._step(pixels, labels, rate_factor(step, total)))
                    if (step + 1) % self.steps == 0:
                        loss = torch.stack(losses).mean().item() if losses else math.nan
                        if not math.isfinite(loss):
                            raise ValueError(f"the loss is {loss} in epoch {self.epoch + 1}; try a lower --lr")
                        losses.clear()
                        values = self._evaluate(bad_held_out)
                        self.epoch += 1
                        metrics.write(step + 1, epoch=self.epoch, loss=loss, **values)
                        self._save()
        except KeyboardInterrupt:
            logging.warning("stopped in epoch %d; --resume continues with it", self.epoch + 1)
            raise
        finally:
            metrics.close()
        return values

    def _step(self, pixels: Tensor, labels: Tensor, factor: float) -> Tensor:
        options = self.options
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * options.batch_size / 256 * factor * group["scale"]
        scores = self.model(pixels.to(self.device, non_blocking=True))
        loss = F.cross_entropy(scores, labels.to(self.device), label_smoothing=options.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _evaluate(self, bad: BadImages) -> dict[str, float]:
        loader = eval_loader(self.val, self.size, self.options.batch_size, self.options.num_workers)
        scores, labels, _ = extract(self.model, self.model, loader, len(self.val), bad, "held-out")
        if not len(scores):
            raise ValueError(f"none of {len(self.val)} held-out images in {self.val.path} could be read")
        return accuracy(label_ranks(scores, labels))

    @property
    def _fixed(self) -> dict[str, Any]:
        """Options that must be the same in a resumed run."""
        options = self.options
        names = ("epochs", "lr", "layer_decay", "weight_decay", "drop_path_rate", "label_smoothing", "seed")
        own = {name: getattr(options, name) for name in (*names, "batch_size")}
        data = {"images": len(self.train_images), "classes": self.train_images.classes}
        return own | data | {"image_size": self.size, "checkpoint": self.digest}

    def _save(self) -> None:
        state = {
            # The format of a pretraining checkpoint, so that every command can load it.
            "teacher": self.model.state_dict(),
            "args": {
                "arch": self.trained.arch,
                "patch_size": self.trained.patch_size,
                "global_crops_size": self.trained.image_size,
                "data": str(self.train_images.path.absolute()),
                **scale_settings(self.train_images.scale),
            },
            "classes": self.train_images.classes,
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "finetune": self._fixed,
        }
        try:
            checkpoint.save(state, self.path, previous=self.folder / checkpoint.PREVIOUS)
        except checkpoint.CheckpointError as error:  # space may become free later
            if self.epoch == self.options.epochs:
                raise
            logging.warning("%s; training continues", error)

    def _start_new(self) -> int:
        checkpoint.require_none(self.folder)
        return 0

    def _resume(self) -> int:
        state, path = checkpoint.load_newest(self.folder)
        saved = state.get("finetune")
        if saved is None:
            raise ValueError(f"{path} is not from fine-tuning and cannot be resumed")
        for name, value in self._fixed.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"the run in {self.folder} has {name} {saved.get(name)}, not {value}: "
                    "pass the same settings to resume, or another --output-dir"
                )
        self.model.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["epoch"]
