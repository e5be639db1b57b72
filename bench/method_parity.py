"""Steps of MoCo v2, MoCo v3 and SwAV compared with the public code of each, float32, on a CPU.

    python bench/method_parity.py FOLDER

FOLDER has the clones that method_peers.py names, or some of them. The optimizer is SGD. Same weights, same random
crops. Printed are the losses, and by how much loss and weights (relative norm) differ in the first and the last step.
The network is a ResNet of four bottlenecks: the gradient of a new ResNet-50 changes by 2 % where its weights change by
1e-7.
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
from dino_train.models.resnet import RESNETS, ResNet
from method_peers import PUBLIC, Classifier, available, on_cpus
from torch import Tensor

STEPS, BATCH, SIZE, RATE, MOMENTUM = 5, 8, 96, 1e-3, 0.9
BLOCKS = (1, 1, 1, 1)


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
}


def renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names of the public modules as ours."""
    for name, value in state.items():
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
    momentum = MOMENTUM if settings["method"] == "moco" else 0.0
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the clones moco, moco-v3 and swav, or some of them")
    folder = parser.parse_args().folder
    names = [name for name in METHODS if available(folder, name, "resnet50")]
    if not names:
        parser.error(f"{folder} has none of {', '.join(clone for clone, _ in PUBLIC.values())}")
    on_cpus()
    RESNETS["resnet50"] = lambda channels: ResNet(BLOCKS)
    print(f"| method | losses of {STEPS} steps | loss, first step | weights | loss, last step | weights |")
    print("|---|---|--:|--:|--:|--:|")
    for name in names:
        print(compare(folder, name), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
