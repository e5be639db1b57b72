"""Every op as compiled code, forward and backward, compared with float64, at the fewest shapes that cover all paths.

Run by test_ptx_compiled.py in a separate process, since Triton caches kernels compiled for one target.
"""

import math
import re

import numpy as np
import pytest
import torch
from ptx import launch
from ptx.dino_ops import FOLDER, use_triton

import dino_kernels as D
from dino_kernels._core.native import JITTER
from dino_kernels.ops.weight_norm import weight_norm_backward_reference_
from dino_kernels.triton.column_sums import add_column_sums
from dino_kernels.triton.mlp import hidden_triton

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
ERROR = {FULL: 2e-5, HALF: 2e-3, BRAIN: 1.5e-2}  # relative to the largest exact value


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    use_triton(monkeypatch.setattr)
    torch.manual_seed(0)


def randn(*shape, dtype=FULL, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def values_and_gradients(op, inputs, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = op(*leaves, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    used = [out for out in outs if out.requires_grad]
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=g).to(out.dtype) for out in used]
    return *(out.detach() for out in outs), *torch.autograd.grad(used, leaves, grads)


def assert_close(actual, exact, dtype):
    for ours, truth in zip(actual, exact, strict=True):
        error = (ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-2)
        assert error <= ERROR[dtype], error.item()


def check(op, reference, inputs, dtype, **options):
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    actual = values_and_gradients(op, inputs, **options)
    assert_close(actual, values_and_gradients(reference, [x.double() for x in inputs], **exact), dtype)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "dtype, channels, groups",
    [
        (BRAIN, 64, [(1, 197), (2, 37)]),
        (HALF, 40, [(1, 33), (1, 330)]),
        *(
            pytest.param(*case, marks=pytest.mark.prove)
            for case in [
                (FULL, 64, [(1, 5), (1, 37)]),
                (HALF, 64, [(1, 1), (2, 5), (1, 257)]),
                (BRAIN, 32, [(1, 37), (1, 65)]),
                (BRAIN, 128, [(1, 37), (1, 100)]),
                (HALF, 256, [(1, 70)]),
                (FULL, 128, [(1, 400)]),
            ]
        ),
    ],
)
def test_attention(dtype, channels, groups, known):
    lengths = [length for count, length in groups for _ in range(count)]
    qkv = randn(sum(lengths), 3, 2, channels, dtype=dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    options = {"cu_seqlens": bounds, "groups": groups if known else None}
    check(D.attention, D.attention_reference, [qkv], dtype, **options)


@pytest.mark.parametrize(
    "dtype, batch, views, channels, outputs",
    [
        (BRAIN, 7, 4, 64, 129),
        (HALF, 2, 10, 256, 777),
        *(
            pytest.param(*case, marks=pytest.mark.prove)
            for case in [
                (FULL, 1, 3, 16, 37),
                (BRAIN, 3, 3, 37, 199),
                (HALF, 33, 2, 128, 97),
                (BRAIN, 2, 10, 256, 4099),
            ]
        ),
    ],
)
def test_dino_head_loss(dtype, batch, views, channels, outputs):
    rows = (views * batch, 2 * batch, outputs, outputs)
    z, teacher, weight, other = (torch.nn.functional.normalize(randn(n, channels), dim=-1).to(dtype) for n in rows)
    rest = {"teacher_z": teacher, "weight_teacher": other, "center": randn(outputs, scale=0.02)}

    def both(op):
        return lambda z, weight, teacher_z, weight_teacher, center: op(z, teacher_z, weight, weight_teacher, center)

    check(both(D.dino_head_loss), both(D.dino_head_loss_reference), [z, weight], dtype, **rest)


@pytest.mark.parametrize("among", [True, False])
@pytest.mark.parametrize(
    "dtype, rows, outputs, channels",
    [
        (BRAIN, 70, 9000, 128),
        (HALF, 3, 199, 37),
        (FULL, 5, 130, 16),
        *(
            pytest.param(*case, marks=pytest.mark.prove)
            for case in [(BRAIN, 33, 777, 256), (HALF, 1, 1, 1), (FULL, 17, 300, 256)]
        ),
    ],
)
def test_info_nce(dtype, rows, outputs, channels, among):
    sizes = (rows, rows, outputs)
    query, positive, keys = (torch.nn.functional.normalize(randn(n, channels), dim=1).to(dtype) for n in sizes)
    options = {"labels": torch.randint(outputs, (rows,))} if among else {"positive": positive}

    def form(op):
        return lambda query, positive=None, **options: op(query, positive, **options)

    check(form(D.info_nce), form(D.info_nce_reference), [query], dtype, keys=keys, temp=0.2, scale=1.5, **options)


@pytest.mark.parametrize(
    "dtype, batch, views, outputs",
    [
        (BRAIN, 2, 10, 4099),
        (HALF, 3, 2, 777),
        (FULL, 2, 4, 1024),
        pytest.param(FULL, 2, 3, 1, marks=pytest.mark.prove),
        pytest.param(BRAIN, 1, 3, 65536, marks=pytest.mark.prove),
    ],
)
def test_dino_loss(dtype, batch, views, outputs):
    student, teacher = (randn(n * batch, outputs, dtype=dtype, scale=0.3) for n in (views, 2))
    check(D.dino_loss, D.dino_loss_reference, [student], dtype, teacher=teacher, center=randn(outputs, scale=0.1))


@pytest.mark.parametrize(
    "dtype, rows, outputs",
    [
        (BRAIN, 12, 4099),
        (HALF, 5, 777),
        (FULL, 11, 1024),
        pytest.param(FULL, 3, 2, marks=pytest.mark.prove),
        pytest.param(HALF, 1030, 130, marks=pytest.mark.prove),
        pytest.param(BRAIN, 3, 65536, marks=pytest.mark.prove),
    ],
)
def test_patch_loss(dtype, rows, outputs):
    student, teacher = (randn(rows, outputs, dtype=dtype, scale=0.3) for _ in range(2))
    weights = torch.rand(rows)
    weights[1::3] = 0
    student[1::3] = teacher[1::3] = torch.nan
    options = {"teacher": teacher, "center": randn(outputs, scale=0.1), "weights": weights}
    check(D.patch_loss, D.patch_loss_reference, [student], dtype, **options)


@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize(
    "dtype, rows, outputs",
    [
        (BRAIN, 37, 8200),
        (HALF, 9, 777),
        (FULL, 300, 1024),
        *(pytest.param(*case, marks=pytest.mark.prove) for case in [(FULL, 1, 1), (BRAIN, 3, 65536), (HALF, 2, 8192)]),
    ],
)
def test_column_mass(dtype, rows, outputs, some):
    logits, center = randn(rows, outputs, dtype=dtype, scale=0.3), randn(outputs, scale=0.1)
    counted = torch.arange(rows) % 3 != 1 if some else None
    for given in (None, center):
        exact = D.column_mass_reference(logits.double(), given, temp=0.05, counted=counted)
        assert_close(D.column_mass(logits, given, temp=0.05, counted=counted), exact, FULL)


@pytest.mark.parametrize(
    "dtype, tokens, channels",
    [(BRAIN, 20, 1536), (HALF, 257, 37), pytest.param(FULL, 37, 1, marks=pytest.mark.prove)],
)
def test_bias_gelu(dtype, tokens, channels):
    check(D.bias_gelu, D.bias_gelu_reference, [randn(tokens, channels, dtype=dtype), randn(channels)], dtype)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    "dtype, tokens, channels",
    [(BRAIN, 257, 384), (HALF, 21, 777), pytest.param(FULL, 37, 3, marks=pytest.mark.prove)],
)
def test_add_layer_norm(dtype, tokens, channels, scaled):
    inputs = [randn(tokens, channels), randn(tokens, channels, dtype=dtype), *(1 + randn(2, channels) / 2)]
    scale = randn(tokens).relu() if scaled else None
    check(D.add_layer_norm, D.add_layer_norm_reference, inputs, dtype, scale=scale)


