"""Common definitions of the cases of gpu.py: reference sizes, a case, random inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from dino_kernels import CropKind

Result = Tensor | Sequence[Tensor]
Provider = Callable[[], Sequence[Result]]


@dataclass(frozen=True)
class Sizes:
    """By default the reference sizes: ViT-S/16, 64 images per GPU, 2 crops of 224 pixels and 8 of 96."""

    images: int = 64
    views: int = 10
    outputs: int = 65536
    bottleneck: int = 256
    hidden: int = 2048
    width: int = 384
    heads: int = 6
    depth: int = 12
    tokens: tuple[int, int, int] = (197, 37, 785)  # of crops of 224 and 96 pixels, and of 224 with patch size 8

    def base(self) -> "Sizes":
        """ViT-B is ViT-S twice as wide."""
        return replace(self, width=2 * self.width, heads=2 * self.heads)


# The crops of an image at the reference sizes
CROPS = (
    CropKind(224, (0.4, 1.0), blur=1.0, solarize=0.0),
    CropKind(224, (0.4, 1.0), blur=0.1, solarize=0.2),
    *[CropKind(96, (0.05, 0.4), blur=0.5, solarize=0.0)] * 8,
)

TOY = Sizes(images=2, views=4, outputs=200, bottleneck=16, hidden=24, width=32, heads=2, depth=1, tokens=(9, 5, 17))


@dataclass
class Case:
    """One op at one shape and dtype.

    bytes and flops: minimum that any implementation must move and compute.
    results: names of the results of each provider; a list of tensors counts as one.
    exact: the same results in float64.
    """

    op: str
    shape: str
    dtype: str
    bytes: int
    flops: int
    results: tuple[str, ...]
    providers: dict[str, Provider]
    exact: Provider


def compiled(function: Callable) -> Callable:
    """torch.compile of a peer at its first call. Without a GPU it is only traced: compiling for a CPU takes minutes."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    made = cache(lambda: torch.compile(function, backend=backend))  # imports the compiler
    return lambda *arguments: made()(*arguments)


class Random:
    """Random numbers on a device; on the meta device, tensors without values."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return self._empty(shape).normal_(generator=self.generator) if self.generator else self._empty(shape)

    def uniform(self, *shape: int) -> Tensor:
        return self._empty(shape).uniform_(generator=self.generator) if self.generator else self._empty(shape)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=self.device)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def differentiated(op: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of `op` and the gradients of its inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = op(*inputs)
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, inputs, grads)]
