"""What only a GPU can show: every op inside a captured CUDA graph, which proves that it never waits for the host."""

import pytest
import torch

from dino_kernels import (
    adamw_ema_step_,
    add_layer_norm,
    attention,
    bias_gelu,
    dino_head_loss,
    dino_loss,
    ema_update_,
    patch_loss,
    sgd_ema_step_,
    sinkhorn_center,
)

pytestmark = pytest.mark.gpu


def uniform(*shape, dtype=torch.float32):
    return torch.rand(shape, device="cuda").to(dtype)


def differentiated(op, *inputs):
    """(inputs, step): outputs of op and the gradients of the inputs."""

    def step():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = op(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        needed = [out for out in outs if out.requires_grad]
        grads = torch.autograd.grad(needed, leaves, [torch.ones_like(out) for out in needed])
        return *(out.detach() for out in outs), *grads

    return inputs, step


def loss(inplace):
    teacher, center, temp = uniform(4, 1000), uniform(1000), torch.tensor(0.1, device="cuda")

    def op(student):  # in place over the result of a sum, whose backward pass needs none of its values
        return dino_loss(student + 1, teacher, center, student_temp=temp, inplace=inplace)

    return differentiated(op, uniform(20, 1000))


def masked(inplace):
    teacher, center, weights = uniform(20, 1000), uniform(1000), uniform(20)
    weights[3::4] = 0

    def op(student):
        return patch_loss(student + 1, teacher, center, weights=weights, inplace=inplace)

    return differentiated(op, uniform(20, 1000))


def head_loss(store_logits):
    teacher_z, weight_teacher = uniform(4, 64, dtype=torch.bfloat16), uniform(1000, 64, dtype=torch.bfloat16)
    center = uniform(1000)

    def op(z, weight):
        return dino_head_loss(z, teacher_z, weight, weight_teacher, center, store_logits=store_logits)

    return differentiated(op, uniform(20, 64, dtype=torch.bfloat16), uniform(1000, 64, dtype=torch.bfloat16))


def sinkhorn():
    """Of rows that a program holds, and of longer ones."""
    logits, temp = (uniform(20, 1000), uniform(20, 9000)), torch.tensor(0.1, device="cuda")
    return logits, lambda: tuple(sinkhorn_center(x, temp=temp) for x in logits)


def packed_attention():
    bounds = torch.tensor([0, 37, 100], device="cuda", dtype=torch.int32)
    return differentiated(lambda qkv: attention(qkv, bounds), uniform(100, 3, 2, 64, dtype=torch.bfloat16))


def norm():
    scale = uniform(50)
    inputs = uniform(50, 384), uniform(50, 384, dtype=torch.bfloat16), uniform(384), uniform(384)
    return differentiated(lambda *xs: add_layer_norm(*xs, scale=scale), *inputs)


def gelu():
    return differentiated(bias_gelu, uniform(50, 384, dtype=torch.bfloat16), uniform(384))


def ema():
    targets, sources = [uniform(5000), uniform(3, 7)], [uniform(5000), uniform(3, 7)]
    momentum = torch.tensor(0.5, dtype=torch.float64, device="cuda")

    def step():
        ema_update_(targets, sources, momentum)
        return ()

    return (*targets, *sources, momentum), step


def optimizer(op, moments, **own):
    flat = [uniform(5000) for _ in range(3 + moments)]
    settings = [torch.tensor(value, dtype=torch.float64, device="cuda") for value in (0.01, 0.1, 0.9)]
    options = own | {
        "offsets": [0, 16, 5000],
        "decayed": torch.tensor([True, False], device="cuda"),
        "frozen": torch.tensor([False, False], device="cuda"),
        "nonfinite": torch.zeros((), dtype=torch.int32, device="cuda"),
        "student_16": torch.zeros(5000, dtype=torch.bfloat16, device="cuda"),
    }

    def step():
        if "steps" in own:
            own["steps"].zero_()  # or the replay would count on
        lr, weight_decay, momentum = settings
        op(*flat, **options, lr=lr, weight_decay=weight_decay, momentum=momentum, clip_norm=3.0)
        return ()

    return (*flat, *settings), step


def adamw(**options):
    return optimizer(adamw_ema_step_, 2, steps=torch.zeros(2, dtype=torch.int64, device="cuda"), **options)


def grouped_adamw():
    return adamw(lr_scale=torch.rand(2, device="cuda"), clip_groups=torch.zeros(2, dtype=torch.int64, device="cuda"))


def lars():
    return optimizer(sgd_ema_step_, 1, adapted=torch.tensor([True, False], device="cuda"))


def known_attention():
    bounds = torch.tensor([0, 37, 234], device="cuda", dtype=torch.int32)
    op = lambda qkv: attention(qkv, bounds, groups=[(1, 37), (1, 197)])  # noqa: E731
    return differentiated(op, uniform(234, 3, 2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: loss(False), id="dino_loss"),
        pytest.param(lambda: loss(True), id="dino_loss in place"),
        pytest.param(lambda: masked(False), id="patch_loss"),
        pytest.param(lambda: masked(True), id="patch_loss in place"),
        pytest.param(lambda: head_loss(False), id="dino_head_loss"),
        pytest.param(lambda: head_loss(True), id="dino_head_loss with logits"),
        pytest.param(sinkhorn, id="sinkhorn_center"),
        pytest.param(packed_attention, id="attention"),
        pytest.param(known_attention, id="attention of known lengths"),
        pytest.param(adamw, id="adamw_ema_step_"),
        pytest.param(grouped_adamw, id="adamw_ema_step_ with rates and groups"),
        pytest.param(lars, id="sgd_ema_step_"),
        pytest.param(norm, id="add_layer_norm"),
        pytest.param(gelu, id="bias_gelu"),
        pytest.param(ema, id="ema_update_"),
    ],
)
def test_op_replays_in_a_cuda_graph(make):
    inputs, step = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and warm up outside the graph
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in inputs:  # new values in the same memory
        x.uniform_()
    before = [x.clone() for x in inputs]
    graph.replay()
    replayed = [x.clone() for x in (*captured, *inputs)]
    for x, value in zip(inputs, before, strict=True):
        x.copy_(value)
    plain = step()
    for ours, expected in zip(replayed, (*plain, *inputs), strict=True):
        assert expected.isfinite().all()
        assert torch.equal(ours, expected)
