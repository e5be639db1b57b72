"""Switches of the step: each combination equals the plain step; no device-to-host sync; several ranks equal one."""

import copy
import itertools
import json
import os
from dataclasses import replace

import pytest
import tiny_run
import torch
from dino_train.common.masks import MaskKind
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner
from dino_train.engine.optim import parameter_groups
from dino_train.models.names import fold_layer_scale
from dino_train.models.vit import vit
from dino_train.models.weights import backbone_weights
from tiny_run import torchrun
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dino_kernels.nn import FlatParameters, Packing

SETTINGS = {
    "arch": "vit_nano",
    "patch_size": 8,
    "out_dim": 256,
    "head_hidden_dim": 64,
    "drop_path_rate": 0.0,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "local_crops_number": 3,
    "batch_size_per_gpu": 8,
    "epochs": 5,
    "warmup_epochs": 1,
    "lr": 0.02,
    "clip_grad": 0.05,
    "momentum_teacher": 0.9,
    "device": "cpu",
}
CPU = torch.device("cpu")


MASKS = MaskKind(4, 0.5, (0.1, 0.5), 4)


def crops(step, batch=8, masked=False):
    g = torch.Generator().manual_seed(step)
    sizes = [32] * 2 + [16] * 3
    images = [torch.randn(batch, 3, size, size, generator=g) for size in sizes]
    masks = [torch.stack([torch.from_numpy(MASKS.draw(step, 0, i, i)) for i in range(batch)])] if masked else []
    return images + masks


def run(config, steps=10, own=slice(None)):
    """Losses, weights of student and teacher, and center of some steps."""
    torch.manual_seed(3)
    learner = Learner(config, 2, CPU)
    masked = config.method == "ibot"
    losses = [learner.step(step, [crop[own] for crop in crops(step, masked=masked)]).loss for step in range(steps)]
    nets = {"student": learner.student, "teacher": learner.teacher}
    weights = {f"{net}.{k}": v.clone() for net, module in nets.items() for k, v in module.state_dict().items()}
    return losses, weights | {"center": learner.method.center}


def assert_close(ours, plain, tolerance=1e-5):
    assert ours[0] == pytest.approx(plain[0], rel=tolerance)
    for name, expected in plain[1].items():
        got = ours[1][name]
        if name.endswith("attn.qkv.bias"):  # the gradient of a key bias is only rounding error, which AdamW amplifies
            got, expected = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (got, expected))
        error = (got - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name} differs by {error:.1e}"


@pytest.fixture(scope="module")
def plain():
    return {free: run(PretrainConfig(**SETTINGS, norm_last_layer=not free)) for free in (False, True)}


@pytest.mark.parametrize(
    "accumulate, checkpoint_activations, free_norm",
    [case for case in itertools.product((1, 2, 4), (False, True), (False, True)) if case[:2] != (1, False)],
)
def test_every_combination_of_switches_equals_the_plain_step(plain, accumulate, checkpoint_activations, free_norm):
    config = PretrainConfig(
        **SETTINGS,
        accumulate=accumulate,
        checkpoint_activations=checkpoint_activations,
        norm_last_layer=not free_norm,
    )
    assert_close(run(config), plain[free_norm])


