"""What autograd may ask of every differentiable op: second derivatives, and gradients of unused results."""

import pytest
import torch

import dino_kernels as dk
from dino_kernels.nn import Block, FlatParameters, Linear, Packing, WeightNormLinear

BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)
CENTER = torch.zeros(32)


def random(*shape, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).requires_grad_()


def block(x, normed, class_only=False):
    net = Block(32, 2)
    FlatParameters(net)
    return net(x, normed, net.norm2, Packing.of([(2, 4)], "cpu"), class_only=class_only)


def with_copies(layer, x):
    FlatParameters(layer)
    return layer(x)


# name in the message, op, shapes of its differentiable arguments
OPS = {
    "add_layer_norm": (dk.add_layer_norm, [(8, 32), (8, 32), (32,), (32,)]),
    "attention": (lambda qkv: dk.attention(qkv, BOUNDS), [(8, 3, 2, 16)]),
    "bias_gelu": (dk.bias_gelu, [(8, 32), (32,)]),
    "dino_head_loss": (
        lambda z, w: dk.dino_head_loss(z, z.detach()[:4], w, w.detach(), CENTER)[0],
        [(8, 16), (32, 16)],
    ),
    "dino_loss": (lambda x: dk.dino_loss(x, x.detach()[:4], CENTER)[0], [(8, 32)]),
    "dino_loss in place": (lambda x: dk.dino_loss(x * 1, x.detach()[:4].clone(), CENTER, inplace=True)[0], [(8, 32)]),
    "info_nce": (lambda q: dk.info_nce(q, q.detach(), q.detach() + 1), [(8, 32)]),
    "patch_loss": (lambda x: dk.patch_loss(x, x.detach(), CENTER, weights=CENTER[:8] + 1)[0], [(8, 32)]),
    "linear": (dk.linear, [(8, 32), (64, 32), (64,)]),
    "mlp": (dk.mlp, [(8, 32), (64, 32), (64,), (32, 64), (32,)]),
    "Block": (block, [(8, 32), (8, 32)]),
    "Block of class tokens": (lambda x, normed: block(x, normed, class_only=True), [(8, 32), (8, 32)]),
    "Linear": (lambda x: with_copies(Linear(32, 64), x), [(8, 32)]),
    "WeightNormLinear": (lambda x: with_copies(WeightNormLinear(32, 64), x), [(8, 32)]),
}


def test_every_op_with_a_gradient_is_among_them():
    names = torch._C._dispatch_get_registrations_for_dispatch_key("Autograd")
    registered = {name.partition("::")[2] for name in names if name.startswith("dino_kernels::")}
    with_autograd = {name for name in registered if name in dir(dk)}
    assert with_autograd == {name for name in OPS if name in dir(dk) and name != "Block"}


@pytest.mark.parametrize("name", OPS)
def test_a_second_derivative_is_an_error(name):
    op, shapes = OPS[name]
    arguments = [random(*shape) for shape in shapes]
    out = op(*arguments)
    # The gradient of a sum from above is a constant: only the op itself can know of a second derivative.
    total = sum(x.sum() for x in (out if isinstance(out, tuple) else (out,)))
    gradients = torch.autograd.grad(total, arguments, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    assert penalty.isfinite()
    with pytest.raises(RuntimeError, match=f"{name.partition(' ')[0]} has no second derivative .*; for one take "):
        penalty.backward()


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("name", OPS)
def test_no_gradient_from_above_gives_none(name):
    op, shapes = OPS[name]
    arguments = [random(*shape) for shape in shapes]
    out = op(*arguments)
    total = sum(Stop.apply(x).sum() for x in (out if isinstance(out, tuple) else (out,)))
    total.backward()
    assert all(x.grad is None or not x.grad.any() for x in arguments)


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results(used):
    arguments = [random(*shape) for shape in OPS["add_layer_norm"][1]]
    upstream = random(8, 32).detach()
    ours, expected = (
        torch.autograd.grad((op(*arguments)[used] * upstream).sum(), arguments, allow_unused=True)
        for op in (dk.add_layer_norm, dk.add_layer_norm_reference)
    )
    for gradient, reference in zip(ours, expected, strict=True):
        assert (gradient is None or not gradient.any()) if reference is None else True
        if reference is not None:
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("class_only", [False, True])
def test_one_of_two_results_of_a_block(used, class_only):
    torch.manual_seed(0)
    plain, flat = Block(32, 2), Block(32, 2)
    flat.load_state_dict(plain.state_dict())
    FlatParameters(flat)
    results = []
    for net in (plain, flat):
        x, normed = random(8, 32), random(8, 32, scale=0.5)
        net(x, normed, net.norm2, Packing.of([(2, 4)], "cpu"), class_only=class_only)[used].square().sum().backward()
        results.append((x.grad, normed.grad))
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
