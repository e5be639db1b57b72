"""The peers of our training step in bench_step.py, each with `Peer(setting, weights).step(step, crops)`.

Reference is the published step of DINO in plain form, including the parts that make it slow: one forward per
resolution, attention with a stored matrix, weight norm in every forward, the loss pair by pair, loops over parameters,
device-to-host syncs in every step. Only DistributedDataParallel is left out; on one process it has no measurable cost.
Stock is the same networks with the fastest parts of PyTorch. ReferenceRepo runs a clone of facebookresearch/dino.

The peers share no code with the trainer. Parameters have the same names, so that all start from the same weights.
"""

import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"vit_nano": (96, 3, 3), "vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}
STEPS_PER_EPOCH, EPOCHS, WARMUP_EPOCHS, FROZEN_EPOCHS = 10, 100, 10, 1
FIRST_STEP = STEPS_PER_EPOCH * WARMUP_EPOCHS  # from here on all layers are trained, near the peak learning rate
MIN_LR, DECAY, LAST_DECAY, MOMENTUM, CLIP, TEACHER_TEMP = 1e-6, 0.04, 0.4, 0.996, 3.0, 0.04
PHASES = ("teacher", "student_forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Setting:
    """The varied options; all others are the defaults of the reference."""

    arch: str
    batch: int
    device: str
    local_crops: int = 8
    out_dim: int = 65536
    patch: int = 16
    global_size: int = 224
    local_size: int = 96
    hidden: int = 2048
    drop_path: float = 0.1
    lr: float = 0.0005

    def crops(self, seed: int) -> list[Tensor]:
        """A batch of random float32 crops, global crops first, in host memory."""
        g = torch.Generator().manual_seed(seed)
        sizes = [self.global_size] * 2 + [self.local_size] * self.local_crops
        return [torch.randn(self.batch, 3, size, size, generator=g) for size in sizes]


# --- nets --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, fused: bool, drop_path: float):
        super().__init__()
        # A tensor, so that torch.compile compiles all blocks as one function.
        self.drops, keep = drop_path > 0, torch.tensor(1 - drop_path)
        self.register_buffer("keep", keep, persistent=False)
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads, fused)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * dim, dim))

    def drop(self, branch: Tensor) -> Tensor:
        if not self.drops:
            return branch
        mask = (torch.rand(len(branch), 1, 1, dtype=branch.dtype, device=branch.device) + self.keep).floor()
        return branch / self.keep * mask

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    def __init__(self, setting: Setting, drop_path: float, fused: bool):
        super().__init__()
        dim, depth, heads = SIZES[setting.arch]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, kernel_size=setting.patch, stride=setting.patch)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        cells = (setting.global_size // setting.patch) ** 2
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + cells, dim), std=0.02))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, fused, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, side: int) -> Tensor:
        n = math.isqrt(self.pos_embed.shape[1] - 1)
        if side == n:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((side + 0.1) / n, (side + 0.1) / n), mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images)
        side = x.shape[-1]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        x = x + self.positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class WeightNormLinear(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, keep: bool):
        super().__init__()
        self.keep, self.weight = keep, None
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        if self.keep:  # until the next forward, like the hook of nn.utils.weight_norm
            self.weight = weight
        return F.linear(x, weight)


class Net(nn.Module):
    """Backbone and head applied to a list of crops, with one forward for consecutive crops of equal size."""

    def __init__(self, setting: Setting, drop_path: float = 0.0, *, fused: bool = False, keep: bool = True):
        super().__init__()
        self.backbone = Backbone(setting, drop_path, fused)
        dim, hidden = SIZES[setting.arch][0], setting.hidden
        self.head = nn.Module()
        layers = (nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 256))
        self.head.mlp = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.head.last_layer = WeightNormLinear(256, setting.out_dim, keep)

    def forward(self, crops: list[Tensor]) -> Tensor:
        runs = [torch.cat(list(run)) for _, run in groupby(crops, key=lambda crop: crop.shape[-1])]
        features = torch.cat([self.backbone(run) for run in runs])
        return self.head.last_layer(F.normalize(self.head.mlp(features), dim=-1))


def compile_blocks(*nets: Net, backend: str = "inductor") -> None:
    """Regional compilation: one block is compiled per shape, which takes a twelfth of the time of the whole network."""
    for net in nets:
        for block in net.backbone.blocks:
            block.compile(dynamic=False, backend=backend)


