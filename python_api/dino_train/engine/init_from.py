"""Start of a run from weights of a file, in place of random ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dino_train.engine.learner import Learner
from dino_train.models.adapt import adapt
from dino_train.models.plain_vit import PLAIN_SIZES
from dino_train.models.weights import arch_of, backbone_weights, fit, read


def init_from(learner: Learner, path: Path) -> str:
    """Fill student and teacher; returns in words what was taken and adapted and what is new. The optimizer stays fresh.

    A checkpoint of the same method with heads of the same shapes gives both networks and the method's state. From any
    other file both networks get the backbone that the file's method evaluates, and the heads stay random.

    Raises:
        CheckpointError: the file cannot be read; ValueError: it holds no backbone of the configured architecture.
    """
    state, args = read(path)
    nets = {"student": learner.student, "teacher": learner.teacher}
    same_method = args.get("method", "dino") == learner.config.method
    heads = {name: _head(state.get(name), net) for name, net in nets.items()} if same_method else {}
    whole = bool(heads) and all(heads.values())
    notes: list[str] = []
    for name, net in nets.items():
        weights, found, left = backbone_weights(state, net=name if whole else "auto")  # type: ignore[arg-type]
        wanted = learner.config.arch
        arch = arch_of(weights, left, args.get("arch") or wanted)
        if arch in PLAIN_SIZES:
            raise ValueError(f"{path} holds a {arch}, which is not trained here; of DINOv2 ViT-S, B and L are")
        if arch != wanted:
            raise ValueError(f"{path} holds a {arch}, and --arch is {wanted}")
        weights, notes = adapt(weights, net.backbone)
        fit(net.backbone, weights)
        if whole:
            head = heads[name]
            if learner.config.norm_last_layer:  # the file may have been trained without
                head |= {key: torch.ones_like(value) for key, value in head.items() if key.endswith(".weight_g")}
            net.load_state_dict(head, strict=False)
    if whole:
        taken = ["student and teacher with their heads"]
        taken.append("the method's state" if _load_method_state(learner, state) else "without the method's state")
    else:
        taken = [f"the backbone ({found})", "the heads are new"]
    learner.renew()
    return f"{path}: {'; '.join([*taken, *notes])}"


def _head(state: Any, net: nn.Module) -> dict[str, Tensor]:
    """What a network of a checkpoint has beside its backbone; empty if it does not fit."""
    if not isinstance(state, Mapping):
        return {}
    named = {key.removeprefix("module."): value for key, value in state.items()}
    head = {key: value for key, value in named.items() if not key.startswith("backbone.")}
    wanted = {key: value for key, value in net.state_dict().items() if not key.startswith("backbone.")}
    return head if _shapes(head) == _shapes(wanted) else {}


def _load_method_state(learner: Learner, state: Mapping[str, Any]) -> bool:
    """If it is there and of the same shapes, such as that of a queue."""
    wanted = learner.method.state_dict()
    if any(_shapes(state.get(name)) != _shapes(part) for name, part in wanted.items()):
        return False
    learner.method.load_state_dict(state)
    return True


def _shapes(state: Any) -> dict[str, list[int]] | None:
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        return None
    return {key: list(value.shape) for key, value in state.items()}
