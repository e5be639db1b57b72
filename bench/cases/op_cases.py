"""Cases of gpu.py: each op of dino_kernels and its peers, at the reference sizes or at toy sizes.

All providers of a case compute the same results from the same inputs; a test checks this at toy sizes, and every run at
its own sizes. A provider is a function without arguments; the first is ours, "reference" is plain PyTorch in the same
dtype. If the op writes in place, each provider has its own state. Losses, updates and crops are here, the other ops in
block_cases.py.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from bench_dino_loss import einsum_form
from bench_info_nce import concatenation
from bench_patch_loss import softmaxes
from bench_sinkhorn import center_and_softmax, iterations, reference
from block_cases import add_layer_norm, attention_cases, bias_gelu, linear, mlp
from gpu_report import OURS
from setting import CROPS, Case, Provider, Random, Sizes, compiled, name_of
from torch import Tensor

import dino_kernels

# --- loss --------------------------------------------------------------------------------------------


def dino_loss(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Logits to loss, batch center and the gradient of the logits."""
    g, outputs = Random(device), sizes.outputs
    rows, teachers = sizes.views * sizes.images, 2 * sizes.images
    # Same scale as cosines of 256-dimensional vectors, the output of a weight-normalized last layer.
    student, teacher = ((g.normal(n, outputs) / 16).to(dtype) for n in (rows, teachers))
    center = g.normal(outputs) / 100
    overwritten = student.clone()  # by its gradient

    def run(op, student=student, teacher=teacher, center=center):
        student = student.detach().requires_grad_()
        loss, batch_center = op(student, teacher, center)
        return loss.detach(), batch_center, *torch.autograd.grad(loss, student)

    reference = dino_kernels.dino_loss_reference
    providers = {
        OURS: partial(run, dino_kernels.dino_loss),
        f"{OURS}, in place": partial(run, partial(dino_kernels.dino_loss, inplace=True), overwritten),
        "reference": partial(run, reference),
        "einsum": partial(run, einsum_form),
        "compiled reference": partial(run, compiled(reference)),
        "compiled einsum": partial(run, compiled(einsum_form)),
    }
    return Case(
        op="dino_loss, forward + backward",
        shape=f"student [{rows}, {outputs}], teacher [{teachers}, {outputs}]",
        dtype=name_of(dtype),
        bytes=(2 * rows + teachers) * outputs * dtype.itemsize + 8 * outputs,
        flops=0,
        results=("loss", "batch center", "grad"),
        providers=providers,
        exact=lambda: run(reference, student.double(), teacher.double(), center.double()),
    )


