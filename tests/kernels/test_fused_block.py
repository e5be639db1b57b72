import copy

import numpy as np
import pytest
import torch
from dino_train.models.vit import build_model

from dino_kernels import FusedBlock
from dino_kernels._core.native import Products
from dino_kernels.nn import Branch, FlatParameters, Packing, block
from dino_kernels.ops.linear import products_of

GROUPS = [(3, 50), (5, 17)]
BOUNDS = torch.tensor([0, 50, 100, 150, 167, 184, 201, 218, 235], dtype=torch.int32)


def results(dtype: torch.dtype, skipping: bool, used: tuple[bool, bool]) -> dict[str, torch.Tensor]:
    """Of a block: its outputs and all gradients, added to ones."""
    torch.manual_seed(1)
    options = {"norm_last_layer": True, "head_hidden_dim": 64, "head_bottleneck_dim": 32}
    shape = {"patch_size": 16, "img_size": 32, "out_dim": 64, "drop_path_rate": 0.0, "use_bn_in_head": False}
    student = build_model("vit_tiny", **shape, **options)
    for parameter in student.backbone.parameters():  # biases that bfloat16 holds: the ops take them rounded
        parameter.data = torch.randn(parameter.shape).mul(0.1).bfloat16().float()
    student = copy.deepcopy(student)  # what blocks keep of their parameters is the copy's
    flat = FlatParameters(student, dtype)
    flat.grad.fill_(1)
    packing, generator = Packing(BOUNDS, GROUPS), np.random.default_rng(2)
    kept, factors = generator.random((3, 8)) < 0.6, np.full(3, 1 / 0.6, np.float32)
    branches = tuple(Branch.of_kept(packing, kept, factors)) if skipping else (Branch(packing),) * 3
    rows = branches[0].rows
    x = torch.randn(235, 192, requires_grad=True)
    normed = torch.randn(235 if rows is None else len(rows), 192).to(dtype).requires_grad_()
    third, after = student.backbone.blocks[3], student.backbone.blocks[4].norm1
    outputs = third(x, normed, after, packing, branches)
    with torch.no_grad():
        for a, b in zip(outputs, third(x, normed, after, packing, branches), strict=True):
            assert torch.equal(a, b)
    grads = [torch.randn_like(y) for y in outputs]
    chosen = [i for i in range(2) if used[i]]
    torch.autograd.backward([outputs[i] for i in chosen], [grads[i] for i in chosen])
    return dict(zip("xn", outputs, strict=True)) | {"gx": x.grad, "gn": normed.grad, "weights": flat.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("skipping", [False, True])
def test_it_is_bitwise_the_ops_one_by_one(monkeypatch, products, dtype, skipping, used):
    if products_of(torch.zeros(1, 32, dtype=dtype)) == Products.library:
        pytest.skip("it is the ops one by one")
    calls = []
    forward = FusedBlock.forward
    monkeypatch.setattr(FusedBlock, "forward", lambda *args: calls.append(1) or forward(*args))
    whole = results(dtype, skipping, used)
    assert len(calls) == 2
    monkeypatch.setattr(FusedBlock, "fits", lambda *_: False)
    for name, expected in results(dtype, skipping, used).items():
        assert (whole[name] is None) == (expected is None), name
        assert expected is None or torch.equal(whole[name], expected), name
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skipping", [False, True])
def test_the_operands_of_a_gpu_give_the_same(monkeypatch, dtype, skipping):
    """There the biases' gradients are sums of the norms' passes, and the last bias is taken as rounded."""
    monkeypatch.setattr(FusedBlock, "fits", lambda *_: False)
    expected = results(dtype, skipping, (True, True))
    sums = []
    norm_gradients = block._norm_gradients
    monkeypatch.setattr(block, "_norm_gradients", lambda *args: sums.append(args[-1]) or norm_gradients(*args))
    monkeypatch.setattr("dino_kernels._core.device.GPU_TYPES", {"cpu"})
    for name, ours in results(dtype, skipping, (True, True)).items():
        tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(ours, expected[name], **tolerance)
    assert len(sums) == 2 and all(len(x) == 192 for x in sums)
