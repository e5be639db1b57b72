"""Training methods: what differs between frameworks of self-supervised learning, one file each.

A method owns two networks, a loss and what it remembers from step to step. Crops, micro-batches, ranks, schedules,
optimizer, moving average, checkpoints and evaluation are the same for all of them (`dino_train.engine`).
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dino_kernels import sinkhorn_center
from dino_train.common import parallel
from dino_train.config.pretrain import PretrainConfig
from dino_train.models.resnet import RESNETS, ResNet
from dino_train.models.vit import Net, VisionTransformer, build_backbone

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """What a micro-batch gives: a loss, of which the mean over micro-batches and ranks is minimized; `told`, float32
    [n], averaged likewise, n may be 0; `kept`, rows of this rank, those of all micro-batches one after the other.
    `told` and `kept` have no gradient."""

    loss: Tensor
    told: Tensor
    kept: Tensor


class Method:
    """One training method.

    Attributes:
        evaluated: which network is evaluated and exported.
        student, teacher: set by the constructor, on the CPU, with parameters of the same names in the same order. The
            teacher starts as a copy of the student and follows it by its moving average.
        phase: call it with a name when a phase of the step has been queued; benchmarks measure the time between calls.
    """

    evaluated: ClassVar[Literal["teacher", "student"]] = "teacher"
    student: Net
    teacher: Net

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        """A method then builds the student, the teacher, and its state on `device`, in this order of random numbers.
        The state is only written in place: a CUDA graph holds its addresses."""
        self.config, self.device, self.dtype = config, device, config.dtype(device)
        self.phase: Callable[[str], None] = lambda name: None

    def build_backbone(self, drop_path_rate: float, **options: Any) -> VisionTransformer | ResNet:
        """The backbone that the configuration asks for; options are further arguments of a ViT."""
        c = self.config
        return build_backbone(
            c.arch,
            patch_size=c.patch_size,
            img_size=c.global_crops_size,
            drop_path_rate=drop_path_rate,
            channels=c.channels,
            registers=c.registers,
            layer_scale=c.layer_scale or None,
            **options,
        )

    def sinkhorn(self, logits: Tensor, temp: Tensor, counted: Tensor | None = None) -> Tensor:
        """Center [K] by which softmax((logits - center) / temp) is balanced over the rows of all ranks; of those that
        are `counted`, bool [R], where given (paper of SwAV, section 3.1)."""
        return sinkhorn_center(
            logits,
            temp=temp,
            iterations=self.config.sinkhorn_iterations,
            counted=counted,
            combine=parallel.combine_mass(temp),
        )

    def warn_of_few_rows(self, rows: int) -> None:
        """Sinkhorn-Knopp over few rows gives targets that are nearly flat or one-hot."""
        rows *= parallel.size() * self.config.micro_batch
        rows += self.config.queue_size
        if 10 * rows < self.config.out_dim:
            logger.warning(
                "Sinkhorn-Knopp balances %d rows a step over %d outputs; with less than a tenth it learns little: take "
                "a smaller --out-dim or a larger batch%s",
                rows,
                self.config.out_dim,
                " or --queue-size" if self.config.method == "swav" else "",
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """For networks without layers of `dino_kernels.nn`, whose weights have no copies in bfloat16."""
        if self.dtype == torch.bfloat16 and self.config.arch in RESNETS:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def frozen(self, epoch: int) -> list[nn.Module]:
        """Parts of the student that are not trained in this epoch."""
        backbone = self.student.backbone
        if self.config.freeze_patch_embed and isinstance(backbone, VisionTransformer):
            return [backbone.patch_embed]
        return []

    def stage(self, step: int, steps_per_epoch: int) -> object:
        """Values of the host on which `forward` and `after` depend, such as whether a queue is full. Each other value
        is captured as a new CUDA graph."""
        return None

    def forward(self, crops: list[Tensor], teacher_temp: Tensor) -> Part:
        """The loss of a micro-batch of B images. No value is read on the host: on a GPU it is captured in a CUDA graph.

        Args:
            crops: V tensors [B, channels, h, w] float32, the two global crops first; then masks, bool [B, 2, patches],
                if the configuration has a `mask_kind`.
            teacher_temp: 0-d, on the device, by the schedule.
        """
        raise NotImplementedError

    def after(self, told: Tensor, kept: Tensor, refused: Tensor) -> None:
        """Update the state in place, after the optimizer's step. No value is read on the host.

        Args:
            told: mean over micro-batches and ranks. kept: rows of all micro-batches of this rank.
            refused: 0-d bool: a value was not finite, the step has changed no weight and must change no state.
        """

    def health(self, kept: Tensor, teacher_temp: float) -> dict[str, float]:
        """Numbers for the log. `spread`, or the entropies of `dino_train.methods.dino.entropies`, must be among them: a
        collapse is seen by these (`dino_train.common.metrics.collapse_signs`)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds besides networks and optimizer: dicts of tensors, for others than DINO "method"."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint with the keys of `state_dict`."""


def build_method(config: PretrainConfig, device: torch.device) -> Method:
    """The method that a configuration asks for."""
    module = importlib.import_module(f"dino_train.methods.{config.method}")
    return getattr(module, config.method.capitalize())(config, device)
