"""Cases of gpu.py for a transformer block: attention and the other fused ops. See op_cases.py."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from gpu_report import OURS
from setting import Case, Provider, Random, Sizes, compiled, differentiated
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dino_kernels

# --- attention ---------------------------------------------------------------------------------------

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa(backend: SDPBackend, *qkv: Tensor) -> Tensor:
    """[S, L, H, D], the fastest layout for these kernels."""
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)


def naive(*qkv: Tensor) -> Tensor:
    """As vision_transformer.py:81-92."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v).transpose(1, 2)


def attention(device: str, sizes: Sizes, groups: tuple[tuple[int, int], ...], backward: bool) -> Case:
    """Groups of (count, length) sequences, all in one call of ours; the peers use one call per group.

    For the peers, queries, keys and values and their gradients are separate tensors, each in its best layout: the cost
    of slicing a packed projection and of concatenating its gradients is not included.
    """
    g, heads, channels = Random(device), sizes.heads, sizes.width // sizes.heads
    tokens = sum(count * length for count, length in groups)
    packed = g.normal(tokens, 3, heads, channels).to(torch.bfloat16)
    grad_out = g.normal(tokens, heads, channels).to(torch.bfloat16)
    lengths = [length for count, length in groups for _ in range(count)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    def split(x: Tensor) -> list[Tensor]:
        """[T, ...] to one [S, L, ...] per group."""
        parts = x.split([count * length for count, length in groups])
        return [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]

    def provider(forward: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor], view: Callable) -> Provider:
        """Returns the outputs, or a view of the gradients of the inputs, from a graph that the first call builds."""
        inputs = [x.detach().requires_grad_(backward) for x in inputs]
        if not backward:
            return lambda: (forward(*inputs),)
        graph = cache(lambda: forward(*inputs))
        return lambda: (view(torch.autograd.grad(graph(), inputs, grads, retain_graph=True)),)

    def by_group(op, dtype=torch.bfloat16) -> Provider:
        inputs = [x.contiguous().to(dtype) for part in split(packed) for x in part.unbind(2)]

        def forward(*xs):
            return [op(*xs[i : i + 3]) for i in range(0, len(xs), 3)]

        return provider(forward, inputs, split(grad_out.to(dtype)), view=list)

    def varlen(q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        return [varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths))]

    def joined(grads) -> list[Tensor]:
        """Gradients of q, k, v of all groups, in the order of `by_group`."""
        return [x for parts in zip(*map(split, grads), strict=True) for x in parts]

    ours = partial(dino_kernels.attention, cu_seqlens=bounds, groups=groups)
    providers = {
        OURS: provider(lambda qkv: [ours(qkv)], [packed], [grad_out], lambda grads: joined(grads[0].unbind(1))),
        "reference": by_group(naive),
        **{f"SDPA {name}": by_group(partial(sdpa, backend)) for name, backend in SDPA.items()},
        "varlen_attn": provider(varlen, [x.contiguous() for x in packed.unbind(1)], [grad_out], joined),
    }
    return Case(
        op=f"attention, {'backward' if backward else 'forward'}",
        shape=" + ".join(f"{count} x {length}" for count, length in groups) + f" tokens, {heads} heads of {channels}",
        dtype="bfloat16",
        bytes=(16 if backward else 8) * tokens * heads * channels,
        flops=(10 if backward else 4) * heads * channels * sum(length**2 for length in lengths),
        results=("grad",) if backward else ("out",),
        providers=providers,
        exact=by_group(naive, torch.float64),
    )


# --- fusions of a transformer block ------------------------------------------------------------------


def stream(device: str, sizes: Sizes) -> tuple[Random, Tensor, Tensor]:
    """A float32 residual stream of all tokens of a step, as under autocast, and a bfloat16 branch."""
    g = Random(device)
    tokens = sizes.images * (2 * sizes.tokens[0] + (sizes.views - 2) * sizes.tokens[1])
    return g, g.normal(tokens, sizes.width), g.normal(tokens, sizes.width).to(torch.bfloat16)


def add_layer_norm(device: str, sizes: Sizes) -> Case:
    g, x, branch = stream(device, sizes)
    inputs = x, branch, 1 + g.normal(sizes.width) / 10, g.normal(sizes.width)
    grads = g.normal(*x.shape), g.normal(*x.shape).to(branch.dtype)

    def plain(norm, x, branch, weight, bias):
        total = x + branch
        return total, norm(total, weight, bias).to(branch.dtype)

    def torch_norm(total, weight, bias):
        return F.layer_norm(total, weight.shape, weight, bias, 1e-6)

    def liger_norm(total, weight, bias):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return LigerLayerNormFunction.apply(total, weight, bias, 1e-6)

    reference = partial(plain, torch_norm)
    return Case(
        op="add_layer_norm, forward + backward",
        shape=str(list(x.shape)),
        dtype="float32 stream, bfloat16 branch",
        bytes=28 * x.numel(),  # forward 4 + 2 read, 4 + 2 written; backward 4 + 4 + 2 read, 4 + 2 written
        flops=0,
        results=("total", "normed", "grad x", "grad branch", "grad weight", "grad bias"),
        providers={
            OURS: lambda: differentiated(dino_kernels.add_layer_norm, inputs, grads),
            "reference": lambda: differentiated(reference, inputs, grads),
            "compiled reference": partial(differentiated, compiled(reference), inputs, grads),
            "add + Liger layer norm": lambda: differentiated(partial(plain, liger_norm), inputs, grads),
        },
        exact=lambda: differentiated(reference, [i.double() for i in inputs], [i.double() for i in grads]),
    )


