"""The trained backbone compared with its baselines: random weights of its architecture, raw pixels and chance."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_train.config.options import require_least
from dino_train.evaluate.features import Cache, Features
from dino_train.evaluate.knn import knn_top
from dino_train.evaluate.linear import RATES, Probes, block_features, train_probes
from dino_train.evaluate.protocol import Frozen
from dino_train.models.vit import build_backbone

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
        size, device = self.image_size or trained.image_size, next(trained.backbone.parameters()).device
        torch.manual_seed(self.seed)
        random = build_backbone(trained.arch, patch_size=trained.patch_size, img_size=trained.image_size)
        random.to(device).eval()

        def both(cache: Cache, forward: Callable[[Tensor], Tensor], name: str) -> tuple[Features, Features]:
            extract = partial(self.extract, cache, forward=forward, name=name, size=size)
            return extract(train, what="training"), extract(val, what="held-out")

        rows = {"chance": {"knn10": 100 / len(train.classes), "linear": 100 / len(train.classes)}}
        pixels = both(self.cache(trained), raw_pixels, "raw pixels")
        rows["raw pixels"] = {"knn10": self._knn(*pixels, device), "linear": self._linear(*pixels, device)}
        for name, backbone in (("random weights", random), (trained.net, trained.backbone)):
            cache = Cache(backbone, self.folder / "features")
            tokens = both(cache, partial(block_features, backbone, 4, False), "4 blocks, average False")
            # The backbone's output is the class token of the last block, the last channels of these features.
            first, second = (replace(part, values=part.values[:, -backbone.embed_dim :]) for part in tokens)
            rows[name] = {"knn10": self._knn(first, second, device), "linear": self._linear(*tokens, device)}
        lines = [f"{'':16}k-NN (k = {K})  linear probe    top-1 in % of {len(val)} held-out images"]
        lines += [f"{name:16}{row['knn10']:12.1f}  {row['linear']:12.1f}" for name, row in rows.items()]
        self.report({"protocol": "baselines", "train": len(train), "val": len(val), **rows}, "\n".join(lines))

    def _knn(self, train: Features, val: Features, device: torch.device) -> float:
        queries, found = F.normalize(val.values, dim=1).to(device), F.normalize(train.values, dim=1)
        top = knn_top(found, train.labels, queries, val.labels, ks=[K], classes=len(train.classes))
        return top[K]["top1"]

    def _linear(self, train: Features, val: Features, device: torch.device) -> float:
        rates = [rate * self.batch_size / 256 for rate in RATES]
        probes = Probes(train.values.shape[1], len(train.classes), rates, self.seed, device)
        train_probes(probes, train, self.epochs, self.batch_size, self.seed)
        return max(values["top1"] for values in probes.accuracies(val.values, val.labels))