@pytest.mark.parametrize(
    "dtype, outputs, channels",
    [(BRAIN, 300, 256), (FULL, 2, 2500), pytest.param(FULL, 507, 3, marks=pytest.mark.prove)],
)
def test_weight_norm(dtype, outputs, channels):
    v, g, grad = randn(outputs, channels), randn(outputs, 1).abs() + 0.5, randn(outputs, channels, dtype=dtype)
    out = D.weight_norm_(torch.empty(outputs, channels, dtype=dtype), v, g)
    into, exact = [[randn(1, 1).expand_as(x).clone() for x in (v, g)] for _ in range(2)]
    exact = [x.double() for x in into]
    torch.ops.dino_kernels.weight_norm_backward_(*into, grad, v, g)
    weight_norm_backward_reference_(*exact, grad.double(), v.double(), g.double())
    truth = D.weight_norm_reference_(torch.empty_like(v).double(), v.double(), g.double())
    assert_close([out, *into], [truth, *exact], dtype)


@pytest.mark.parametrize("dtype, tokens, channels", [(BRAIN, 257, 1152), (FULL, 37, 5)])
def test_column_sums(dtype, tokens, channels):
    x, into = randn(tokens, channels, dtype=dtype), randn(channels)
    exact = into.double() + x.double().sum(0)
    add_column_sums(x, into)
    assert_close([into], [exact], FULL)


