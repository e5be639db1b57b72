"""Steps of MoCo v2, MoCo v3, SwAV and iBOT compared with the public code of each, float32, on a CPU.

    python bench/method_parity.py FOLDER

FOLDER has the clones that method_peers.py names, or some of them. The optimizer is SGD. Same weights, same random
crops. Printed are the losses, and by how much loss and weights (relative norm) differ in the first and the last step.
The network is a ViT of iBOT, else a ResNet of four bottlenecks: the gradient of a new ResNet-50 changes by 2 % where
its weights change by 1e-7.

With a clone of facebookresearch/dinov2 at b8931f7 its loss classes are compared too, on random logits.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dino_train.config.presets import recipe
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner
from dino_train.methods.koleo import koleo
from dino_train.models.resnet import RESNETS, ResNet
from method_peers import PUBLIC, Classifier, available, module_of, on_cpus
from torch import Tensor

from dino_kernels import dino_loss, patch_loss, sinkhorn_center

STEPS, BATCH, SIZE, RATE, MOMENTUM = 5, 8, 96, 1e-3, 0.9
BLOCKS = (1, 1, 1, 1)
DINOV2_LOSSES = ("ibot_patch_loss", "dino_clstoken_loss", "koleo_loss")


# Settings of ours
METHODS: dict[str, dict[str, Any]] = {
    "mocov2": {"method": "moco", "out_dim": 128, "queue_size": 64, "student_temp": 0.2, "head_hidden_dim": 2048},
    "mocov3": {
        "method": "moco",
        "predictor": True,
        "queue_size": 0,
        "student_temp": 1.0,
        "out_dim": 256,
        "head_hidden_dim": 512,
    },
    "swav": {
        "method": "swav",
        "use_bn_in_head": True,
        "out_dim": 300,
        "head_bottleneck_dim": 128,
        "head_hidden_dim": 512,
        "local_crops_number": 2,
        "local_crops_size": 32,
        "freeze_last_layer": 0,
    },
    "ibot": {
        "method": "ibot",
        "arch": "vit_tiny",
        "drop_path_rate": 0.0,
        "out_dim": 512,
        "head_hidden_dim": 256,
        "head_bottleneck_dim": 64,
        "local_crops_number": 2,
        "local_crops_size": 48,
        "freeze_last_layer": 0,
    },
}


def renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names of the public modules as ours."""
    for name, value in state.items():
        if name.startswith(("backbone.", "head.")):  # iBOT's, whose two last layers are one
            if "last_layer2" not in name:
                yield name.replace("masked_embed", "mask_token"), value
            continue
        name = name.removeprefix("net.")
        for theirs, ours in {
            "fc.": "projector.",
            "projection_head.": "head.mlp.",
            "prototypes.": "head.last_layer.",
            "predictor.": "predictor.",
        }.items():
            if name.startswith(theirs):
                yield ours + name.removeprefix(theirs), value
                break
        else:
            yield f"backbone.{name}", value


