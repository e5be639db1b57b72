"""The networks of dino_train against plain per-image forms; the reference's names and counts."""

import copy
import math
import warnings
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dino_train.models.resnet import ResNet, resnet50, resnet_nano
from dino_train.models.vit import DINOHead, DINOModel, VisionTransformer, build_model, vit
from torch import nn

from dino_kernels.nn import Branch, Packing, hold_copies

PATCH, DIM, DEPTH, HEADS = 4, 32, 3, 2
# Square, interpolated position embedding, first size with another batch, not square, not a multiple of the patch.
SIZES = [(2, 16, 16), (2, 8, 8), (1, 16, 16), (3, 8, 20), (2, 11, 14)]


def small_vit(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    model = VisionTransformer(16, PATCH, DIM, DEPTH, HEADS, **kwargs)
    with torch.no_grad():  # no default values: all weights affect the output
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def images(sizes=SIZES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, 3, h, w, generator=generator, dtype=dtype) for b, h, w in sizes]


def bicubic(cells, out):
    """[out, cells]: weights of the cubic convolution (a = -0.75) sampled at steps of cells / (out + 0.1)."""
    weights = torch.zeros(out, cells, dtype=torch.float64)
    for i in range(out):
        x = (i + 0.5) * cells / (out + 0.1) - 0.5
        for tap in range(math.floor(x) - 1, math.floor(x) + 3):
            t, a = abs(x - tap), -0.75
            near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[i, min(max(tap, 0), cells - 1)] += near if t <= 1 else far
    return weights


def antialiased(cells, out):
    """[out, cells]: weights of the cubic convolution (a = -0.5), as wide as a step where that is more than a cell."""
    step = cells / out
    x = (torch.arange(out, dtype=torch.float64)[:, None] + 0.5) * step - 0.5
    t, a = (x - torch.arange(cells)).abs() / max(step, 1), -0.5
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    weights = torch.where(t <= 1, near, far) * (t < 2)
    return weights / weights.sum(1, keepdim=True)


def rotated(x, rows, cols):
    """Queries or keys [heads, N, D] with DINOv3's rotary positions: pairs of channels d, d + D/2 as complex numbers."""
    pairs = torch.complex(*x.chunk(2, dim=-1))
    frequencies = 2 * math.pi / 100 ** (torch.arange(0, 1, 4 / x.shape[-1], dtype=torch.float64))
    for i, (row, col) in enumerate(product(range(rows), range(cols)), x.shape[1] - rows * cols):
        angles = torch.cat((((2 * row + 1) / rows - 1) * frequencies, ((2 * col + 1) / cols - 1) * frequencies))
        pairs[:, i] *= torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def vit_by_hand(p, image, patch, heads, scales=None, mask=None):
    """One image [3, h, w] through a ViT with parameters p, computed from the definition; without learned positions,
    of DINOv3.

    scales[i] = (attention, MLP) factors of the branches of block i; mask [patches] is true where the mask token stands.
    Returns the normalized tokens after each block and the last block's attention [heads, N, N].
    """
    rows, cols = image.shape[1] // patch, image.shape[2] // patch
    patches = image[:, : rows * patch, : cols * patch].reshape(3, rows, patch, cols, patch)
    patches = patches.permute(1, 3, 0, 2, 4).reshape(rows * cols, -1)
    patches = patches @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    if mask is not None:
        patches = torch.stack(
            [p["mask_token"][0] if hidden else row for hidden, row in zip(mask, patches, strict=True)]
        )
    rope = "pos_embed" not in p
    eps = 1e-5 if rope else 1e-6
    pos = torch.zeros(1 + rows * cols, len(patches[0])).to(patches) if rope else p["pos_embed"][0]
    side = round((len(pos) - 1) ** 0.5)
    grid = pos[1:].reshape(-1, cols if rope else side, len(pos[0]))
    if not rope and (rows, cols) != (side, side):
        sample = antialiased if "register_tokens" in p else bicubic
        grid = torch.einsum("ia,jb,abc->ijc", sample(side, rows), sample(side, cols), grid)
    registers = p["register_tokens"][0] if "register_tokens" in p else pos[:0]
    x = torch.cat([p["cls_token"][0] + pos[:1], registers, patches + grid.flatten(0, 1)])

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    outputs = []
    depth = sum(name.endswith("qkv.weight") for name in p)
    for i in range(depth):
        block = f"blocks.{i}."
        attn_scale, mlp_scale = (1, 1) if scales is None else scales[i]
        qkv = linear(norm(x, block + "norm1"), block + "attn.qkv")
        q, k, v = qkv.reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        if rope:
            q, k = rotated(q, rows, cols), rotated(k, rows, cols)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + attn_scale * linear((weights @ v).transpose(0, 1).flatten(1), block + "attn.proj")
        if (swiglu := block + "mlp.w12") + ".weight" in p:
            gate, value = linear(norm(x, block + "norm2"), swiglu).chunk(2, dim=-1)
            x = x + mlp_scale * linear(gate * torch.sigmoid(gate) * value, block + "mlp.w3")
        else:
            hidden = linear(norm(x, block + "norm2"), block + "mlp.fc1")
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            x = x + mlp_scale * linear(hidden, block + "mlp.fc2")
        outputs.append(norm(x, "norm"))
    return outputs, weights