@pytest.mark.parametrize(
    "dtype, tokens, channels, hidden",
    [(BRAIN, 130, 192, 136), (HALF, 37, 40, 256), pytest.param(BRAIN, 257, 384, 512, marks=pytest.mark.prove)],
)
def test_mlp(dtype, tokens, channels, hidden):
    x, weight, bias = randn(tokens, channels, dtype=dtype), randn(hidden, channels, dtype=dtype), randn(hidden)
    product, active = hidden_triton(x, weight, bias, True)
    exact = x.double() @ weight.double().t()
    assert_close([product, active], [exact, torch.nn.functional.gelu(exact + bias.double())], dtype)
    assert torch.equal(hidden_triton(x, weight, bias, False)[1], active)


@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9, dtype=torch.float64)])
def test_ema_update(momentum):
    shapes = [(1,), (37,), (199, 3), (4096,), (4777,)]
    targets, sources = (
        [randn(*s) for s in shapes],
        [randn(*s, dtype=t) for s, t in zip(shapes, (FULL, HALF, BRAIN, FULL, HALF), strict=True)],
    )
    exact = [0.9 * t.double() + 0.1 * s.double() for t, s in zip(targets, sources, strict=True)]
    D.ema_update_(targets, sources, momentum)
    assert_close(targets, exact, FULL)


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
@pytest.mark.parametrize(
    "sizes, shape, grouped",
    [
        ([64, 1, 507, 37, 5000, 48, 1536], (37, 40), False),
        ([64, 1, 507, 37, 5000, 48, 1536], (37, 40), True),
        ([4096, 16, 8192 + 32, 48, 1536], (37, 40), False),
        ([507, 32, 4096], (32, 128), False),
    ],
)
def test_adamw_ema(dtype, sizes, shape, grouped):
    """The last two segments are weight_g and weight_v of a weight-normalized layer, padded or multiples of a block."""
    offsets = np.cumsum([0, *sizes]).tolist()
    count, names = len(sizes), ("student", "grad", "exp_avg", "exp_avg_sq", "teacher")
    state = {name: randn(offsets[-1]) for name in names}
    state["exp_avg_sq"] = state["exp_avg_sq"].abs()
    state["grad"] = state["grad"].to(dtype)
    numbers = {
        "offsets": offsets, "steps": torch.arange(count), "decayed": torch.arange(count) % 2 == 0,
        "frozen": torch.arange(count) == 1, "nonfinite": torch.zeros((), dtype=torch.int32),
        "lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "clip_norm": 3.0,
        **({"lr_scale": torch.linspace(0, 1, count), "clip_groups": torch.arange(count) % 2} if grouped else {}),
    }  # fmt: skip
    exact = {name: value.double() for name, value in state.items()}
    copies = {f"{net}_16": torch.zeros(offsets[-1], dtype=BRAIN) for net in ("student", "teacher")}
    rows = tuple(torch.empty(shape, dtype=BRAIN) for _ in range(2))
    D.adamw_ema_step_reference_(**exact, **{**numbers, "steps": numbers["steps"].clone()})
    D.adamw_ema_step_(**state, **numbers, **copies, rows=rows)
    assert_close(
        [state[name] for name in names if name != "grad"], [exact[name] for name in names if name != "grad"], FULL
    )
    assert torch.equal(numbers["steps"], torch.arange(count) + (torch.arange(count) != 1)) and not numbers["nonfinite"]
    assert torch.equal(copies["student_16"][: offsets[-3]], state["student"][: offsets[-3]].bfloat16())
    for out, net in zip(rows, ("student", "teacher"), strict=True):
        g, v = exact[net][offsets[-3] :][: shape[0], None], exact[net][offsets[-2] :][: math.prod(shape)].view(shape)
        assert_close([out], [g * v / v.norm(dim=1, keepdim=True)], BRAIN)


