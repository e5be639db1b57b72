"""What a run needs, known before its first step: memory, and disk for its checkpoints; by a short product, time.

Weights, gradients, moments and checkpoints are counted. Activations are computed from the shapes: what a ViT's blocks
save for backward (`csrc/cpu/fused_block.cpp`), plus what they work on, in which the factors are fitted to the peak
memory of runs of ViT-S, ViT-B, vit_nano and ResNet-50 on a CPU, which they meet to about 20 %.
"""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dino_kernels.nn import LayerScale, WeightNormLinear
from dino_train.common import checkpoint
from dino_train.common.machine import local_processes, memory
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner
from dino_train.models.vit import VisionTransformer

logger = logging.getLogger(__name__)
GIB = 1 << 30
LIBRARIES = 300 << 20  # Python, torch and their threads
SAVED = {"resnet50": 430, "resnet_nano": 600}  # numbers saved for backward, per pixel of the crops
TOLERANCE = 1.25
EFFICIENCY = 0.7  # of a step, relative to a product alone
LESS = "--batch-size-per-gpu, --accumulate, --precision bfloat16, --checkpoint-activations true or --local-crops-number"


@dataclass(frozen=True)
class Estimate:
    """In bytes, of one process."""

    weights: int
    activations: int
    crops: int
    checkpoint: int
    checkpoints: int  # number

    @property
    def memory(self) -> int:
        return LIBRARIES + self.weights + self.activations + self.crops

    @property
    def disk(self) -> int:
        return self.checkpoint * self.checkpoints

    def __str__(self) -> str:
        return (
            f"needs about {size(self.memory)} of memory (networks and optimizer {size(self.weights)}, activations "
            f"{size(self.activations)}, crops {size(self.crops)}) and {size(self.disk)} of disk for {self.checkpoints} "
            "checkpoints"
        )


def size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def estimate(learner: Learner) -> Estimate:
    """Of the run that a learner is of."""
    config = learner.config
    kept = config.epochs // config.saveckp_freq if config.saveckp_freq else 0
    state = learner.method.state_dict()
    tensors = [tensor for net in (learner.student, learner.teacher) for tensor in net.state_dict().values()]
    tensors += [tensor for part in state.values() for tensor in part.values()]
    trained = sum(p.numel() for group in learner.optimizer.param_groups for p in group["params"])
    return Estimate(
        weights=_weights(learner),
        activations=_activations(learner),
        crops=_crops(learner),
        checkpoint=sum(tensor.nbytes for tensor in tensors) + 4 * trained * len(learner.optimizer.buffers),
        # last.pt, previous.pt and the one that is being written.
        checkpoints=3 + (min(kept, config.keep_last) if config.keep_last else kept),
    )


