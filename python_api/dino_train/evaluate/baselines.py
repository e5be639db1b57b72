"""The trained backbone compared with its baselines: random weights of its architecture, raw pixels and chance."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_train.common.device import pick_device
from dino_train.config.options import require_least
from dino_train.data.folder import ImageFolder
from dino_train.evaluate.features import Cache, Features
from dino_train.evaluate.knn import knn_top
from dino_train.evaluate.linear import RATES, Probes, block_features, train_probes
from dino_train.evaluate.protocol import Frozen
from dino_train.models.names import registers_of
from dino_train.models.weights import Backbone, Trained, build

K = 10
PIXELS = 32  # side to which images are downscaled if their pixels are the features


def raw_pixels(pixels: Tensor) -> Tensor:
    """[B, 3, h, w] -> [B, 3 * side * side], with side = min(h, w, 32)."""
    side = min(PIXELS, *pixels.shape[2:])
    return F.adaptive_avg_pool2d(pixels, side).flatten(1)


@dataclass(kw_only=True)
class Baselines(Frozen):
    """k-NN (k = 10) and linear probe accuracy of the backbone, of random weights and of raw pixels, and chance level.

    The probe uses the class tokens of the last four blocks and the best of the learning rates of `evaluate linear`.
    """

    epochs: int = 30
    """Passes of the linear probe over the training images."""
    seed: int = 0
    """Seed of the random weights and of the probes."""

    def check(self) -> None:
        super().check()
        require_least(self, epochs=1)

    def run(self) -> None:
        self.check()
        trained = self.load()
        train, val = self.split(trained)
        chance = 100 / len(train.classes)
        rows = {"chance": {"knn10": chance, "linear": chance}, "raw pixels": self.of_pixels(trained, train, val)}
        for name, backbone in (("random weights", self.untrained(trained)), (trained.net, trained.backbone)):
            rows[name] = self.of_backbone(trained, backbone, train, val)
        lines = [f"{'':16}k-NN (k = {K})  linear probe    top-1 in % of {len(val)} held-out images"]
        lines += [f"{name:16}{row['knn10']:12.1f}  {row['linear']:12.1f}" for name, row in rows.items()]
        self.report({"protocol": "baselines", "train": len(train), "val": len(val), **rows}, "\n".join(lines))

    def untrained(self, trained: Trained) -> Backbone:
        """A backbone of the same architecture with random weights."""
        torch.manual_seed(self.seed)
        backbone = build(
            trained.arch,
            registers=registers_of(trained.backbone.state_dict()),
            patch_size=trained.patch_size,
            img_size=trained.image_size,
            channels=trained.backbone.channels,
        )
        return backbone.to(next(trained.backbone.parameters()).device).eval()

    def of_pixels(self, trained: Trained, train: ImageFolder, val: ImageFolder) -> dict[str, float]:
        """Top-1 in % by the pixels of val's images: "knn10" and "linear"."""
        return self._accuracies(self._features(self.cache(trained), raw_pixels, "raw pixels", trained, train, val), -1)

    def of_backbone(
        self, trained: Trained, backbone: Backbone, train: ImageFolder, val: ImageFolder
    ) -> dict[str, float]:
        """Top-1 in % by a backbone's features: "knn10" and "linear"."""
        cache = Cache(backbone, self.folder / "features")
        forward = partial(block_features, backbone, 4, False)
        tokens = self._features(cache, forward, "4 blocks, average False", trained, train, val)
        return self._accuracies(tokens, backbone.embed_dim)

    def _features(
        self,
        cache: Cache,
        forward: Callable[[Tensor], Tensor],
        name: str,
        trained: Trained,
        train: ImageFolder,
        val: ImageFolder,
    ) -> tuple[Features, Features]:
        size = self.image_size or trained.image_size
        extract = partial(self.extract, cache, forward=forward, name=name, size=size)
        return extract(train, what="training"), extract(val, what="held-out")

    def _accuracies(self, features: tuple[Features, Features], last: int) -> dict[str, float]:
        """k-NN by the last channels (-1: all), which are the backbone's output, and a probe of all of them."""
        device, (train, val) = pick_device(self.device), features
        ends = [part if last < 0 else replace(part, values=part.values[:, -last:]) for part in features]
        return {"knn10": self._knn(ends[0], ends[1], device), "linear": self._linear(train, val, device)}

    def _knn(self, train: Features, val: Features, device: torch.device) -> float:
        queries, found = F.normalize(val.values, dim=1).to(device), F.normalize(train.values, dim=1)
        top = knn_top(found, train.labels, queries, val.labels, ks=[K], classes=len(train.classes))
        return top[K]["top1"]

    def _linear(self, train: Features, val: Features, device: torch.device) -> float:
        rates = [rate * self.batch_size / 256 for rate in RATES]
        probes = Probes(train.values.shape[1], len(train.classes), rates, self.seed, device)
        train_probes(probes, train, self.epochs, self.batch_size, self.seed)
        return max(values["top1"] for values in probes.accuracies(val.values, val.labels))
