"""Steps of MoCo v2, MoCo v3 and SwAV compared with the public code of each, float32, on a CPU.

    python bench/method_parity.py --moco PATH --moco-v3 PATH --swav PATH

PATH: a clone of facebookresearch/moco at 78b69ca, moco-v3 at c349e6e or swav at 06b1b7c; each may be left out. Their
modules and loss are imported, optimizer (SGD) and loop are plain. Same weights, same random crops. Printed are the
losses, and by how much loss and weights (relative norm) differ in the first and the last step. The network is a ResNet
of four bottlenecks: the gradient of a new ResNet-50 changes by 2 % where its weights change by 1e-7.
"""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dino_train.config.presets import recipe
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner
from dino_train.models import vit
from dino_train.models.resnet import ResNet
from torch import Tensor, nn

STEPS, BATCH, SIZE, RATE, MOMENTUM = 5, 8, 96, 1e-3, 0.9
BLOCKS = (1, 1, 1, 1)
Step = Callable[[list[Tensor]], Tensor]


class Classifier(ResNet):
    """A ResNet of torchvision, which MoCo's code builds its networks from."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(BLOCKS)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(super().forward(images))


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(f"public_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def moco(folder: Path) -> tuple[nn.Module, Step, dict, Callable]:
    public = module_of(folder / "moco/builder.py").MoCo(Classifier, dim=128, K=64, m=MOMENTUM, T=0.2, mlp=True)

    def loss(crops: list[Tensor]) -> Tensor:
        return F.cross_entropy(*public(im_q=crops[0], im_k=crops[1]))

    def give(learner: Learner) -> None:
        learner.method.queue.rows.copy_(public.queue.t())

    settings = {"method": "moco", "out_dim": 128, "queue_size": 64, "student_temp": 0.2, "momentum_teacher": MOMENTUM}
    return public.encoder_q, loss, settings | {"head_hidden_dim": 2048}, give


def moco_v3(folder: Path) -> tuple[nn.Module, Step, dict, Callable]:
    public = module_of(folder / "moco/builder.py").MoCo_ResNet(Classifier, dim=256, mlp_dim=512, T=1.0)

    def loss(crops: list[Tensor]) -> Tensor:
        return public(crops[0], crops[1], MOMENTUM)

    settings = {"method": "moco", "predictor": True, "queue_size": 0, "student_temp": 1.0, "out_dim": 256}
    settings |= {"head_hidden_dim": 512, "momentum_teacher": MOMENTUM}
    trained = nn.ModuleDict({"net": public.base_encoder, "predictor": public.predictor})
    return trained, loss, settings, lambda learner: None


def swav(folder: Path) -> tuple[nn.Module, Step, dict, Callable]:
    source = module_of(folder / "src/resnet50.py")
    sizes = {"hidden_mlp": 512, "output_dim": 128, "nmb_prototypes": 300}
    public = source.ResNet(source.Bottleneck, list(BLOCKS), normalize=True, **sizes)
    # main_swav.py imports apex: its assignment is taken alone.
    tree = ast.parse((folder / "main_swav.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "distributed_sinkhorn"]
    names = {"torch": torch, "dist": dist}
    names["args"] = SimpleNamespace(epsilon=0.05, world_size=1, sinkhorn_iterations=3)
    exec(compile(tree, "main_swav.py", "exec"), names)

    @torch.no_grad()
    def normalize() -> None:
        public.prototypes.weight.copy_(F.normalize(public.prototypes.weight, dim=1))

    def loss(crops: list[Tensor]) -> Tensor:
        normalize()
        _, output = public(crops)
        views = output.chunk(len(crops))
        total = output.new_zeros(())
        for u in range(2):
            q = names["distributed_sinkhorn"](views[u].detach())
            others = [F.log_softmax(view / 0.1, dim=1) for v, view in enumerate(views) if v != u]
            total = total - sum((q * other).sum(1).mean() for other in others) / len(others) / 2
        return total

    normalize()
    settings = {"method": "swav", "use_bn_in_head": True, "out_dim": 300, "head_bottleneck_dim": 128}
    settings |= {"head_hidden_dim": 512, "local_crops_number": 2, "local_crops_size": 32, "freeze_last_layer": 0}
    return public, loss, settings, lambda learner: None


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


def compare(name: str, build: Callable, folder: Path) -> str:
    torch.manual_seed(0)
    public, loss_of, settings, give = build(folder)
    config = PretrainConfig(
        **{
            **recipe(settings["method"], "none"),
            **{"arch": "resnet50", "optimizer": "sgd", "global_crops_size": SIZE, "batch_size_per_gpu": BATCH},
            **{"lr": RATE * 256 / BATCH, "min_lr": RATE, "warmup_epochs": 0, "weight_decay": 0.0},
            **{"weight_decay_end": 0.0, "clip_grad": 0.0, "epochs": 1, "device": "cpu"},
            "momentum_teacher_end": settings.get("momentum_teacher", 0.0),
            **settings,
        }
    )
    learner = Learner(config, STEPS, torch.device("cpu"))
    weights = dict(renamed(public.state_dict()))
    state = learner.state_dict()
    learner.load_state_dict({**state, "student": weights, "teacher": {**state["teacher"], **weights}})
    give(learner)
    optimizer = torch.optim.SGD(public.parameters(), lr=RATE, momentum=0.9)
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
        pairs = [(ours[key], value) for key, value in renamed(public.state_dict()) if value.is_floating_point()]
        norms = [
            sum(x.square().sum() for x in each).sqrt() for each in ((a - b for a, b in pairs), (b for _, b in pairs))
        ]
        differences.append((abs(loss / expected.item() - 1), (norms[0] / norms[1]).item()))
    cells = [f"{value:.1e}" for each in (differences[0], differences[-1]) for value in each]
    return f"| {name} | {' '.join(f'{loss:.4f}' for loss in losses)} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    builders = {"moco": moco, "moco-v3": moco_v3, "swav": swav}
    for name in builders:
        parser.add_argument(f"--{name}", type=Path)
    given = {name.replace("_", "-"): path for name, path in vars(parser.parse_args()).items() if path}
    if not given:
        parser.error("give the clone of at least one of them")
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]  # the public code asks for a GPU
    torch.Tensor.cuda = Tensor.cuda
    vit.resnet50 = lambda: ResNet(BLOCKS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"| method | losses of {STEPS} steps | loss, first step | weights | loss, last step | weights |")
    print("|---|---|--:|--:|--:|--:|")
    for name, path in given.items():
        print(compare(name, builders[name], path), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