def bias_gelu(device: str, sizes: Sizes) -> Case:
    g, stream_x, _ = stream(device, sizes)
    x, grad = (g.normal(len(stream_x), 4 * sizes.width).to(torch.bfloat16) for _ in range(2))
    bias = g.normal(4 * sizes.width).to(torch.bfloat16)
    biased = x + bias

    def reference(x, bias):
        return [F.gelu(x + bias)]

    def of_biased():
        out, grad_x = differentiated(lambda y: [F.gelu(y)], [biased], [grad])
        return out, grad_x, grad_x.sum(dim=0)

    return Case(
        op="bias_gelu, forward + backward",
        shape=str(list(x.shape)),
        dtype="bfloat16",
        bytes=10 * x.numel(),
        flops=0,
        results=("out", "grad x", "grad bias"),
        providers={
            OURS: lambda: differentiated(lambda *xs: [dino_kernels.bias_gelu(*xs)], [x, bias], [grad]),
            "reference": lambda: differentiated(reference, [x, bias], [grad]),
            "compiled reference": partial(differentiated, compiled(reference), [x, bias], [grad]),
            "gelu, bias added by the product": of_biased,
        },
        exact=lambda: differentiated(reference, [x.double(), bias.double()], [grad.double()]),
    )


def linear(device: str, sizes: Sizes) -> Case:
    """The QKV projection with its gradients."""
    g, x, _ = stream(device, sizes)
    x = x.to(torch.bfloat16)
    weight, bias = (g.normal(*shape).to(x.dtype) for shape in ((3 * sizes.width, sizes.width), (3 * sizes.width,)))
    inputs, grad = (x, weight / sizes.width**0.5, bias), g.normal(len(x), 3 * sizes.width).to(x.dtype)
    into, into_bias = torch.zeros(weight.shape, device=device), torch.zeros(bias.shape, device=device)

    def ours():
        """As in a block: weight gradients in float32, accumulated into a buffer."""
        out = dino_kernels.linear(*inputs)
        grad_x = dino_kernels.linear(grad, inputs[1], transposed=True)
        into.zero_(), into_bias.zero_()
        dino_kernels.add_product_(into, grad, x, into_bias)
        return out, grad_x, into, into_bias

    def plain(inputs, grad):
        return differentiated(lambda *xs: [F.linear(*xs)], inputs, [grad])

    return Case(
        op="linear, forward + backward",
        shape=f"{list(x.shape)} x {list(weight.shape)}",
        dtype="bfloat16",
        bytes=2 * (3 * x.numel() + 2 * grad.numel()),
        flops=6 * x.numel() * len(weight),
        results=("out", "grad x", "grad weight", "grad bias"),
        providers={OURS: ours, "reference": lambda: plain(inputs, grad)},
        exact=lambda: plain([x.double() for x in inputs], grad.double()),
    )


def mlp(device: str, sizes: Sizes) -> Case:
    g, x, grad = stream(device, sizes)
    x, hidden = x.to(torch.bfloat16), 4 * sizes.width
    weights = [
        (g.normal(*shape) / shape[1] ** 0.5).to(x.dtype) for shape in ((hidden, sizes.width), (sizes.width, hidden))
    ]
    inputs = x, weights[0], g.normal(hidden), weights[1], g.normal(sizes.width)

    def call(op, inputs=inputs, grad=grad):
        return differentiated(lambda *xs: [op(*xs)], inputs, [grad])

    return Case(
        op="mlp, forward + backward",
        shape=f"{list(x.shape)}, {hidden} hidden",
        dtype="bfloat16",
        bytes=2 * (4 * x.numel() + 4 * len(x) * hidden),
        flops=12 * x.numel() * hidden,
        results=("out", "grad x", "grad W1", "grad b1", "grad W2", "grad b2"),
        providers={
            OURS: partial(call, dino_kernels.mlp),
            "reference": partial(call, dino_kernels.mlp_reference),
            "compiled reference": partial(call, compiled(dino_kernels.mlp_reference)),
        },
        exact=lambda: call(dino_kernels.mlp_reference, [x.double() for x in inputs], grad.double()),
    )


def attention_cases(sizes: Sizes, heads: str, kinds: Sequence[str]) -> dict[str, Callable[[str], Case]]:
    crops, locals_ = 2 * sizes.images, (sizes.views - 2) * sizes.images
    groups = {
        "197": ((crops, sizes.tokens[0]),),
        "37": ((locals_, sizes.tokens[1]),),
        "packed": ((crops, sizes.tokens[0]), (locals_, sizes.tokens[1])),
        "785": ((sizes.images, sizes.tokens[2]),),
    }
    return {
        f"attention {kind} {heads} {way}": partial(
            attention, sizes=sizes, groups=groups[kind], backward=way == "backward"
        )
        for kind in kinds
        for way in ("forward", "backward")
    }