def by_hand(model, crops, scales=None):
    p = dict(model.named_parameters())
    return torch.stack([vit_by_hand(p, image, PATCH, HEADS, scales)[0][-1][0] for crop in crops for image in crop])


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("patch", "cells"), [(16, 196), (8, 784)])
def test_vit_names_and_shapes(patch, cells):
    d = 384
    expected: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + cells, d)}
    expected |= {"patch_embed.proj.weight": (d, 3, patch, patch), "patch_embed.proj.bias": (d,)}
    expected |= {"norm.weight": (d,), "norm.bias": (d,)}
    layers: dict[str, tuple[int, ...]] = {"norm1": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d)}
    layers |= {"norm2": (d,), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for i in range(12):
        for name, shape in layers.items():
            expected[f"blocks.{i}.{name}.weight"] = shape
            expected[f"blocks.{i}.{name}.bias"] = shape[:1]
    with torch.device("meta"):
        assert shapes(vit("vit_small", patch_size=patch)) == expected


def test_head_names_and_shapes():
    plain: dict[str, tuple[int, ...]] = {"mlp.0.weight": (2048, 384), "mlp.0.bias": (2048,)}
    plain |= {"mlp.2.weight": (2048, 2048), "mlp.2.bias": (2048,), "mlp.4.weight": (256, 2048), "mlp.4.bias": (256,)}
    plain |= {"last_layer.weight_g": (1000, 1), "last_layer.weight_v": (1000, 256)}
    rename = {"mlp.0": "mlp.0", "mlp.2": "mlp.3", "mlp.4": "mlp.6"}
    with_bn = {rename.get(key[:5], key[:5]) + key[5:]: value for key, value in plain.items()}
    for layer in ("mlp.1", "mlp.4"):
        for name in ("weight", "bias", "running_mean", "running_var"):
            with_bn[f"{layer}.{name}"] = (2048,)
        with_bn[f"{layer}.num_batches_tracked"] = ()
    with torch.device("meta"):
        assert list(shapes(DINOHead(384, 1000)).items()) == list(plain.items())
        assert shapes(DINOHead(384, 1000, use_bn=True)) == with_bn


def test_resnet50_names_and_shapes():
    expected: dict[str, tuple[int, ...]] = {}

    def conv_bn(conv, bn, out, inp, size):
        expected[conv + ".weight"] = (out, inp, size, size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{bn}.{name}"] = (out,)
        expected[bn + ".num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", 64, 3, 7)
    channels = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(depth):
            name = f"layer{stage + 1}.{block}."
            conv_bn(name + "conv1", name + "bn1", width, channels, 1)
            conv_bn(name + "conv2", name + "bn2", width, width, 3)
            conv_bn(name + "conv3", name + "bn3", 4 * width, width, 1)
            if block == 0:
                conv_bn(name + "downsample.0", name + "downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    with torch.device("meta"):
        model = resnet50()
    assert shapes(model) == expected
    assert len(expected) == 53 + 53 * 5 == 318
    assert sum(p.numel() for p in model.parameters()) == 23_508_032


def test_resnet_nano_keeps_small_images():
    model = resnet_nano()
    maps = []
    for layer in (model.layer1, model.layer4):
        layer.register_forward_hook(lambda _layer, _inputs, out: maps.append(tuple(out.shape[1:])))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 512) and maps == [(64, 32, 32), (512, 4, 4)]
    assert sum(p.numel() for p in model.parameters()) == 504_464


def test_vit_parameter_counts():
    for arch, count in {"vit_tiny": 5_524_416, "vit_small": 21_665_664, "vit_base": 85_798_656}.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in vit(arch).parameters()) == count


@pytest.mark.parametrize(("norm_last_layer", "regularized"), [(True, 55), (False, 56)])
def test_number_of_regularized_tensors(norm_last_layer, regularized):
    with torch.device("meta"):
        model = small_model("vit_small", patch_size=16, img_size=224, norm_last_layer=norm_last_layer)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [n for n, p in trained if n.endswith(".bias") or p.ndim == 1]
    assert (len(trained) - len(plain), len(plain)) == (regularized, 102)


def small_model(arch="vit_nano", **kwargs):
    options = dict(patch_size=8, out_dim=50, img_size=32, drop_path_rate=0.1, use_bn_in_head=False)
    options |= dict(norm_last_layer=True, head_hidden_dim=64, head_bottleneck_dim=16)
    return build_model(arch, **{**options, **kwargs})


def test_initialization():
    torch.manual_seed(0)
    p = dict(vit("vit_nano", patch_size=8).named_parameters())
    for name in ("pos_embed", "blocks.0.attn.qkv.weight", "blocks.2.mlp.fc2.weight"):
        assert abs(p[name].std().item() - 0.02) < 0.001
    assert not any(v.any() for n, v in p.items() if n.endswith(".bias") and "patch_embed" not in n)
    assert all((v == 1).all() for n, v in p.items() if "norm" in n and n.endswith(".weight"))
    head = dict(DINOHead(64, 1000).named_parameters())
    assert abs(head["mlp.2.weight"].std().item() - 0.02) < 0.001 and not head["mlp.2.bias"].any()
    # default of torch for convolutions and linear layers: uniform in +-1 / sqrt(fan in)
    for weight, fan_in in ((p["patch_embed.proj.weight"], 3 * 8 * 8), (head["last_layer.weight_v"], 256)):
        assert weight.abs().max() <= fan_in**-0.5 and abs(weight.std() * (3 * fan_in) ** 0.5 - 1) < 0.05
    assert (head["last_layer.weight_g"] == 1).all()
    conv = resnet50().state_dict()["layer2.1.conv3.weight"]  # Kaiming normal, fan out
    assert abs(conv.std().item() * (512 / 2) ** 0.5 - 1) < 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_mixed_resolutions_equal_one_image_at_a_time(dtype, tolerance):
    exact, model, crops = small_vit(), small_vit(dtype), images()
    expected, out = by_hand(exact, crops), model([crop.to(dtype) for crop in crops])
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    upstream = torch.randn_like(expected)
    (expected * upstream).sum().backward()
    (out * upstream.to(dtype)).sum().backward()
    for got, want in zip(model.parameters(), exact.parameters(), strict=True):
        assert (got.grad - want.grad).abs().max() < tolerance * want.grad.abs().max()
    torch.testing.assert_close(model(crops[3].to(dtype)).double(), expected[5:8], rtol=0, atol=tolerance)


def test_features_and_attention():
    model, crop = small_vit(drop_path_rate=0.5), images([(2, 12, 20)])[0]
    p = dict(model.named_parameters())
    outputs, weights = zip(*(vit_by_hand(p, image, PATCH, HEADS) for image in crop), strict=True)
    for n in (1, 2, DEPTH):
        for tokens, expected in zip(model.features(crop, n), list(zip(*outputs, strict=True))[-n:], strict=True):
            torch.testing.assert_close(tokens, torch.stack(expected), rtol=0, atol=1e-10)
    maps = model.attention(crop)
    torch.testing.assert_close(maps, torch.stack(weights)[:, :, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, HEADS, dtype=maps.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_registers_and_mask_token(dtype, tolerance):
    options = {"registers": 3, "mask_token": True}
    exact, model, crops = (
        small_vit(**options),
        small_vit(dtype, **options),
        images([(2, 16, 16), (2, 16, 16), (1, 8, 8)]),
    )
    masks = torch.rand(4, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    p = dict(exact.named_parameters())
    by_image = zip([image for crop in crops for image in crop], [*masks, None], strict=True)
    expected = torch.cat([vit_by_hand(p, image, PATCH, HEADS, mask=mask)[0][-1] for image, mask in by_image])
    out, packing = model.tokens([crop.to(dtype) for crop in crops], masks)
    assert packing.groups == [(4, 20), (1, 8)]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    upstream = torch.randn_like(expected)
    (expected * upstream).sum().backward()
    (out * upstream.to(dtype)).sum().backward()
    for got, want in zip(model.parameters(), exact.parameters(), strict=True):
        assert (got.grad - want.grad).abs().max() < tolerance * want.grad.abs().max()
    # Without masks, class tokens and patches are what is returned.
    tokens, weights = zip(*(vit_by_hand(p, image, PATCH, HEADS) for image in crops[0]), strict=True)
    shown = [0, *range(4, 20)]
    torch.testing.assert_close(exact(crops[0]), torch.stack([t[-1][0] for t in tokens]), rtol=0, atol=1e-10)
    torch.testing.assert_close(exact._unpacked(crops[0]), exact(crops[0]), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        exact.features(crops[0])[0], torch.stack([t[-1][shown] for t in tokens]), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(exact.attention(crops[0]), torch.stack(weights)[:, :, 0, shown], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("h", "w"), [(96, 96), (64, 96), (224, 112), (100, 119), (224, 230)])
def test_position_interpolation(h, w):
    model = VisionTransformer(224, 16, 24, 1, 2).double()
    grid = model.pos_embed[:, 1:].reshape(1, 14, 14, 24).permute(0, 3, 1, 2)
    scale = ((h // 16 + 0.1) / 14, (w // 16 + 0.1) / 14)
    expected = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    got = model._positions(h, w)
    assert torch.equal(got[:, :1], model.pos_embed[:, :1])
    assert torch.equal(got[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, -1, 24))
    hand = torch.einsum("ia,jb,ncab->nijc", bicubic(14, h // 16), bicubic(14, w // 16), grid)
    torch.testing.assert_close(got[:, 1:], hand.reshape(1, -1, 24), rtol=0, atol=1e-12)
    assert model._positions(224, 224) is model.pos_embed


def test_drop_path_is_drawn_for_each_sample_and_branch():
    model, count = small_vit(drop_path_rate=0.4), 300
    crops = [crop.expand(count, -1, -1, -1) for crop in images([(1, 8, 8), (1, 4, 8)])]
    torch.manual_seed(3)
    out = model(crops)
    # The rate is 0, 0.2, 0.4: block 0 keeps all, the others drop or scale by 1 / keep.
    factors = [(1.0,), (0.0, 1 / 0.8), (0.0, 1 / 0.6)]
    cases = list(product(*(product(f, f) for f in factors)))
    for crop, rows in zip(crops, out.split(count), strict=True):
        candidates = torch.cat([by_hand(model, [crop[:1]], case) for case in cases])
        distance, chosen = torch.cdist(rows, candidates, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        assert distance.max() < 1e-5  # keep is float32
        drawn = torch.tensor(cases, dtype=torch.float64)[chosen]  # [count, depth, 2]
        # five standard deviations of the mean of `count` draws with mean 1
        for block, keep in ((1, 0.8), (2, 0.6)):
            assert (drawn[:, block].mean(0) - 1).abs().max() < 5 * ((1 - keep) / keep / count) ** 0.5
        drops = (drawn[:, 1:] == 0).flatten(1).double().T
        drops = torch.cat([drops[:, 1:], drops[:, :-1]])  # each sample and its neighbor
        assert (torch.corrcoef(drops) - torch.eye(8)).abs().max() < 5 / count**0.5


def test_branches_hold_the_samples_that_drop_path_keeps():
    packing = Packing(torch.tensor([0, 3, 6, 8], dtype=torch.int32), [(2, 3), (0, 4), (1, 2)])
    kept = np.array([[True, True, True], [False, False, False], [True, False, True]])
    whole, empty, some = Branch.of_kept(packing, kept, np.array([1, 2, 3], np.float32))
    assert whole.packing is packing and whole.rows is None and whole.scale.tolist() == [1] * 8
    assert (
        empty.packing.groups == [(0, 3), (0, 4), (0, 2)]
        and len(empty.rows) == len(empty.scale) == len(empty.sequences) == 0
    )
    assert empty.packing.cu_seqlens.tolist() == [0] and some.packing.cu_seqlens.tolist() == [0, 3, 5]
    assert some.packing.groups == [(1, 3), (0, 4), (1, 2)] and some.scale.tolist() == [3] * 5
    assert some.rows.tolist() == [0, 1, 2, 6, 7] and some.sequences.tolist() == [0, 2]
    assert some.rows.dtype == some.sequences.dtype == some.packing.cu_seqlens.dtype == torch.int32


def test_drop_path_is_the_identity_in_eval_mode():
    crops = images()
    with_rate, without = small_vit(drop_path_rate=0.9), small_vit()
    assert torch.equal(with_rate.eval()(crops), without(crops))
    assert not torch.equal(with_rate.train()(crops), without(crops))


def test_packing_does_not_mix_samples():
    model, crops = small_vit(), images()
    before = model(crops)
    crops[1][1] += 1
    changed = (model(crops) - before).abs().amax(1) > 1e-12
    assert changed.nonzero().flatten().tolist() == [3]


def test_bfloat16_autocast_is_close_to_float32():
    torch.manual_seed(0)
    model = small_model(drop_path_rate=0.3)
    crops = images([(4, 32, 32), (4, 32, 32), (4, 16, 16)], torch.float32)
    results = []
    for enabled in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(crops)
            loss = -(logits.float() / 0.1).log_softmax(-1)[:, ::7].mean()
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((logits, grads))
    (logits, grads), (logits16, grads16) = results
    assert logits16.dtype == torch.bfloat16 and grads16.dtype == torch.float32
    assert (logits16.float() - logits).norm() < 0.02 * logits.norm()
    assert (grads16 - grads).norm() < 0.05 * grads.norm()


@pytest.mark.parametrize("use_bn", [True, False])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_by_hand(norm_last_layer, use_bn):
    torch.manual_seed(0)
    sizes = dict(hidden_dim=48, bottleneck_dim=16)
    head = DINOHead(24, 37, use_bn=use_bn, norm_last_layer=norm_last_layer, **sizes).double()
    p = dict(head.named_parameters())
    with torch.no_grad():
        for name, parameter in p.items():
            if name != "last_layer.weight_g" or not norm_last_layer:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    hidden = x = torch.randn(9, 24, dtype=torch.float64)
    first, second, third = (0, 3, 6) if use_bn else (0, 2, 4)
    for i in (first, second):
        hidden = hidden @ p[f"mlp.{i}.weight"].T + p[f"mlp.{i}.bias"]
        if use_bn:
            hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
            hidden = hidden * p[f"mlp.{i + 1}.weight"] + p[f"mlp.{i + 1}.bias"]
        hidden = F.gelu(hidden)
    z = hidden @ p[f"mlp.{third}.weight"].T + p[f"mlp.{third}.bias"]
    v, g = p["last_layer.weight_v"], p["last_layer.weight_g"]
    expected = F.cosine_similarity(z[:, None], v[None], dim=2) * g.T
    got = head(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert got.abs().max() <= 1 or not norm_last_layer
    upstream = torch.randn_like(got)
    trained = [parameter for parameter in p.values() if parameter.requires_grad]
    assert len(trained) == 7 + 4 * use_bn + (not norm_last_layer)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), trained)
    (got * upstream).sum().backward()
    for parameter, grad in zip(trained, expected_grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-10)
    assert g.requires_grad is not norm_last_layer and (g.grad is None) is norm_last_layer


def test_resnet50_by_hand():
    torch.manual_seed(0)
    model = resnet50().double().eval()
    s = model.state_dict()
    for name, value in s.items():
        if "running" in name or value.ndim == 1:
            value.add_(torch.rand_like(value), alpha=0.1)

    def conv_bn(x, conv, bn, stride=1):
        weight = s[conv + ".weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        stats = [s[f"{bn}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *stats)

    image = torch.randn(2, 3, 70, 64, dtype=torch.float64)
    x = F.max_pool2d(conv_bn(image, "conv1", "bn1", 2).relu(), 3, 2, 1)
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            name = f"layer{stage + 1}.{block}."
            stride = 2 if stage and not block else 1
            out = conv_bn(x, name + "conv1", name + "bn1").relu()
            out = conv_bn(out, name + "conv2", name + "bn2", stride).relu()
            out = conv_bn(out, name + "conv3", name + "bn3")
            x = conv_bn(x, name + "downsample.0", name + "downsample.1", stride) if block == 0 else x
            x = (x + out).relu()
    torch.testing.assert_close(model(image), x.mean((2, 3)), rtol=1e-9, atol=1e-9)


def test_model_is_head_of_backbone():
    backbone, crops = small_vit(), images()
    model = DINOModel(backbone, DINOHead(DIM, 5, hidden_dim=8, bottleneck_dim=4).double())
    torch.testing.assert_close(model(crops), model.head(by_hand(backbone, crops)))
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "head"}


def test_convnet_has_one_forward_per_run_of_equal_sizes():
    class Backbone(nn.Module):
        seen, channels = [], 3

        def forward(self, x):
            self.seen.append(tuple(x.shape))
            return x.mean((2, 3))

    model = DINOModel(Backbone(), DINOHead(3, 5, hidden_dim=8, bottleneck_dim=4).double())
    crops = images([(2, 16, 16), (2, 16, 16), (2, 8, 8), (2, 8, 12), (2, 12, 12)])
    expected = model.head(torch.cat([crop.mean((2, 3)) for crop in crops]))
    torch.testing.assert_close(model(crops), expected)
    assert Backbone.seen == [(4, 3, 16, 16), (2, 3, 8, 8), (2, 3, 8, 12), (2, 3, 12, 12)]


def nano(seed=0, **kwargs):
    torch.manual_seed(seed)
    return vit("vit_nano", **{"patch_size": 8, "img_size": 32, **kwargs})


def test_bad_input_messages():
    with pytest.raises(ValueError, match="unknown arch 'vit_huge', choose one of vit_nano, .*resnet50"):
        small_model("vit_huge")
    with pytest.raises(ValueError, match="unknown arch 'resnet50', choose one of vit_nano, .*vit_large$"):
        vit("resnet50")
    for patch, size in ((0, 32), (-8, 32), (7, 32), (8, 0), (64, 32)):
        with pytest.raises(ValueError, match=f"divide img_size, got patch_size={patch} and img_size={size}"):
            nano(patch_size=patch, img_size=size)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"drop_path_rate must be in \[0, 1\), got {rate}"):
            nano(drop_path_rate=rate)
    with pytest.raises(ValueError, match="crops of 8x7 pixels are smaller than a patch of 8x8"):
        nano()([torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 8, 7)])
    gray = torch.zeros(2, 1, 32, 32)
    with torch.device("meta"):
        convnet = small_model("resnet50", use_bn_in_head=True, patch_size=7)  # ignored by a ResNet
    assert convnet.head.mlp[0].in_features == 2048 and isinstance(convnet.head.mlp[1], nn.BatchNorm1d)
    for call in (nano(), nano().features, nano().attention, lambda x: small_model()([x]), lambda x: convnet([x])):
        with pytest.raises(ValueError, match=r"\[B, 3, height, width\], got \[2, 1, 32, 32\].*these channels"):
            call(gray)
    with pytest.raises(ValueError, match=r"got \[3, 32, 32\]"):
        nano()([torch.zeros(3, 32, 32)])
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"n_blocks must be from 1 to the number of blocks, 3, got {n}"):
            nano().features(torch.zeros(1, 3, 32, 32), n)


def test_a_block_uses_the_parameters_assigned_to_it():
    net = vit("vit_nano", patch_size=8, img_size=32)
    net.load_state_dict({name: p.clone() for name, p in net.state_dict().items()}, assign=True)
    for block in net.blocks:
        own = {id(p) for p in block.parameters()} - {id(p) for p in block.norm1.parameters()}
        assert {id(p) for p in block.named} == own


# --- a backbone is an ordinary module -----------------------------------------------------------------


@pytest.fixture(params=["vit", "resnet"])
def backbone(request):
    if request.param == "vit":
        return small_vit(torch.float32).eval()
    torch.manual_seed(0)
    return ResNet((1, 1, 1, 1)).eval()


def some(count=2, size=16, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class LowRank(nn.Module):
    """A linear layer and a product of two small ones beside it, as LoRA has."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_gradients_reach_the_images(backbone):
    x = some().requires_grad_()
    out = backbone(x)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * upstream).sum(), x)
    net, direction, step = copy.deepcopy(backbone).double(), torch.randn_like(x).double(), 1e-5
    with torch.no_grad():
        ahead, behind = (net(x.double() + sign * step * direction) for sign in (1, -1))
    expected = ((ahead - behind) * upstream).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-3, atol=1e-3)


def test_gradients_reach_images_of_several_sizes():
    model, crops = small_vit(), [x.requires_grad_() for x in images()]
    together = torch.autograd.grad(model(crops).square().sum(), crops)
    alone = [torch.autograd.grad(model(crop).square().sum(), crop)[0] for crop in crops]
    for gradient, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float64, 1e-5)], ids=str
)
def test_other_dtypes(backbone, dtype, tolerance):
    expected = backbone(some())
    net = copy.deepcopy(backbone).to(dtype)
    out = net(some().to(dtype))
    assert out.dtype == dtype
    assert (out - expected).norm() < tolerance * expected.norm()
    out.sum().backward()
    assert all(p.grad.dtype == dtype for p in net.parameters())
    if isinstance(net, VisionTransformer):
        assert all(p.grad.isfinite().all() for p in net.parameters())
        assert net.features(some().to(dtype))[0].dtype == dtype


def test_no_images(backbone):
    x = some(0).requires_grad_()
    out = backbone(x)
    assert out.shape == (0, backbone.embed_dim)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert copy.deepcopy(backbone).double()(x.detach().double()).shape == out.shape
    if isinstance(backbone, VisionTransformer):
        assert backbone.features(x)[0].shape == (0, 17, DIM)
        assert backbone.attention(x).shape == (0, HEADS, 17)


def test_hooks_see_what_flows(backbone):
    expected = backbone(some())
    is_vit = isinstance(backbone, VisionTransformer)
    names = ["blocks.2", "blocks.2.attn", "blocks.2.attn.qkv", "blocks.2.norm2", "blocks.2.mlp.fc1", "norm"]
    for name in names if is_vit else ["layer4", "layer4.0.conv1"]:
        seen = []
        handle = backbone.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out))  # noqa: B023
        torch.testing.assert_close(backbone(some()), expected, rtol=1e-4, atol=1e-4)
        handle.remove()
        assert len(seen) == 1, name
        if is_vit:  # all tokens
            assert all(len(x) == 2 * 17 for x in (seen[0] if isinstance(seen[0], tuple) else seen)), name
    if is_vit:
        tokens = backbone.features(some())[0]
        torch.testing.assert_close(seen[0].view_as(tokens), tokens, rtol=1e-4, atol=1e-4)


def test_a_trace_has_layer_scale():
    net = small_vit(torch.float32, layer_scale=0.5).eval()
    exported = torch.export.export(net, (some(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(some(3)), net(some(3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [16, 24])
def test_traces_take_other_numbers_of_images(backbone, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(backbone, some(2, size))
    torch.testing.assert_close(traced(some(3, size, 1)), backbone(some(3, size, 1)), rtol=1e-4, atol=1e-4)


def test_exports_take_other_numbers_of_images(backbone):
    exported = torch.export.export(backbone, (some(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(some(3)), backbone(some(3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_export_of_the_module(backbone, tmp_path, dynamo):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(backbone, (some(),), path, input_names=["images"], dynamo=dynamo, verbose=False)
    out = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": some().numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(out), backbone(some()), rtol=1e-3, atol=1e-3)


def test_a_trace_has_no_drop_path():
    with pytest.raises(ValueError, match="call .eval"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(small_vit(torch.float32, drop_path_rate=0.1), some())


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("i", [0, DEPTH - 1])
def test_replaced_linear_layers_are_used(name, i):
    """By their own forward, whatever weight they show: merged into one weight the layer gives the same."""
    model, merged = small_vit().eval(), small_vit().eval()
    parent, _, child = f"blocks.{i}.{name}".rpartition(".")
    layer = LowRank(model.get_submodule(f"{parent}.{child}")).double()
    setattr(model.get_submodule(parent), child, layer)
    with torch.no_grad():
        merged.get_submodule(f"{parent}.{child}").weight.add_(layer.up.weight @ layer.down.weight)
    x = some().double()
    assert not torch.allclose(model(x), small_vit().eval()(x))
    torch.testing.assert_close(model(x), merged(x))
    torch.testing.assert_close(model.features(x)[0], merged.features(x)[0])
    model(x).square().sum().backward()
    assert layer.up.weight.grad.abs().max() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.trace(model, x)(x), merged(x))


def test_replaced_linear_layers_beside_copies_of_weights():
    model = small_vit(torch.float32).eval()
    layer = model.blocks[0].attn.qkv = LowRank(model.blocks[0].attn.qkv)
    expected = model(some())
    hold_copies(model, torch.float32)
    torch.testing.assert_close(model(some()), expected, rtol=1e-4, atol=1e-4)
    layer.up.weight.data.add_(1)
    assert not torch.allclose(model(some()), expected)


def test_second_derivatives_of_a_vit_are_an_error():
    x = some().requires_grad_()
    (gradient,) = torch.autograd.grad(small_vit(torch.float32)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        gradient.square().sum().backward()