def start_weights(setting: Setting) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Net(setting).state_dict()


# --- steps -------------------------------------------------------------------------------------------


class Reference:
    """`dtype` is that of autocast. The reference uses float16 with a gradient scaler on a GPU; it does not support
    CPUs."""

    def __init__(self, setting: Setting, weights: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
        self.setting, self.phase_hook = setting, None
        torch.backends.cudnn.benchmark = True  # as in main_dino.py
        self.dtype = dtype or (torch.float16 if setting.device == "cuda" else torch.float32)
        self.scaler = torch.amp.GradScaler(setting.device, enabled=self.dtype == torch.float16)
        self.student, self.teacher = (net.to(setting.device) for net in self.nets())
        for net in (self.student, self.teacher):
            net.load_state_dict(weights)
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, setting.out_dim, device=setting.device)
        self.optimizer = self.make_optimizer(self.groups())
        self.lr = self.schedule(setting.lr * setting.batch / 256, MIN_LR, WARMUP_EPOCHS)
        self.weight_decay, self.momentum = self.schedule(DECAY, LAST_DECAY), self.schedule(MOMENTUM, 1.0)

    def step(self, step: int, crops: list[Tensor]) -> float:
        """One update of student, center and teacher; returns the loss."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr[step]
            if i == 0:
                group["weight_decay"] = self.weight_decay[step]
        with torch.autocast(self.setting.device, self.dtype, enabled=self.dtype != torch.float32):
            teacher_output = self.teacher(crops[:2])
            self.phase("teacher")
            student_output = self.student(crops)
            self.phase("student_forward")
            loss = self.loss(student_output, teacher_output)
        self.check(loss)
        self.phase("loss")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.phase("backward")
        self.scaler.unscale_(self.optimizer)
        self.clip()
        self.freeze(step // STEPS_PER_EPOCH)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_teacher(self.momentum[step])
        self.phase("optimizer")
        return loss.item()

    def phase(self, name: str) -> None:
        if self.phase_hook:
            self.phase_hook(name)

    def nets(self) -> tuple[nn.Module, nn.Module]:
        return Net(self.setting, self.setting.drop_path), Net(self.setting)

    def groups(self) -> list[dict]:
        decayed, plain = [], []
        for name, p in self.student.named_parameters():
            if p.requires_grad:
                (plain if name.endswith(".bias") or p.ndim == 1 else decayed).append(p)
        return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]

    def make_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups)

    def schedule(self, start: float, end: float, warmup_epochs: int = 0) -> np.ndarray:
        warmup, steps = warmup_epochs * STEPS_PER_EPOCH, (EPOCHS - warmup_epochs) * STEPS_PER_EPOCH
        cosine = end + (start - end) * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
        return np.concatenate([np.linspace(0, start, warmup), cosine])

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        views = (student / 0.1).chunk(2 + self.setting.local_crops)
        targets = ((teacher - self.center) / TEACHER_TEMP).softmax(dim=-1).detach().chunk(2)
        terms = []
        for i, q in enumerate(targets):
            for v, s in enumerate(views):
                if v != i:
                    terms.append((-q * s.log_softmax(dim=-1)).sum(dim=-1).mean())
        self.update_center(teacher)
        return sum(terms) / len(terms)

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        self.center = self.center * 0.9 + teacher.sum(dim=0, keepdim=True) / len(teacher) * (1 - 0.9)

    def check(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the loss of {type(self).__name__} is {loss.item()}")

    def clip(self) -> None:
        norms = []  # copied to the host but not used, as in the reference
        for _, p in self.student.named_parameters():
            if p.grad is not None:
                norm = p.grad.norm(2)
                norms.append(norm.item())
                if (scale := CLIP / (norm + 1e-6)) < 1:
                    p.grad.mul_(scale)

    def freeze(self, epoch: int) -> None:
        if epoch < FROZEN_EPOCHS:
            for name, p in self.student.named_parameters():
                if "last_layer" in name:
                    p.grad = None

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            t.mul_(momentum).add_((1 - momentum) * s)


class Stock(Reference):
    """The fastest parts of PyTorch: bfloat16, fused AdamW, foreach instead of loops, one log_softmax per view."""

    def __init__(self, setting: Setting, weights: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(setting, weights, dtype)
        if setting.device == "cuda":  # on the CPU it does not help (ViT-Ti, batch 4, 2 cores: 637 instead of 635 ms)
            compile_blocks(self.student, self.teacher)

    def nets(self) -> tuple[nn.Module, nn.Module]:
        # On the CPU, naive attention is faster under autocast (same step: 538 instead of 635 ms).
        make = partial(Net, self.setting, fused=self.setting.device == "cuda", keep=False)
        return make(self.setting.drop_path), make()

    def make_optimizer(self, groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        # Linear in the targets, so each view needs one log_softmax. Faster than an einsum over pairs, which autocast
        # rounds to 16 bit (forward and backward at 40 x 65536, 2 cores: 6.4 instead of 7.2 ms).
        views = (student / 0.1).log_softmax(dim=-1, dtype=torch.float32).unflatten(0, (-1, self.setting.batch))
        targets = ((teacher - self.center) / TEACHER_TEMP).softmax(dim=-1).detach().unflatten(0, (2, -1))
        self.update_center(teacher)
        total = (targets * views[:2]).sum() - (targets.sum(dim=0) * views.sum(dim=0)).sum()
        return total / (2 * (len(views) - 1) * self.setting.batch)

    def check(self, loss: Tensor) -> None:
        """No device-to-host sync before the end of the step."""

    @torch.no_grad()
    def clip(self) -> None:
        grads = [p.grad for p in self.student.parameters() if p.grad is not None]
        scales = [(CLIP / (norm + 1e-6)).clamp_max(1) for norm in torch._foreach_norm(grads)]
        torch._foreach_mul_(grads, scales)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)


class ReferenceRepo(Reference):
    """A clone of facebookresearch/dino: its networks, loss, clipping, parameter groups and schedules, in the order of
    its training loop."""

    def __init__(self, repo: Path, setting: Setting, weights: dict[str, Tensor]) -> None:
        self.main, self.utils, self.vits = import_reference(repo)
        if not dist.is_initialized():  # its loss and its student need a process group, even for one process
            backend = "nccl" if setting.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        super().__init__(setting, weights)
        arguments = (setting.out_dim, 2 + setting.local_crops, TEACHER_TEMP, TEACHER_TEMP, 0, EPOCHS)
        self.dino_loss = self.main.DINOLoss(*arguments).to(setting.device)
        self.net, self.student = self.student, nn.parallel.DistributedDataParallel(self.student)

    def nets(self) -> tuple[nn.Module, nn.Module]:
        dim, depth, heads = SIZES[self.setting.arch]

        def make(**drop_path: float) -> nn.Module:
            backbone = self.vits.VisionTransformer(
                img_size=[self.setting.global_size], patch_size=self.setting.patch, embed_dim=dim, depth=depth,
                num_heads=heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), **drop_path,
            )  # fmt: skip
            head = self.vits.DINOHead(dim, self.setting.out_dim, hidden_dim=self.setting.hidden)
            return self.utils.MultiCropWrapper(backbone, head)

        return make(drop_path_rate=self.setting.drop_path), make()

    def groups(self) -> list[dict]:
        return self.utils.get_params_groups(self.student)

    def schedule(self, start: float, end: float, warmup_epochs: int = 0) -> np.ndarray:
        return self.utils.cosine_scheduler(start, end, EPOCHS, STEPS_PER_EPOCH, warmup_epochs)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.dino_loss(student, teacher, WARMUP_EPOCHS)  # its temperature does not depend on the epoch

    def clip(self) -> None:
        self.utils.clip_gradients(self.student, CLIP)

    def freeze(self, epoch: int) -> None:
        self.utils.cancel_gradients_last_layer(epoch, self.student, FROZEN_EPOCHS)


def import_reference(repo: Path) -> list[ModuleType]:
    """main_dino, utils and vision_transformer of a clone. torchvision, needed only for images, may be missing."""
    if importlib.util.find_spec("torchvision") is None:
        torchvision = sys.modules["torchvision"] = ModuleType("torchvision")
        for name in ("datasets", "transforms", "models"):
            setattr(torchvision, name, ModuleType(name))
    warnings.filterwarnings("ignore", category=FutureWarning)  # from its weight norm
    sys.path.insert(0, str(repo))
    return [importlib.import_module(name) for name in ("main_dino", "utils", "vision_transformer")]


PEERS: dict[str, Callable[[Setting, dict[str, Tensor]], Reference]] = {
    "reference": Reference,
    "reference_bf16": partial(Reference, dtype=torch.bfloat16),
    "stock": Stock,
}