@pytest.mark.parametrize("larc", [False, True])
@pytest.mark.parametrize(
    "dtype, sizes, shape", [(FULL, [507, 48, 1536], (37, 40)), (BRAIN, [8192 + 32, 32, 4096], (32, 128))]
)
def test_sgd_ema(dtype, sizes, shape, larc):
    """As `test_adamw_ema`; LARS adapts the last two segments."""
    offsets, names = np.cumsum([0, *sizes]).tolist(), ("student", "grad", "momentum_buffer", "teacher")
    state = {name: randn(offsets[-1]) for name in names}
    state["grad"] = state["grad"].to(dtype)
    flags = torch.tensor([larc, True, True])
    numbers = {
        "offsets": offsets, "decayed": flags, "adapted": flags, "frozen": torch.zeros(3, dtype=torch.bool),
        "nonfinite": torch.zeros((), dtype=torch.int32), "larc": larc,
        "lr": 2.0, "weight_decay": 0.1, "momentum": 0.9, "clip_norm": 3.0,
    }  # fmt: skip
    exact = {name: value.double() for name, value in state.items()}
    rows = tuple(torch.empty(shape, dtype=BRAIN) for _ in range(2))
    D.sgd_ema_step_reference_(**exact, **numbers)
    D.sgd_ema_step_(**state, **numbers, rows=rows)
    written = [name for name in names if name != "grad"]
    assert_close([state[name] for name in written], [exact[name] for name in written], FULL)
    assert not numbers["nonfinite"]
    for out, net in zip(rows, ("student", "teacher"), strict=True):
        g, v = exact[net][offsets[-3] :][: shape[0], None], exact[net][offsets[-2] :][: math.prod(shape)].view(shape)
        assert_close([out], [g * v / v.norm(dim=1, keepdim=True)], BRAIN)


@pytest.mark.parametrize("dtype", [BRAIN, pytest.param(torch.uint8, marks=pytest.mark.prove)])
def test_multicrop(dtype):
    """Bitwise equal to the CPU, with every step of a crop."""
    height, width = 45, 60
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    kinds = [D.CropKind(40, (0.4, 1), 1.0, 1.0), D.CropKind(18, (0.05, 0.4), 1.0, 0.0)]
    crops = D.draw_crops(1, 0, 0, kinds, (height, width))[None]
    crops["jitter"], crops["order"] = True, range(len(JITTER))
    ours, cpu = ([torch.empty(1, 3, kind.size, kind.size, dtype=dtype) for kind in kinds] for _ in range(2))
    D.multicrop([image.numpy()], crops, cpu)
    D.multicrop_packed(image.flatten(), np.array([[0, height, width]]), crops, ours)
    for a, b in zip(ours, cpu, strict=True):
        assert torch.equal(a, b)


def test_every_kernel_was_executed(request):
    """The last test: the tests above launch every kernel of the ops."""
    if request.config.option.keyword or len(request.session.items) < 20:
        pytest.skip("not all tests were run")
    source = "".join(path.read_text() for path in FOLDER.rglob("*.py"))
    executed = {used.program.kernel.name for used in launch.usage.values()}
    assert set(re.findall(r"\b(_\w*kernel)\[", source)) <= executed