def test_checkpointed_activations_are_recomputed(monkeypatch):
    """Otherwise the switch would save no memory: each block with gradients runs its forward twice."""
    from dino_train.models.vit import Block

    calls, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *x: calls.append(self) or forward(self, *x))
    counts = []
    for switch in (False, True):
        calls.clear()
        run(PretrainConfig(**SETTINGS, checkpoint_activations=switch), steps=1)
        counts.append(len(calls))
    assert counts == [6, 9]  # three blocks of teacher and student, and the recomputation of the student


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2, "checkpoint_activations": True, "drop_path_rate": 0.2},
        {"centering": "sinkhorn"},
        {"optimizer": "larc"},
        {"method": "byol", "local_crops_number": 0, "freeze_patch_embed": True},
        {"method": "moco", "local_crops_number": 0, "predictor": False, "queue_size": 20, "bn_split": 4},
        {"method": "moco", "local_crops_number": 0},
        {"method": "swav", "queue_size": 16},
        {"method": "ibot", "patch_head": "untied"},
        {"method": "ibot", "centering": "sinkhorn", "koleo": 0.1, "registers": 2},
    ],
)
def test_a_step_does_not_synchronize(monkeypatch, precision, changes):
    """With fake tensors, which have no values: .item(), .tolist(), bool() and .cpu() raise."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # reads values
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)  # does not support fake tensors
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: pytest.fail("a step copies to the host"))
    monkeypatch.setattr("dino_kernels.nn.packing.on_gpu", lambda device: True)
    monkeypatch.setattr("dino_kernels.nn.flat_parameters._zeros", lambda n, dtype, device: torch.zeros(n, dtype=dtype))
    with FakeTensorMode():
        learner = Learner(replace(PretrainConfig(**SETTINGS, precision=precision), **changes), 2, CPU)
        for step in (0, 1, 2, 3):  # with the last layer frozen and trained
            sizes = (32, 32, *[16] * learner.config.local_crops_number)
            images = [torch.randn(8, 3, size, size) for size in sizes]
            masks = [torch.zeros(8, 2, 16, dtype=torch.bool)] if learner.config.mask_kind else []
            result = learner.step(step, images + masks)
        for read in (lambda: result.loss, lambda: bool(result.loss_tensor > 0), result.loss_tensor.tolist):
            with pytest.raises(DataDependentOutputException):
                read()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [0.4, 0.95])  # with 0.95, branches of the last block are sometimes empty
@pytest.mark.parametrize("changes", [{}, {"accumulate": 4, "checkpoint_activations": True}])
def test_skipping_dropped_samples_equals_multiplying_them_by_zero(monkeypatch, precision, rate, changes):
    from dino_kernels.nn import block

    tokens, results, forward = [], [], block.Block.forward
    for skip in (True, False):
        monkeypatch.setattr("dino_kernels.nn.packing.on_gpu", lambda device, skip=skip: not skip)
        torch.manual_seed(3)
        changed = {"drop_path_rate": rate, "precision": precision, **changes}
        learner = Learner(replace(PretrainConfig(**SETTINGS), **changed), 2, CPU)
        monkeypatch.setattr(
            block.Block, "forward", lambda self, x, y, *more: tokens.append(len(y)) or forward(self, x, y, *more)
        )
        loss, center, _ = learner._gradients(crops(0), torch.tensor(0.04))
        monkeypatch.undo()
        flat = learner.student_flat
        grads = {name: flat.view(flat.grad, name).clone() for name in flat.trained}
        results.append(([loss.item()], grads | {"center": center}))
    half = len(tokens) // 2
    assert sum(tokens[:half]) < sum(tokens[half:])
    assert_close(*results, tolerance=1e-5 if precision == "float32" else 1e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_non_finite_loss_updates_nothing(optimizer):
    torch.manual_seed(0)
    learner = Learner(PretrainConfig(**SETTINGS, optimizer=optimizer), 2, CPU)
    for step in range(3):
        learner.step(step, crops(step))
    kept = learner.student_flat.weights, learner.teacher_flat.weights, learner.method.center
    before = [x.clone() for x in kept]
    result = learner.step(3, [crop * float("nan") for crop in crops(3)])
    assert result.loss != result.loss and learner.optimizer.nonfinite == 1
    assert all(map(torch.equal, before, kept))
    assert learner.step(4, crops(4)).loss > 0 and learner.optimizer.nonfinite == 0


@pytest.mark.parametrize("optimizer, key", [("sgd", "momentum_buffer"), ("lars", "mu")])
def test_a_state_of_torchs_sgd_and_of_0_1_is_resumed(optimizer, key):
    config = PretrainConfig(**SETTINGS, optimizer=optimizer)
    torch.manual_seed(0)
    ours, resumed = Learner(config, 2, CPU), Learner(config, 2, CPU)
    for step in range(3):
        ours.step(step, crops(step))
    state = ours.state_dict()
    sgd = torch.optim.SGD(parameter_groups(ours.student), lr=0.1, momentum=0.9)
    sgd.load_state_dict(state["optimizer"])
    buffers = {i: entry["momentum_buffer"].clone() for i, entry in sgd.state_dict()["state"].items()}
    state["optimizer"] = {"state": {i: {key: buffer} for i, buffer in buffers.items()}}
    resumed.load_state_dict(state)
    for learner in (ours, resumed):
        learner.step(3, crops(3))
    assert torch.equal(ours.student_flat.weights, resumed.student_flat.weights)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layer_scale_in_a_checkpoint(precision):
    """A resumed run goes on bitwise, and an evaluation gets the same backbone with folded weights."""
    config = PretrainConfig(**SETTINGS, layer_scale=0.5, precision=precision)
    ours, resumed = Learner(config, 2, CPU), Learner(config, 2, CPU)
    ours.step(0, crops(0))
    state = copy.deepcopy(ours.state_dict())
    assert state["teacher"]["backbone.blocks.2.ls2.gamma"].shape == (96,)
    resumed.load_state_dict(state)
    for learner in (ours, resumed):
        learner.step(1, crops(1))
    assert torch.equal(ours.student_flat.weights, resumed.student_flat.weights)
    assert torch.equal(ours.teacher.backbone(crops(2)), resumed.teacher.backbone(crops(2)))
    evaluated = vit("vit_nano", patch_size=8, img_size=32)
    evaluated.load_state_dict(fold_layer_scale(backbone_weights(ours.state_dict(), net="teacher")[0]))
    expected = ours.teacher.backbone(crops(2)).float()
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert (evaluated(crops(2)) - expected).norm() < tolerance * expected.norm()


def test_invalid_switches(monkeypatch):
    with pytest.raises(ValueError, match="accumulate must be a divisor of batch_size_per_gpu 8, got 3"):
        PretrainConfig(**SETTINGS, accumulate=3)
    with pytest.raises(ValueError, match="checkpoint_activations must be false: it is for ViTs, got True"):
        PretrainConfig(arch="resnet50", checkpoint_activations=True)
    monkeypatch.setattr("dino_train.common.parallel.size", lambda: 2)
    with pytest.raises(ValueError, match="batch norm over several processes needs GPUs"):
        Learner(PretrainConfig(**SETTINGS, use_bn_in_head=True), 2, CPU)


_RANK = """
import json, sys, torch
sys.path[:0] = json.loads(sys.argv[1])
from dataclasses import replace
import test_step
from dino_train.common import parallel
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner
parallel.join(torch.device("cpu"))
torch.set_num_threads(1)
rank = parallel.rank()
torch.manual_seed(rank)
start = Learner(PretrainConfig(**test_step.SETTINGS, precision="bfloat16"), 2, torch.device("cpu"))
kept = [(flat.weights, flat.copies) for flat in (start.student_flat, start.teacher_flat)]
kept.append([net.head.last_layer.rows for net in (start.student, start.teacher)])
torch.save([x for each in kept for x in each], f"{sys.argv[3]}/start{rank}.pt")
config = replace(PretrainConfig(**test_step.SETTINGS), **json.loads(sys.argv[2]), batch_size_per_gpu=4)
result = test_step.run(config, own=slice(4 * rank, 4 * rank + 4))
torch.save(result, f"{sys.argv[3]}/{rank}.pt")
parallel.leave()
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "accumulate": 2,
            "norm_last_layer": False,
            "freeze_last_layer": 2,
            "layer_scale": 0.5,
            "clip_per_module": True,
        },
        pytest.param({"centering": "sinkhorn"}, marks=pytest.mark.slow),
        pytest.param({"method": "swav", "queue_size": 24}, marks=pytest.mark.slow),  # used from the fourth step on
        pytest.param({"method": "ibot", "centering": "sinkhorn", "patch_head": "separate"}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_process_with_the_same_batch(tmp_path, changes):
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    arguments = [
        str(script),
        json.dumps([os.path.dirname(file) for file in (__file__, tiny_run.__file__)]),
        json.dumps(changes),
        str(tmp_path),
    ]
    assert torchrun(arguments).wait(timeout=300) == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    starts = [torch.load(tmp_path / f"start{rank}.pt") for rank in range(2)]  # from different random generators
    assert all(map(torch.equal, *starts)) and len(starts[0]) == 6
    expected = run(replace(PretrainConfig(**SETTINGS), **{k: v for k, v in changes.items() if k != "accumulate"}))
    assert_close(first, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graphed_step_equals_the_eager_step(precision):
    results = []
    for cuda_graph in (False, True):
        torch.manual_seed(3)
        config = PretrainConfig(**SETTINGS | {"device": "cuda"}, precision=precision, cuda_graph=cuda_graph)
        learner = Learner(config, 5, torch.device("cuda"))  # the last layer is trained from step 5 on: a second graph
        losses = [learner.step(step, [crop.cuda() for crop in crops(step)]).loss for step in range(12)]
        results.append((losses, learner.teacher_flat.weights.clone()))
    (plain, weights), (graphed, others) = results
    assert graphed == pytest.approx(plain, rel=1e-4)
    torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_block_accepts_strided_and_missing_gradients(precision):
    """The chained ops compared with the same block of separate ops: strided gradients, one unused result."""
    torch.manual_seed(0)
    student, plain = (vit("vit_nano", patch_size=8, img_size=32) for _ in range(2))
    plain.load_state_dict(student.state_dict())
    FlatParameters(student, getattr(torch, precision))
    tokens = torch.randn(2 * 17, student.embed_dim)
    packing = Packing.of([(2, 17)], "cpu")
    wide = torch.randn(student.embed_dim, len(tokens)).t()
    row = torch.randn(student.embed_dim).expand_as(tokens)
    for grads in ((wide, wide), (row, None), (None, row)):
        results = []
        for backbone in (student, plain):
            block, norm = backbone.blocks[0], backbone.blocks[1].norm1
            leaves = tokens.clone().requires_grad_(), tokens.flip(0).requires_grad_()
            outs = block(*leaves, norm, packing)
            used = [(out, grad.to(out.dtype)) for out, grad in zip(outs, grads, strict=True) if grad is not None]
            given, weights = zip(*used, strict=True)
            results.append(torch.autograd.grad(given, leaves, weights))
        for ours, expected in zip(*results, strict=True):
            error = (ours - expected).norm() / expected.norm()
            assert error < (1e-5 if precision == "float32" else 3e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["norm2.bias", "attn.proj.weight"])
def test_a_block_without_a_gradient_buffer_is_an_error(precision, name):
    student = vit("vit_nano", patch_size=8, img_size=32)
    FlatParameters(student, getattr(torch, precision))
    block = student.blocks[0]
    block.get_parameter(name).grad = None
    packing = Packing.of([(2, 17)], "cpu")
    tokens = torch.randn(34, student.embed_dim, requires_grad=True)
    with pytest.raises(AttributeError, match="NoneType"):
        block(tokens, tokens, student.blocks[1].norm1, packing)[0].sum().backward()
