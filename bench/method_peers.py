"""The public code of MoCo v2, MoCo v3, SwAV and iBOT: for parity (method_parity.py), and as peers of bench_step.py.

Their modules and losses are imported from clones of facebookresearch/moco at 78b69ca, moco-v3 at c349e6e and swav at
06b1b7c, and of bytedance/ibot at da316d8; optimizer and loop are plain. Backbones are a ResNet under torchvision's
names, or the plain ViT of step_peers.py; SwAV brings its own ResNet and iBOT its own ViT.
"""

import ast
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dino_train.config.pretrain import PretrainConfig
from dino_train.models.resnet import ResNet
from step_peers import SIZES, Backbone, Setting
from torch import Tensor, nn

Blocks = tuple[int, int, int, int]
RESNET50: Blocks = (3, 4, 6, 3)
Network = Callable[..., nn.Module]  # of num_classes
# The module with all state, the trained one, and the loss of a list of crops.
Built = tuple[nn.Module, nn.Module, Callable[[list[Tensor]], Tensor]]


class Classifier(ResNet):
    """A ResNet of torchvision."""

    def __init__(self, blocks: Blocks, num_classes: int) -> None:
        super().__init__(blocks)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(super().forward(images))


class ViTClassifier(Backbone):
    """With the linear layer under both names that MoCo's two versions ask for."""

    def __init__(self, setting: Setting, num_classes: int) -> None:
        super().__init__(setting, 0.0, fused=False)
        self.fc = self.head = nn.Linear(SIZES[setting.arch][0], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        classifier = self.fc if isinstance(self.head, nn.Linear) else self.head  # MoCo replaces one of them
        return classifier(super().forward(images))


def moco(folder: Path, network: Network, blocks: Blocks, c: PretrainConfig) -> Built:
    settings = {"dim": c.out_dim, "K": c.queue_size, "m": c.momentum_teacher, "T": c.student_temp}
    public = module_of(folder / "moco/moco/builder.py").MoCo(network, **settings, mlp=True)
    return public, public.encoder_q, lambda crops: F.cross_entropy(*public(im_q=crops[0], im_k=crops[1]))


def moco_v3(folder: Path, network: Network, blocks: Blocks, c: PretrainConfig) -> Built:
    source = module_of(folder / "moco-v3/moco/builder.py")
    build = source.MoCo_ResNet if c.arch == "resnet50" else source.MoCo_ViT
    public = build(network, dim=c.out_dim, mlp_dim=c.head_hidden_dim, T=c.student_temp)
    trained = nn.ModuleDict({"net": public.base_encoder, "predictor": public.predictor})
    return public, trained, lambda crops: public(crops[0], crops[1], c.momentum_teacher)


def swav(folder: Path, network: Network, blocks: Blocks, c: PretrainConfig) -> Built:
    source = module_of(folder / "swav/src/resnet50.py")
    sizes = {"hidden_mlp": c.head_hidden_dim, "output_dim": c.head_bottleneck_dim, "nmb_prototypes": c.out_dim}
    public = source.ResNet(source.Bottleneck, list(blocks), normalize=True, **sizes)
    # main_swav.py imports apex: its assignment is taken alone.
    names: dict[str, Any] = {"torch": torch, "dist": dist}
    names["args"] = SimpleNamespace(epsilon=c.teacher_temp, world_size=1, sinkhorn_iterations=c.sinkhorn_iterations)
    define(folder / "swav/main_swav.py", "distributed_sinkhorn", names)

    @torch.no_grad()
    def normalize() -> None:
        public.prototypes.weight.copy_(F.normalize(public.prototypes.weight, dim=1))

    def loss(crops: list[Tensor]) -> Tensor:
        normalize()
        _, output = public(crops)
        views = output.float().chunk(len(crops))
        total = output.new_zeros(())
        for u in range(2):
            q = names["distributed_sinkhorn"](views[u].detach())
            others = [F.log_softmax(view / c.student_temp, dim=1) for v, view in enumerate(views) if v != u]
            total = total - sum((q * other).sum(1).mean() for other in others) / len(others) / 2
        return total

    normalize()
    return public, public, loss


def ibot(folder: Path, network: Network, blocks: Blocks, c: PretrainConfig) -> Built:
    """With a shared head; without its clipping."""
    clone = folder / "ibot"
    sys.path.insert(0, str(clone))  # for its utils
    registry = ModuleType("timm.models.registry")  # all that its ViT takes of timm
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    sys.modules |= {"timm": ModuleType("timm"), "timm.models": ModuleType("models"), registry.__name__: registry}
    models, heads = (module_of(clone / f"models/{name}.py") for name in ("vision_transformer", "head"))
    wrap = sys.modules["utils"].MultiCropWrapper
    build, width = getattr(models, c.arch), SIZES[c.arch][0]
    sizes = {"hidden_dim": c.head_hidden_dim, "bottleneck_dim": c.head_bottleneck_dim, "shared_head": True}

    def net(masked: bool, **options: float) -> nn.Module:
        head = heads.iBOTHead(width, c.out_dim, patch_out_dim=c.out_dim, norm_last_layer=c.norm_last_layer, **sizes)
        options |= {"masked_im_modeling": masked}
        return wrap(build(c.patch_size, img_size=[c.global_crops_size], return_all_tokens=True, **options), head)

    student, teacher = net(True, drop_path_rate=c.drop_path_rate), net(False)
    teacher.load_state_dict(student.state_dict(), strict=False)
    teacher.requires_grad_(False)
    names = {"np": np, "torch": torch, "nn": nn, "F": F, "dist": dist}
    define(clone / "main_ibot.py", "iBOTLoss", names)
    loss_of = names["iBOTLoss"](
        *(c.out_dim, c.out_dim, 2, c.local_crops_number),
        *(c.teacher_temp, c.teacher_temp, c.teacher_temp, c.teacher_temp, 0, 100),
    )
    pairs = [
        (dict(teacher.named_parameters())[name], p) for name, p in student.named_parameters() if "masked" not in name
    ]

    def loss(crops: list[Tensor]) -> Tensor:
        *crops, masks = crops
        with torch.no_grad():  # the moving average of the step before
            for average, p in pairs:
                average.mul_(c.momentum_teacher).add_((1 - c.momentum_teacher) * p)
        side = c.global_crops_size // c.patch_size
        hidden = list(masks.unflatten(2, (side, side)).unbind(1))
        with torch.no_grad():
            targets = teacher(crops[:2])
        outputs = student(crops[:2], mask=hidden)
        student.backbone.masked_im_modeling = False
        of_locals = student(crops[2:])[0] if len(crops) > 2 else None
        student.backbone.masked_im_modeling = True
        return loss_of(outputs, targets, of_locals, hidden, 0)["loss"]

    return nn.ModuleDict({"student": student, "teacher": teacher}), student, loss


# Names as of dino-train compare.
PUBLIC = {
    "mocov2": ("moco", moco),
    "mocov3": ("moco-v3", moco_v3),
    "swav": ("swav", swav),
    "ibot": ("ibot", ibot),
}


def available(folder: Path, name: str, arch: str) -> bool:
    """Whether the folder has the public code of a method, and that runs on the backbone."""
    runs = {"swav": arch == "resnet50", "ibot": arch.startswith("vit")}.get(name, True)
    return name in PUBLIC and (folder / PUBLIC[name][0]).is_dir() and runs


def define(path: Path, name: str, names: dict[str, Any]) -> None:
    """Run the definition of one class or function of a module that imports more than it needs; into `names`."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == name]
    exec(compile(tree, path.name, "exec"), names)


def on_cpus() -> None:
    """The public code asks for a GPU and a process group."""
    Tensor.cuda = torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(f"public_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class PublicMethod:
    """Steps of the public code with AdamW; `dtype` is that of autocast."""

    def __init__(self, folder: Path, name: str, setting: Setting, config: PretrainConfig, dtype: torch.dtype) -> None:
        on_cpus()
        torch.manual_seed(0)
        resnet = config.arch == "resnet50"
        network = partial(Classifier, RESNET50) if resnet else partial(ViTClassifier, setting)
        public, self.trained, self.loss = PUBLIC[name][1](folder, network, RESNET50, config)
        public.train()
        self.config, self.dtype = config, dtype
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-5)

    def step(self, step: int, crops: list[Tensor]) -> float:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(crops)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