def compare(folder: Path, name: str) -> str:
    torch.manual_seed(0)
    settings = METHODS[name]
    momentum = 0.0 if settings["method"] == "swav" else MOMENTUM
    config = PretrainConfig(
        **{
            **recipe(settings["method"], "none"),
            **{"arch": "resnet50", "optimizer": "sgd", "global_crops_size": SIZE, "batch_size_per_gpu": BATCH},
            **{"lr": RATE * 256 / BATCH, "min_lr": RATE, "warmup_epochs": 0, "weight_decay": 0.0},
            **{"weight_decay_end": 0.0, "clip_grad": 0.0, "epochs": 1, "device": "cpu"},
            **{"momentum_teacher": momentum, "momentum_teacher_end": momentum},
            **settings,
        }
    )
    public, trained, loss_of = PUBLIC[name][1](folder, partial(Classifier, BLOCKS), BLOCKS, config)
    learner = Learner(config, STEPS, torch.device("cpu"))
    weights = dict(renamed(trained.state_dict()))
    state = learner.state_dict()
    learner.load_state_dict({**state, "student": weights, "teacher": {**state["teacher"], **weights}})
    if name == "mocov2":
        learner.method.queue.rows.copy_(public.queue.t())
    optimizer = torch.optim.SGD(trained.parameters(), lr=RATE, momentum=0.9)
    public.train()
    losses, differences = [], []
    for step in range(STEPS):
        sizes = [SIZE] * 2 + [config.local_crops_size] * config.local_crops_number
        crops = [torch.randn(BATCH, 3, size, size) for size in sizes]
        if (masks := config.mask_kind) is not None:
            crops.append(torch.stack([torch.from_numpy(masks.draw(0, step, i, i)) for i in range(BATCH)]))
        optimizer.zero_grad()
        expected = loss_of(crops)
        expected.backward()
        optimizer.step()
        loss = learner.step(step, crops).loss
        losses.append(loss)
        ours = learner.student.state_dict()
        pairs = [(ours[key], value) for key, value in renamed(trained.state_dict()) if value.is_floating_point()]
        norms = [
            sum(x.square().sum() for x in each).sqrt() for each in ((a - b for a, b in pairs), (b for _, b in pairs))
        ]
        differences.append((abs(loss / expected.item() - 1), (norms[0] / norms[1]).item()))
    cells = [f"{value:.1e}" for each in (differences[0], differences[-1]) for value in each]
    return f"| {name} | {' '.join(f'{loss:.4f}' for loss in losses)} | {' | '.join(cells)} |"


def dinov2_losses(folder: Path) -> Iterator[str]:
    """By how much losses and gradients (relative norm) differ from those of DINOv2's loss classes."""
    loss = {name: module_of(folder / f"dinov2/dinov2/loss/{name}.py") for name in DINOV2_LOSSES}
    rows, outputs, temp, images = 64, 1024, 0.06, 16
    student, teacher = torch.randn(rows, outputs, requires_grad=True), torch.randn(rows, outputs) / 10
    weights = torch.rand(rows)
    public = loss["ibot_patch_loss"].iBOTPatchLoss(outputs)
    q = public.sinkhorn_knopp_teacher(teacher, temp, torch.tensor(rows))
    masks = torch.ones(images, 1)  # of which it takes the number
    expected = public.forward_masked(student, q, masks, masks_weight=weights)
    ours, _ = patch_loss(
        student, teacher, sinkhorn_center(teacher, temp=temp), weights=weights / images, teacher_temp=temp
    )
    yield _row("patch loss", ours, expected, student)
    public = loss["dino_clstoken_loss"].DINOLoss(outputs)
    targets, views = teacher[: 2 * images], student.chunk(rows // images)
    q = public.sinkhorn_knopp_teacher(targets, temp).chunk(2)
    pairs = [public([view], [q[u]]) for u in range(2) for v, view in enumerate(views) if u != v]
    ours, _ = dino_loss(student, targets, sinkhorn_center(targets, temp=temp), teacher_temp=temp)
    yield _row("class-token loss", ours, torch.stack(pairs).mean(), student)
    features = torch.randn(images, 384, requires_grad=True)
    yield _row("KoLeo", koleo(features), loss["koleo_loss"].KoLeoLoss()(features), features)


def _row(name: str, ours: Tensor, expected: Tensor, of: Tensor) -> str:
    gradients = [torch.autograd.grad(value, of)[0] for value in (ours, expected)]
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    return f"| {name} | {expected:.6f} | {abs(ours.item() / expected.item() - 1):.1e} | {error:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the clones moco, moco-v3, swav, ibot, dinov2, or some")
    folder = parser.parse_args().folder
    names = [name for name in METHODS if available(folder, name, METHODS[name].get("arch", "resnet50"))]
    if not names and not (folder / "dinov2").is_dir():
        parser.error(f"{folder} has none of {', '.join(clone for clone, _ in PUBLIC.values())}")
    on_cpus()
    RESNETS["resnet50"] = lambda channels: ResNet(BLOCKS)
    print(f"| method | losses of {STEPS} steps | loss, first step | weights | loss, last step | weights |")
    print("|---|---|--:|--:|--:|--:|")
    for name in names:
        print(compare(folder, name), flush=True)
    if (folder / "dinov2").is_dir():
        print("\n| loss of DINOv2 | value | difference | of its gradient |\n|---|--:|--:|--:|")
        print(*dinov2_losses(folder), sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
