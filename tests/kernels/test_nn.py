"""A small model of dino_kernels.nn against the same in plain torch, and what its modules refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dino_kernels
from dino_kernels.nn import (
    Block,
    FlatParameters,
    Linear,
    Mlp,
    Packing,
    PatchEmbed,
    WeightNormLinear,
    drop_path,
    hold_copies,
    split_sequences,
)

DIM, HEADS, CLASSES = 64, 2, 32
GROUPS = [(3, 4), (2, 9)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
PRECISIONS = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
SCALES = pytest.mark.parametrize("layer_scale", [None, 0.5])


class Net(nn.Module):
    """Images of two sizes -> one packing of their patches -> two blocks -> mean tokens -> MLP -> logits."""

    def __init__(self, normed_last: bool, layer_scale: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = PatchEmbed(4, DIM)
        self.blocks = nn.ModuleList(Block(DIM, HEADS, 2, layer_scale) for _ in range(2))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.mlp = Mlp(DIM, 96)
        layers = [Linear(DIM, CLASSES), WeightNormLinear(CLASSES, CLASSES)]
        if not normed_last:
            layers = [WeightNormLinear(DIM, CLASSES), Linear(CLASSES, CLASSES)]
        self.head = nn.Sequential(*layers)

    def forward(self, images, branches=None):
        x, packing = self.embed(images), Packing.of(GROUPS, "cpu")
        first, second = self.blocks
        branches = branches or [None, None]
        x, normed = first(x, first.norm1(x), second.norm1, packing, branches[0])
        x, normed = second(x, normed, self.norm, packing, branches[1])
        means = torch.cat([group.mean(1) for group in split_sequences(normed, packing.groups)])
        return self.head(self.mlp(means)).float()


def plain(net, images):
    """`Net` in plain torch, by the parameters of one."""

    def block(x, b):
        q, k, v = linear(norm(x, b.norm1), b.attn.qkv).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        gamma1, gamma2 = (getattr(scale, "gamma", 1.0) for scale in (b.ls1, b.ls2))
        x = x + gamma1 * linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), b.attn.proj)
        return x + gamma2 * mlp(norm(x, b.norm2), b.mlp)

    def norm(x, n):
        return F.layer_norm(x, (DIM,), n.weight, n.bias, n.eps)

    def linear(x, layer):
        return F.linear(x, layer.weight, layer.bias)

    def mlp(x, layers):
        return linear(F.gelu(linear(x, layers.fc1)), layers.fc2)

    means = []
    for group in images:
        x = net.embed.proj(group).flatten(2).transpose(1, 2)
        for each in net.blocks:
            x = block(x, each)
        means.append(norm(x, net.norm).mean(1))
    x = torch.cat(means)
    x = mlp(x, net.mlp)
    for layer in net.head:
        if isinstance(layer, WeightNormLinear):
            x = x @ (layer.weight_g * F.normalize(layer.weight_v, dim=1)).t()
        else:
            x = linear(x, layer)
    return x


def batch(step):
    g = torch.Generator().manual_seed(step)
    images = [torch.randn(count, 3, side, side, generator=g) for count, side in ((3, 8), (2, 12))]
    return images, torch.randint(CLASSES, (5,), generator=g)


def assert_like(net, other, dtype):
    for (name, ours), expected in zip(net.named_parameters(), other.parameters(), strict=True):
        error = (ours - expected).norm() / expected.norm().clamp_min(1)
        assert error < TOLERANCE[dtype], f"{name} differs by {error:.1e}"


@PRECISIONS
@SCALES
def test_a_model_trains_as_plain_torch_does(dtype, layer_scale):
    net, other = Net(True, layer_scale), Net(True, layer_scale)
    flat = FlatParameters(net, dtype)
    sgd = [torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (net, other)]
    losses = []
    for step in range(5):
        images, labels = batch(step)
        loss, expected = F.cross_entropy(net(images), labels), F.cross_entropy(plain(other, images), labels)
        losses.append((loss.item(), expected.item()))
        loss.backward()
        expected.backward()
        if dtype == torch.float32:
            for name, parameter in other.named_parameters():
                torch.testing.assert_close(flat.view(flat.grad, name), parameter.grad, rtol=1e-3, atol=1e-5)
        for optimizer in sgd:
            optimizer.step()
        sgd[1].zero_grad()
        flat.renew()
        flat.clear_grad()
    ours, theirs = zip(*losses, strict=True)
    assert ours == pytest.approx(theirs, rel=TOLERANCE[dtype])
    assert_like(net, other, dtype)
    assert all(parameter.untyped_storage().data_ptr() == flat.weights.data_ptr() for parameter in net.parameters())


@PRECISIONS
@SCALES
@pytest.mark.parametrize("normed_last", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_fused_step_is_the_optimizer_and_a_moving_average(name, dtype, normed_last, layer_scale):
    """Of weight-normed layers the kernels renew one at the end; others are renewed after them."""
    net, other = Net(normed_last, layer_scale), Net(normed_last, layer_scale)
    teacher, other_teacher = copy.deepcopy(net).requires_grad_(False), copy.deepcopy(other).requires_grad_(False)
    flat, flat_teacher = FlatParameters(net, dtype), FlatParameters(teacher, dtype)
    assert not len(flat_teacher.grad)
    count = len(flat.parameters)
    nonfinite, frozen = torch.zeros((), dtype=torch.int32), torch.zeros(count, dtype=torch.bool)
    options = {"frozen": frozen, "decayed": ~frozen, "nonfinite": nonfinite, "momentum": 0.9}
    if name == "adamw":
        hyper = {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-3}  # a large eps: AdamW scales rounding up, too
        options["steps"] = torch.zeros(count, dtype=torch.int64)
        step, moments = flat.adamw_ema_step_, (flat.zeros(), flat.zeros())
        optimizer = torch.optim.AdamW(other.parameters(), **hyper)
    else:
        hyper = {"lr": 0.05, "weight_decay": 0.1}
        options["adapted"] = frozen
        step, moments = flat.sgd_ema_step_, (flat.zeros(),)
        optimizer = torch.optim.SGD(other.parameters(), momentum=0.9, **hyper)
    for number in range(4):
        images, labels = batch(number)
        F.cross_entropy(net(images), labels).backward()
        step(flat_teacher, *moments, **options, **hyper)
        F.cross_entropy(plain(other, images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for t, s in zip(other_teacher.parameters(), other.parameters(), strict=True):
                t.lerp_(s, 0.1)
    assert nonfinite == 0
    assert_like(net, other, dtype)
    assert_like(teacher, other_teacher, dtype)
    images, _ = batch(9)
    with torch.no_grad():
        expected = plain(other_teacher, images)
        assert (teacher(images) - expected).norm() < 2 * TOLERANCE[dtype] * expected.norm()
    rows = next(layer.rows for layer in net.head if isinstance(layer, WeightNormLinear))
    before = rows.clone()
    flat.renew()
    assert torch.equal(rows, before)


@PRECISIONS
@SCALES
def test_without_a_gradient_it_is_the_same(dtype, layer_scale):
    net = Net(True, layer_scale)
    images, _ = batch(0)
    expected = plain(net, images).detach()
    hold_copies(net, dtype)
    assert (net(images).detach() - expected).norm() < 2 * TOLERANCE[dtype] * expected.norm()
    FlatParameters(net, dtype)
    with torch.no_grad():
        without = net(images)
    assert torch.equal(without, net(images)) and without.shape == (5, CLASSES)


def test_drop_path_skips_sequences_that_it_multiplies_by_zero_on_a_gpu(monkeypatch):
    results = []
    for on_gpu in (False, True):
        monkeypatch.setattr("dino_kernels.nn.packing.on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        net = Net(True)
        flat = FlatParameters(net)
        torch.manual_seed(5)
        branches = drop_path(Packing.of(GROUPS, "cpu"), 2, 0.5)
        assert (branches[1][0].rows is None) is on_gpu
        net(batch(0)[0], branches).square().sum().backward()
        results.append(flat.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("uniform", "first"), [(False, 2000), (True, 1000)])
def test_drop_path_drops_more_from_block_to_block_or_the_same_from_all(uniform, first):
    torch.manual_seed(0)
    branches = drop_path(Packing.of([(2000, 1)], "cpu"), 3, 0.5, uniform)
    left = [packing.tokens for branch in branches for packing, *_ in branch[:2]]
    assert left == pytest.approx([first, first, first / 2 + 500, first / 2 + 500, 1000, 1000], abs=100)
    assert branches[0][0].scale.unique().tolist() == ([2.0] if uniform else [1.0])


def scaled_block(dtype=torch.float64, copies=None):
    """A block with layer scale and the norm behind it."""
    torch.manual_seed(0)
    net = nn.ModuleList((Block(DIM, HEADS, 2, 1.0), nn.LayerNorm(DIM, eps=1e-6)))
    for name in ("ls1.gamma", "ls2.gamma", "attn.proj.bias", "mlp.fc2.bias"):
        nn.init.normal_(net[0].get_parameter(name))
    net.to(dtype)
    return net, copies and FlatParameters(net, copies)


def gradients(net, parts, drop, class_only):
    """Of x and of the parameters, after a backward pass over each part of the sequences."""
    x, of_x = torch.randn(2, 3, 7, DIM, generator=torch.Generator().manual_seed(1)).double(), []
    for part in (slice(None),) if parts == 1 else (slice(0, 1), slice(1, 2)):
        tokens = x[part].flatten(0, 2).to(net[1].weight.dtype).requires_grad_()
        packing = Packing.of([(len(tokens) // 7, 7)], "cpu")
        torch.manual_seed(7)
        branches = drop_path(packing, 2, 0.5)[1] if drop else None
        normed = net[0].norm1(tokens)
        rows = branches and branches[0].rows
        out, after = net[0](
            tokens, normed if rows is None else normed.index_select(0, rows), net[1], packing, branches, class_only
        )
        (((out + 0.5).double().square() * torch.arange(DIM)).mean(1) + after.double().cos().sum(1)).sum().backward()
        of_x.append(tokens.grad)
    return [torch.cat(of_x), *(parameter.grad.clone() for parameter in net.parameters())]


@PRECISIONS
@pytest.mark.parametrize(
    "parts, drop, class_only, on_gpu",
    [(1, False, True, False), (2, False, False, False), (1, True, False, False), (1, False, False, True)],
)
def test_gradients_of_layer_scale(monkeypatch, dtype, parts, drop, class_only, on_gpu):
    """With copies, in micro-batches, of class tokens, with drop path, and as on a GPU, against float64."""
    exact = gradients(scaled_block()[0], 1, drop, class_only)
    monkeypatch.setattr("dino_kernels.nn.block.on_gpu", lambda _: on_gpu)
    monkeypatch.setattr("dino_kernels.nn.block.FusedBlock.fits", lambda *_: not on_gpu)
    net, _ = scaled_block(torch.float32, dtype)
    for ours, expected in zip(gradients(net, parts, drop, class_only), exact, strict=True):
        assert (ours - expected).norm() < TOLERANCE[dtype] * expected.norm()


@PRECISIONS
@pytest.mark.parametrize("name", ["attn.proj", "ls2"])
def test_layer_scale_where_a_layer_is_replaced(dtype, name):
    """As LoRA does: the block then calls each layer, and the scale, by itself."""
    results = []
    for net, _ in (scaled_block(torch.float32, dtype), scaled_block()):
        net[0].set_submodule(name, nn.Sequential(net[0].get_submodule(name), nn.Tanh()))
        results.append(gradients(net, 1, False, False))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() < TOLERANCE[dtype] * expected.norm()


def test_strided_rows_and_gradients_are_taken():
    """In float32 copies are the weights themselves, and a tensor reaches the kernels as it is."""
    for layer in (Linear(64, 32), WeightNormLinear(64, 32), Mlp(64, 32)):
        x, outs = torch.randn(64, 7).t(), []
        grads = []
        for _ in range(2):
            leaf = x.detach().requires_grad_()
            out = layer(leaf)
            out.backward(torch.ones(out.shape[1]).expand_as(out))
            outs.append(out.detach())
            grads.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
            layer.zero_grad()
            FlatParameters(layer)
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*grads)


def test_freezing_a_layer_leaves_it_without_a_gradient():
    net = Net(True)
    flat = FlatParameters(net)
    flat.freeze(net.head[1], True)
    assert net.head[1].weight_v.grad is None and net.head[0].weight.grad is not None
    F.cross_entropy(net(batch(0)[0]), batch(0)[1]).backward()
    assert not flat.view(flat.grad, "head.1.weight_v").any() and flat.view(flat.grad, "head.0.weight").any()
    flat.freeze(net.head[1], False)
    assert net.head[1].weight_v.grad.data_ptr() == flat.view(flat.grad, "head.1.weight_v").data_ptr()


def test_a_linear_layer_without_bias_and_one_that_is_frozen():
    torch.manual_seed(0)
    net = torch.nn.Sequential(Linear(32, 64, bias=False), torch.nn.ReLU(), Linear(64, 32, bias=False), Linear(32, 5))
    other = copy.deepcopy(net)
    flat = FlatParameters(net)
    for layer in (net[2], net[3]):
        flat.freeze(layer, True)
    x, targets = torch.randn(7, 32), torch.randint(5, (7,))
    for model in (net, other):
        F.cross_entropy(model(x), targets).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is not None] == ["0.weight"]
    torch.testing.assert_close(net[0].weight.grad, other[0].weight.grad)
    flat.freeze(net[2], False)
    flat.clear_grad()
    F.cross_entropy(net(x), targets).backward()
    for layer in (0, 2):
        torch.testing.assert_close(net[layer].weight.grad, other[layer].weight.grad)


def test_they_are_not_among_the_functions():
    assert not set(dino_kernels.__all__) & set(dino_kernels.nn.__all__)


def a_block(x=None, normed=None, norm=None, packing=None, dtype=torch.float32):
    block = Block(DIM, HEADS)
    FlatParameters(block, dtype)
    tokens = torch.zeros(8, DIM)
    x, normed = tokens if x is None else x, tokens if normed is None else normed
    return block(x, normed, norm or nn.LayerNorm(DIM, eps=1e-6), packing or Packing.of([(2, 4)], "cpu"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Linear(4, 2)(torch.zeros(3, 5)), r"x must have shape \[T, 4\].*got \[3, 5\]"),
        (lambda: Linear(4, 2)(torch.zeros(3, 4, device="meta")), "on cpu as the weights.*on meta"),
        (lambda: Linear(4, 2)(torch.zeros(3, 4, dtype=torch.int32)), "floating-point dtype.*int32"),
        (lambda: WeightNormLinear(4, 2)(torch.zeros(2, 3, 4)), r"got \[2, 3, 4\]"),
        (lambda: Mlp(4, 2)(torch.zeros(3, 2)), r"\[T, 4\].*got \[3, 2\]"),
        (lambda: PatchEmbed(4, 8)([torch.zeros(1, 3, 8, 3)]), r"h, w >= 4, got \[1, 3, 8, 3\]"),
        (lambda: PatchEmbed(4, 8)([]), "at least one tensor"),
        (lambda: Block(10, 3), "num_heads must divide dim, got dim=10 and num_heads=3"),
        (
            lambda: a_block(x=torch.zeros(7, DIM)),
            r"shapes \[8, 64\] and \[8, 64\], as packed, got \[7, 64\]",
        ),
        (lambda: a_block(normed=torch.zeros(8, 63)), r"got \[8, 64\] and \[8, 63\]"),
        (lambda: a_block(x=torch.zeros(8, DIM).double()), "x must be float32, float16 or bfloat16"),
        (lambda: a_block(norm=nn.LayerNorm(DIM)), "next_norm must have 64 channels and eps 1e-06"),
        (lambda: a_block(packing=Packing.of([(2, 4)], "meta")), "on cpu as the weights, got cpu, cpu and meta"),
        (lambda: Packing(torch.tensor([0, 8]), [(2, 4)]), r"cu_seqlens must have shape \[3\]"),
        (lambda: Packing.of([(2, 0)], "cpu"), "groups must be .*got"),
        (lambda: Packing.of([], "cpu"), "at least one"),
        (lambda: drop_path(Packing.of([(2, 4)], "cpu"), 2, 1.0), r"rate in \[0, 1\), got 2 and 1.0"),
        (lambda: FlatParameters(nn.Linear(2, 2).double()), "parameters must be float32"),
        (lambda: FlatParameters(nn.GELU()), "parameters must be float32"),
        (lambda: FlatParameters(nn.Linear(2, 2), torch.int8), "got .* and torch.int8"),
        (
            lambda: FlatParameters(Linear(4, 2)).adamw_ema_step_(FlatParameters(Linear(40, 2)), *[torch.zeros(2)] * 2),
            "teacher must have parameters of the same sizes",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