def _weights(learner: Learner) -> int:
    """Of both networks, the gradients, moments and copies, and the method's state."""
    nets, flats = (learner.student, learner.teacher), (learner.student_flat, learner.teacher_flat)
    tensors: list[Tensor | None] = [tensor for flat in flats for tensor in (flat.weights, flat.grad, flat.copies)]
    tensors += learner.optimizer.buffers
    tensors += [layer.rows for net in nets for layer in net.modules() if isinstance(layer, WeightNormLinear)]
    scales = [layer for net in nets for layer in net.modules() if isinstance(layer, LayerScale)]
    tensors += [copy for scale in scales for copy in scale.copies or ()]
    tensors += [buffer for net in nets for buffer in net.buffers()]
    tensors += [tensor for part in learner.method.state_dict().values() for tensor in part.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _activations(learner: Learner) -> int:
    """Saved for backward, and the memory that the passes over them work in."""
    config, width, backbone = learner.config, learner.dtype.itemsize, learner.student.backbone
    images, sides = config.micro_batch, [kind.size for kind in config.crop_kinds]
    rows = images * len(sides)
    head = rows * (backbone.embed_dim + 4 * config.head_hidden_dim) + (rows + 2 * images) * config.out_dim
    if not isinstance(backbone, VisionTransformer):
        saved = images * sum(side**2 for side in sides) * SAVED[config.arch]
        return int(width * (1.4 * saved + head))
    c, depth = backbone.embed_dim, len(backbone.blocks)
    tokens = images * sum(backbone.lead + (side // backbone.patch_size) ** 2 for side in sides)
    # The norms' results, queries, keys, values, heads and hidden channels; the residual stream twice, in float32.
    block = tokens * c * ((6 + (0 if _recomputed(learner) else 4)) * width + 8)
    saved = (depth - 1) * block  # the last block is of class tokens alone
    if (masks := config.mask_kind) is not None:  # and with masks of all; the teacher's head sees all patches
        saved += block
        head += masks.most * (c + 4 * config.head_hidden_dim + 2 * (config.patch_out_dim or config.out_dim))
        head += 2 * images * masks.side**2 * 2 * config.head_hidden_dim
    if config.checkpoint_activations:
        saved = depth * tokens * c * (4 + width) + 2 * block
    saved += width * (tokens * config.channels * backbone.patch_size**2 + head)
    return int(1.1 * saved) + 3 * tokens * c * (8 + 11 * width)


def _recomputed(learner: Learner) -> bool:
    """Whether the hidden channels of MLPs are, as on a CPU with AMX."""
    if learner.gpu is not None or learner.dtype != torch.bfloat16:
        return False
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "amx_bf16" in cpu.read_text()


def _crops(learner: Learner) -> int:
    """Of the batches that the loader holds."""
    config = learner.config
    batches = 2 if learner.gpu is not None else 1 + max(1, -(-2 * config.num_workers // config.batch_size_per_gpu))
    pixels = sum(kind.size**2 for kind in config.crop_kinds)
    return batches * config.batch_size_per_gpu * config.channels * pixels * learner.dtype.itemsize


def _on_machine(needed: Estimate, learner: Learner) -> tuple[int, int, int]:
    """Bytes that all processes need which share a memory, and how many it has in all and available."""
    total, available = memory(learner.gpu)
    return needed.memory * (1 if learner.gpu is not None else local_processes()), total, available


def require_memory(needed: Estimate, learner: Learner) -> None:
    """Raise ValueError if a run needs more memory than there is."""
    whole, total, _ = _on_machine(needed, learner)
    if whole > TOLERANCE * total:
        raise ValueError(
            f"training needs about {size(whole)} of memory and there are {size(total)}: lower it by {LESS}"
        )


def warn_of_shortage(needed: Estimate, learner: Learner) -> None:
    """Warn if memory, or disk for the checkpoints to come beside those that the folder has, may run out."""
    whole, _, available = _on_machine(needed, learner)
    if whole > available:
        logger.warning(
            "training needs about %s of memory and %s are available: if it runs out, lower it by %s",
            size(whole),
            size(available),
            LESS,
        )
    folder = learner.config.output_dir
    there = [folder / checkpoint.LAST, folder / checkpoint.PREVIOUS, *checkpoint.numbered(folder)]
    missing = needed.disk - sum(path.stat().st_size for path in there if path.exists())
    free = shutil.disk_usage(
        next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    ).free
    if missing > free:
        logger.warning(
            "checkpoints will take about %s and %s has %s free: set --keep-last or raise --saveckp-freq",
            size(missing),
            folder,
            size(free),
        )


def step_seconds(config: PretrainConfig, device: torch.device) -> float:
    """About how long a step takes, from its operations and the rate of a product like a ViT's."""
    from dino_train.methods.flops import flops_per_image  # loads much of torch

    a = torch.randn(4096, 512, device=device, dtype=config.dtype(device))
    b = torch.randn(2048, 512, device=device, dtype=config.dtype(device))
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(10):
            out = torch.nn.functional.linear(a, b)
        out.sum().item()  # waits for the device
        took.append(time.perf_counter() - begin)
    rate = 10 * 2 * a.numel() * len(b) / min(took)
    return config.batch_size_per_gpu * flops_per_image(config) / rate / EFFICIENCY