def patch_loss(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Logits of masked patches, half of those of half of the views, to loss, batch center and gradient."""
    g, outputs = Random(device), sizes.outputs // 8
    rows = 2 * sizes.images * (sizes.tokens[0] - 1) // 4
    student, teacher = ((g.normal(rows, outputs) / 16).to(dtype) for _ in range(2))
    center, weights = g.normal(outputs) / 100, torch.full((rows,), 1 / rows, device=device)
    overwritten = student.clone()  # by its gradient

    def run(op, student=student, teacher=teacher, center=center):
        student = student.detach().requires_grad_()
        loss, batch_center = op(student, teacher, center, weights=weights)
        return loss.detach(), batch_center, *torch.autograd.grad(loss, student)

    return Case(
        op="patch_loss, forward + backward",
        shape=f"student and teacher [{rows}, {outputs}]",
        dtype=name_of(dtype),
        bytes=3 * rows * outputs * dtype.itemsize + 8 * outputs,
        flops=0,
        results=("loss", "batch center", "grad"),
        providers={
            OURS: partial(run, dino_kernels.patch_loss),
            f"{OURS}, in place": partial(run, partial(dino_kernels.patch_loss, inplace=True), overwritten),
            "reference": partial(run, softmaxes),
            "compiled reference": partial(run, compiled(softmaxes)),
        },
        exact=lambda: run(softmaxes, student.double(), teacher.double(), center.double()),
    )


def dino_head_loss(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Bottleneck output to loss, batch center and the gradients of bottleneck output and last layer.

    A "span" starts from the float32 weight_v and weight_g of the last layer, as in the reference: weight norm of
    student and teacher, casts, GEMMs, loss, and the backward to weight_v and weight_g.
    """
    g, outputs, channels = Random(device), sizes.outputs, sizes.bottleneck
    rows, teachers = sizes.views * sizes.images, 2 * sizes.images
    zs = [F.normalize(g.normal(n, channels), dim=-1).to(dtype) for n in (rows, teachers)]
    directions = [g.normal(outputs, channels) for _ in range(2)]
    lengths = [torch.ones(outputs, 1, device=device) for _ in range(2)]
    center = g.normal(outputs) / 100

    def weights(directions, lengths):
        return [torch._weight_norm(v, length, 0).to(dtype) for v, length in zip(directions, lengths, strict=True)]

    layers = weights(directions, lengths)

    def run(op, zs=zs, layers=layers, center=center):
        z, weight = (x.detach().requires_grad_() for x in (zs[0], layers[0]))
        loss, batch_center = op(z, zs[1], weight, layers[1], center)
        return loss.detach(), batch_center, *torch.autograd.grad(loss, [z, weight])

    def span(op):
        z, v, length = (x.detach().requires_grad_() for x in (zs[0], directions[0], lengths[0]))
        weight, weight_teacher = weights([v, directions[1]], [length, lengths[1]])
        loss, batch_center = op(z, zs[1], weight, weight_teacher, center)
        return loss.detach(), batch_center, *torch.autograd.grad(loss, [z, weight, v, length])[:2]

    def einsum(z, teacher_z, weight, weight_teacher, center):
        return einsum_form(F.linear(z, weight), F.linear(teacher_z, weight_teacher), center)

    ours, reference = dino_kernels.dino_head_loss, dino_kernels.dino_head_loss_reference
    stored = partial(ours, store_logits=True)
    providers = {
        OURS: partial(run, ours),
        f"{OURS}, stored logits": partial(run, stored),
        f"{OURS}, span": partial(span, ours),
        f"{OURS}, stored logits, span": partial(span, stored),
        "reference": partial(run, reference),
        "reference span": partial(span, reference),
        "einsum span": partial(span, einsum),
        "compiled einsum": partial(run, compiled(einsum)),
    }
    return Case(
        op="dino_head_loss, forward + backward",
        shape=f"z [{rows}, {channels}] and [{teachers}, {channels}], W [{outputs}, {channels}]",
        dtype=name_of(dtype),
        bytes=((2 * rows + teachers) * channels + 3 * outputs * channels) * dtype.itemsize + 8 * outputs,
        flops=3 * 2 * (rows + teachers) * outputs * channels,  # logits, gradient of z, gradient of W
        results=("loss", "batch center", "grad z", "grad W"),
        providers=providers,
        exact=lambda: run(reference, [z.double() for z in zs], [w.double() for w in layers], center.double()),
    )


def sinkhorn(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Teacher logits to the assignments of three iterations of Sinkhorn-Knopp."""
    rows, outputs = 2 * sizes.images, sizes.outputs
    logits = (Random(device).normal(rows, outputs) / 16).to(dtype)
    forms = {OURS: center_and_softmax, "reference": reference, "iterations": iterations}
    return Case(
        op="Sinkhorn-Knopp, 3 iterations and softmax",
        shape=f"[{rows}, {outputs}]",
        dtype=name_of(dtype),
        bytes=rows * outputs * (dtype.itemsize + 4),
        flops=0,
        results=("assignments",),
        providers={name: partial(lambda form: (form(logits),), form) for name, form in forms.items()},
        exact=lambda: (reference(logits.double()),),
    )


def info_nce(device: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Queries, their keys and a queue to the loss and the gradient of the queries."""
    g, rows, outputs, channels = Random(device), sizes.images, sizes.outputs, 128
    query, positive, keys = (F.normalize(g.normal(n, channels), dim=1).to(dtype) for n in (rows, rows, outputs))
    columns = keys.t().contiguous()

    def run(op, query=query, positive=positive, keys=keys):
        query = query.detach().requires_grad_()
        loss = op(query, positive, keys)
        return loss.detach(), *torch.autograd.grad(loss, query)

    return Case(
        op="info_nce, forward + backward",
        shape=f"queries [{rows}, {channels}], keys [{outputs}, {channels}]",
        dtype=name_of(dtype),
        bytes=(3 * rows + outputs) * channels * dtype.itemsize,
        flops=2 * 2 * rows * outputs * channels,  # logits, gradient of the queries
        results=("loss", "grad"),
        providers={
            OURS: partial(run, dino_kernels.info_nce),
            "reference": partial(run, dino_kernels.info_nce_reference),
            "concatenation": partial(run, concatenation, keys=columns),
        },
        exact=lambda: run(dino_kernels.info_nce_reference, query.double(), positive.double(), keys.double()),
    )


def last_layer(device: str, sizes: Sizes) -> Case:
    """Gradient of the last layer from the gradient of the logits, through weight norm, and its normalized weight."""
    g, rows = Random(device), sizes.views * sizes.images
    v, x = g.normal(sizes.outputs, sizes.bottleneck), g.normal(rows, sizes.bottleneck).to(torch.bfloat16)
    grad = g.normal(rows, sizes.outputs).to(torch.bfloat16)
    length, out = torch.ones(len(v), 1, device=device), torch.empty_like(v, dtype=torch.bfloat16)
    grad_v = torch.zeros_like(v)

    def ours():
        dino_kernels.weight_norm_(out, v, length)
        dino_kernels.weight_norm_product_backward_(grad_v, None, grad, x, v, length, overwrite=True)
        return out, grad_v

    def plain(v, length, grad, x):
        leaf = v.detach().requires_grad_()
        weight = torch._weight_norm(leaf, length, 0)
        return weight.detach().to(x.dtype), *torch.autograd.grad(weight, leaf, (grad.t() @ x).to(v.dtype))

    return Case(
        op="weight norm, last layer's gradient",
        shape=f"logits [{rows}, {sizes.outputs}], W [{sizes.outputs}, {sizes.bottleneck}]",
        dtype="bfloat16",
        bytes=(rows * sizes.outputs + rows * sizes.bottleneck) * 2 + v.numel() * (4 + 2 + 4),
        flops=2 * rows * v.numel(),
        results=("rows", "grad v"),
        providers={OURS: ours, "reference": lambda: plain(v, length, grad, x)},
        exact=lambda: plain(v.double(), length.double(), grad.double(), x.double()),
    )


# --- updates -----------------------------------------------------------------------------------------


def parameter_shapes(sizes: Sizes) -> list[tuple[int, ...]]:
    """Parameter shapes of a ViT with patch size 16 and its head."""
    w, hidden, bottleneck = sizes.width, sizes.hidden, sizes.bottleneck
    block = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    backbone = [(1, 1, w), (1, sizes.tokens[0], w), (w, 3, 16, 16), (w,), *(block * sizes.depth), (w,), (w,)]
    head = [(hidden, w), (hidden,), (hidden, hidden), (hidden,), (bottleneck, hidden), (bottleneck,)]
    return [*backbone, *head, (sizes.outputs, bottleneck)]


def ema_update(device: str, sizes: Sizes) -> Case:
    g, shapes = Random(device), parameter_shapes(sizes)
    targets, sources = ([g.normal(*shape) for shape in shapes] for _ in range(2))
    momentum = 0.996
    on_device = torch.tensor(momentum, dtype=torch.float64, device=device)

    def provider(op, momentum) -> Provider:
        own = [t.clone() for t in targets]

        def run():
            op(own, sources, momentum)
            return (own,)

        return run

    def exact():
        own = [t.double() for t in targets]
        dino_kernels.ema_update_reference_(own, [s.double() for s in sources], momentum)
        return (own,)

    parameters = sum(t.numel() for t in targets)
    return Case(
        op="ema_update_",
        shape=f"{len(shapes)} tensors, {parameters / 1e6:.4g} M parameters",
        dtype="float32",
        bytes=12 * parameters,
        flops=0,
        results=("targets",),
        providers={
            OURS: provider(dino_kernels.ema_update_, on_device),
            "reference": provider(dino_kernels.ema_update_reference_, momentum),
            "_foreach_lerp_": provider(torch._foreach_lerp_, 1 - momentum),
        },
        exact=exact,
    )


class Flat:
    """Tensors of some shapes in flat buffers, padded like the segments of FlatParameters; their random values."""

    def __init__(self, device: str, shapes: Sequence[tuple[int, ...]]) -> None:
        g, self.device, self.shapes = Random(device), device, shapes
        self.counts = [torch.Size(shape).numel() for shape in shapes]
        padded = [(count + 15) // 16 * 16 for count in self.counts]
        self.offsets = [sum(padded[:i]) for i in range(len(padded) + 1)]
        self.student, self.teacher = ([g.normal(*shape) / 16 for shape in shapes] for _ in range(2))
        self.grads = [g.normal(*shape) / 100 for shape in shapes]

    def flags(self, values: Sequence[bool]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def buffer(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        out = torch.zeros(self.offsets[-1], dtype=dtype, device=self.device)
        for begin, x in zip(self.offsets, tensors, strict=False):
            out[begin : begin + x.numel()] = x.flatten()
        return out

    def parts(self, x: Tensor) -> list[Tensor]:
        places = zip(self.offsets, self.counts, self.shapes, strict=False)
        return [x[begin : begin + n].view(shape) for begin, n, shape in places]

    def fused(self, op: Callable, moments: int, dtype: torch.dtype = torch.float32, **options) -> Provider:
        """A step of the op, with bfloat16 copies; matrices decay, nothing is frozen."""
        student, teacher, grad = (self.buffer(x, dtype) for x in (self.student, self.teacher, self.grads))
        arguments = {
            "offsets": self.offsets,
            "decayed": self.flags([len(shape) > 1 for shape in self.shapes]),
            "frozen": self.flags([False] * len(self.shapes)),
            "nonfinite": torch.zeros((), dtype=torch.int32, device=self.device),
            "student_16": torch.zeros_like(student, dtype=torch.bfloat16),
            "teacher_16": torch.zeros_like(student, dtype=torch.bfloat16),
        }
        state = student, grad, *(torch.zeros_like(student) for _ in range(moments)), teacher

        def run():
            op(*state, **arguments, **options)
            return self.parts(student), self.parts(teacher)

        return run

    def on_device(self, hyper: dict[str, float]) -> dict:
        """lr, weight_decay and momentum as tensors."""
        tensors = {name: torch.tensor(x, dtype=torch.float64, device=self.device) for name, x in hyper.items()}
        return {**hyper, **{name: tensors[name] for name in ("lr", "weight_decay", "momentum")}}

    def case(self, op: str, bytes_each: int, providers: dict[str, Provider], exact: Provider) -> Case:
        return Case(
            op=op,
            shape=f"{len(self.shapes)} tensors, {sum(self.counts) / 1e6:.4g} M parameters",
            dtype="float32",
            bytes=bytes_each * sum(self.counts),
            flops=0,
            results=("student", "teacher"),
            providers=providers,
            exact=exact,
        )


def adamw_ema(device: str, sizes: Sizes) -> Case:
    """The phase after the backward: clip each tensor, AdamW, teacher EMA, bfloat16 copies of student and teacher."""
    flat = Flat(device, parameter_shapes(sizes))
    hyper = {"lr": 5e-4, "weight_decay": 0.04, "momentum": 0.996, "clip_norm": 3.0}

    def fused(op, dtype=torch.float32, **options) -> Provider:
        steps = torch.zeros(len(flat.shapes), dtype=torch.int64, device=device)
        return flat.fused(op, 2, dtype, steps=steps, **options)

    def separate(best: bool) -> Provider:
        """torch's fused and foreach calls, or the loops of the reference."""

        @cache
        def state():
            parameters = [x.clone().requires_grad_() for x in flat.student]
            teachers, weights = [x.clone() for x in flat.teacher], [p.detach() for p in parameters]
            copies = [torch.zeros_like(x, dtype=torch.bfloat16) for x in (*weights, *teachers)]
            decayed = [p for p in parameters if p.ndim > 1]
            groups = [{"params": decayed, "weight_decay": 0.04}, {"params": [p for p in parameters if p.ndim < 2]}]
            kind = {"fused": True} if best else {"foreach": False}
            optimizer = torch.optim.AdamW(groups, lr=hyper["lr"], weight_decay=0.0, **kind)
            return parameters, teachers, weights, copies, optimizer

        def run():
            parameters, teachers, weights, copies, optimizer = state()
            for p, grad in zip(parameters, flat.grads, strict=True):
                p.grad = grad  # clipped in place by the first call; later calls do not change it
            if best:
                clip_gradients(flat.grads, hyper["clip_norm"])
                optimizer.step()
                torch._foreach_lerp_(teachers, weights, 1 - hyper["momentum"])
                torch._foreach_copy_(copies, [*weights, *teachers])
            else:
                reference_phase(flat.grads, optimizer.step, teachers, weights, copies, hyper)
            return weights, teachers

        return run

    providers = {
        OURS: fused(dino_kernels.adamw_ema_step_, **flat.on_device(hyper)),
        "reference": separate(best=False),
        "torch fused": separate(best=True),
    }
    exact = fused(dino_kernels.adamw_ema_step_reference_, torch.float64, **hyper)
    return flat.case("clip, AdamW, EMA, copies", 40, providers, exact)


def lars_ema(device: str, shapes: Sequence[tuple[int, ...]]) -> Case:
    """The same phase with LARS of the matrices."""
    flat = Flat(device, shapes)
    hyper = {"lr": 0.3, "weight_decay": 1e-4, "momentum": 0.996, "clip_norm": 3.0}
    adapted = flat.flags([len(shape) > 1 for shape in shapes])

    def separate(best: bool) -> Provider:
        """Foreach calls around LARS' loop, or the loops of the reference alone."""

        @cache
        def state():
            weights, teachers = ([x.clone() for x in tensors] for tensors in (flat.student, flat.teacher))
            copies = [torch.zeros_like(x, dtype=torch.bfloat16) for x in (*weights, *teachers)]
            return weights, teachers, copies, [torch.zeros_like(x) for x in weights]

        def run():
            weights, teachers, copies, buffers = state()
            step = partial(lars_, weights, flat.grads, buffers, hyper["lr"], hyper["weight_decay"])
            if best:
                clip_gradients(flat.grads, hyper["clip_norm"])
                step()
                torch._foreach_lerp_(teachers, weights, 1 - hyper["momentum"])
                torch._foreach_copy_(copies, [*weights, *teachers])
            else:
                reference_phase(flat.grads, step, teachers, weights, copies, hyper)
            return weights, teachers

        return run

    providers = {
        OURS: flat.fused(dino_kernels.sgd_ema_step_, 1, adapted=adapted, **flat.on_device(hyper)),
        "reference": separate(best=False),
        "foreach": separate(best=True),
    }
    exact = flat.fused(dino_kernels.sgd_ema_step_reference_, 1, torch.float64, adapted=adapted, **hyper)
    return flat.case("clip, LARS, EMA, copies", 40, providers, exact)


def lars_(weights, grads, buffers, lr: float, weight_decay: float) -> None:
    """utils.py:553-591, a tensor at a time."""
    for p, d, buffer in zip(weights, grads, buffers, strict=True):
        if p.ndim > 1:
            d = d.add(p, alpha=weight_decay)
            w_norm, d_norm = p.norm(), d.norm()
            ratio = 0.001 * w_norm / d_norm
            d = d * torch.where((w_norm > 0) & (d_norm > 0), ratio, torch.ones_like(ratio))
        buffer.mul_(0.9).add_(d)
        p.add_(buffer, alpha=-lr)


def clip_gradients(grads: list[Tensor], max_norm: float) -> None:
    """utils.py:132-141 in torch's foreach calls: each tensor separately to an L2 norm of at most max_norm, in place."""
    scales = torch._foreach_norm(grads)
    torch._foreach_add_(scales, 1e-6)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(scales, max_norm)
    torch._foreach_clamp_max_(scales, 1.0)
    torch._foreach_mul_(grads, scales)


def reference_phase(grads, step, teachers, weights, copies, hyper) -> None:
    """utils.py:132-141 (a device-to-host sync for every tensor) and main_dino.py:340-350."""
    for grad in grads:
        coefficient = hyper["clip_norm"] / (grad.norm(2).item() + 1e-6)
        if coefficient < 1:
            grad.mul_(coefficient)
    step()
    for t, s in zip(teachers, weights, strict=True):
        t.mul_(hyper["momentum"]).add_((1 - hyper["momentum"]) * s)
    for copy, x in zip(copies, (*weights, *teachers), strict=True):
        copy.copy_(x)


# --- crops -------------------------------------------------------------------------------------------


def multicrop(device: str, sizes: Sizes) -> Case:
    """All crops of four batches of decoded images (256 at the reference sizes), from device memory and from host
    memory; the reference computes them on the CPU, with torch's number of threads, and uploads them."""
    n, height, width = 4 * sizes.images, 375, 500
    smooth = F.interpolate(Random(device).normal(n, 3, 15, 20), (height, width), mode="bilinear")
    pixels = (128 + 100 * smooth).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).flatten()
    host = cache(lambda: torch.empty_like(pixels, device="cpu", pin_memory=device == "cuda").copy_(pixels))
    places = np.array([[3 * height * width * i, height, width] for i in range(n)])
    crops = np.stack([dino_kernels.draw_crops(0, 0, i, CROPS, (height, width)) for i in range(n)])

    def cropped(source, dtype=torch.bfloat16) -> list[Tensor]:
        out = [torch.empty(n, 3, kind.size, kind.size, dtype=dtype, device=source.device) for kind in CROPS]
        dino_kernels.multicrop_packed(source, places, crops, out)
        return out

    return Case(
        op="multicrop",
        shape=f"{n} images {width} x {height}, {len(CROPS)} crops",
        dtype="bfloat16",
        bytes=len(pixels) + sum(2 * n * 3 * kind.size**2 for kind in CROPS),
        flops=0,
        results=("crops",),
        providers={
            OURS: lambda: (cropped(pixels),),
            f"{OURS}, with upload": lambda: (cropped(host().to(device, non_blocking=True)),),
            "reference": lambda: ([x.to(device) for x in cropped(host())],),
        },
        exact=lambda: ([x.to(device, torch.float64) for x in cropped(host(), torch.float32)],),
    )


# --- all of them -------------------------------------------------------------------------------------


def first_cases(sizes: Sizes) -> dict[str, Callable[[str], Case]]:
    """Maps names to functions of the device: every op in bfloat16 at ViT-S, the most important first."""
    return {
        "dino_loss bfloat16": partial(dino_loss, sizes=sizes, dtype=torch.bfloat16),
        "ema_update ViT-S": partial(ema_update, sizes=sizes),
        "adamw_ema ViT-S": partial(adamw_ema, sizes=sizes),
        **attention_cases(sizes, "6 heads", ["197", "37", "packed"]),
        "dino_head_loss bfloat16": partial(dino_head_loss, sizes=sizes, dtype=torch.bfloat16),
        "add_layer_norm": partial(add_layer_norm, sizes=sizes),
        "bias_gelu": partial(bias_gelu, sizes=sizes),
        "multicrop": partial(multicrop, sizes=sizes),
        "linear": partial(linear, sizes=sizes),
        "mlp": partial(mlp, sizes=sizes),
        "last layer": partial(last_layer, sizes=sizes),
        **attention_cases(sizes, "6 heads", ["785"]),
    }


def late_cases(sizes: Sizes) -> dict[str, Callable[[str], Case]]:
    """float16, and ViT-B."""
    base = sizes.base()
    return {
        "dino_loss float16": partial(dino_loss, sizes=sizes, dtype=torch.float16),
        "patch_loss bfloat16": partial(patch_loss, sizes=sizes, dtype=torch.bfloat16),
        "info_nce bfloat16": partial(info_nce, sizes=sizes, dtype=torch.bfloat16),
        "sinkhorn bfloat16": partial(sinkhorn, sizes=sizes, dtype=torch.bfloat16),
        **attention_cases(base, "12 heads", ["197", "37", "packed"]),
        "ema_update ViT-B": partial(ema_update, sizes=base),
        "adamw_ema ViT-B": partial(adamw_ema, sizes=base),
        "lars_ema ViT-S": partial(lars_ema, shapes=parameter_shapes(sizes)),
    }
