"""DINOv2 and DINOv3: the network against its formula, and small nets of other libraries into ours and back."""

import dino_train
import onnxruntime
import pytest
import torch
import transformers
from dino_train.cli import main
from dino_train.models.export import export
from dino_train.models.plain_vit import PLAIN_SIZES, PlainSize, PlainViT
from dino_train.models.vit import VIT_SIZES, vit
from dino_train.models.weights import arch_of, load_trained
from test_export import torchvision  # noqa: F401
from test_model import vit_by_hand
from tiny_run import make_images

HIDDEN = {"mlp": 256, "swiglu": 176}
SMALL = {
    "small_vitg": PlainSize(64, 2, 4, 176, swiglu=True, rope=False),
    "small_vit3": PlainSize(64, 2, 4, 256, swiglu=False, rope=True),
    "small_vit3plus": PlainSize(64, 2, 4, 176, swiglu=True, rope=True),
}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NANO = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
IMAGE = {"image_size": 28, "patch_size": 7}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    for arch, size in SMALL.items():
        monkeypatch.setitem(PLAIN_SIZES, arch, size)


def shaken(net, seed=0):
    """Weights that all affect the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return net.eval()


def small(arch, registers=4):
    return shaken(PlainViT(SMALL[arch], patch_size=7, img_size=28, registers=registers))


def images(h=28, w=28, batch=2):
    return torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("arch", "registers"), [("small_vitg", 0), ("small_vitg", 2), ("small_vit3", 0), ("small_vit3plus", 4)]
)
@pytest.mark.parametrize("size", [(28, 28), (35, 16)])
def test_features_and_attention_are_those_of_the_formula(arch, registers, size):
    net, batch = small(arch, registers).double(), images(*size, batch=1).double()
    outputs, weights = vit_by_hand(dict(net.named_parameters()), batch[0], 7, heads=4)
    kept = [0, *range(1 + registers, weights.shape[-1])]
    tolerance = {"rtol": 0, "atol": 1e-6 if "3" in arch else 1e-12}  # periods are float32
    torch.testing.assert_close(net(batch)[0], outputs[-1][0], **tolerance)
    for tokens, expected in zip(net.features(batch, 2), outputs, strict=True):
        torch.testing.assert_close(tokens[0], expected[kept], **tolerance)
    torch.testing.assert_close(net.attention(batch)[0], weights[:, 0, kept], **tolerance)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("arch", ["small_vit3plus", "vit_nano"])
def test_other_dtypes_no_images_and_traces(arch):
    net = small(arch) if arch in SMALL else shaken(vit(arch, patch_size=7, img_size=28, registers=3))
    trace, expected = torch.jit.trace(net, images()), net(images(42, 35))
    torch.testing.assert_close(trace(images()), net(images()), rtol=0, atol=1e-4)
    assert net.features(images()[:0])[0].shape == (0, 17, net.embed_dim) and net(images()[:0]).shape[0] == 0
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        found = net.to(dtype)(images(42, 35).to(dtype)).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        net.float()


def test_bad_input():
    net = small("small_vit3")
    with pytest.raises(ValueError, match=r"n_blocks must be from 1 to the number of blocks, 2, got 3"):
        net.features(images(), 3)
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, height, width\], got \[2, 1, 28, 28\]"):
        net(images()[:, :1])


def original(net, generator):
    """The weights of a net as the authors of DINOv3 (or DINOv2) publish them, and the factors of its branches."""
    state, scales, dim, rope = {}, [], net.embed_dim, hasattr(net, "rope_embed")
    for name, tensor in net.state_dict().items():
        if rope and ".mlp.w12." in name:
            for part, half in zip(("w1", "w2"), tensor.chunk(2), strict=True):
                state[name.replace("w12", part)] = half
        else:
            state[{"register_tokens": "storage_tokens"}.get(name, name)] = tensor
    for i in range(len(net.blocks)):
        scales.append([torch.rand(dim, generator=generator) for _ in range(2)])
        state |= {f"blocks.{i}.ls{j + 1}.gamma": gamma for j, gamma in enumerate(scales[-1])}
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3, dim).index_fill(0, torch.tensor(1), 0).flatten()
    state |= {"mask_token": torch.ones(1, dim), "local_cls_norm.weight": torch.ones(dim)}
    return state, scales


@pytest.mark.parametrize("arch", ["small_vit3", "small_vit3plus"])
def test_files_of_dinov3_load(tmp_path, arch):
    net = small(arch)
    state, scales = original(net, torch.Generator().manual_seed(2))
    torch.save(state, tmp_path / "backbone.pth")
    torch.save({"teacher": {f"backbone.{name}": x for name, x in state.items()}}, tmp_path / "teacher.pth")
    parameters = {name: x.double() for name, x in net.named_parameters()}
    for name in parameters:
        if name.endswith("qkv.bias"):
            parameters[name] = parameters[name].clone().index_fill(0, torch.arange(64, 128), 0)  # of the keys
    batch = images()
    expected, _ = vit_by_hand(parameters, batch[0].double(), 7, 4, [[x.double() for x in pair] for pair in scales])
    for name in ("backbone", "teacher"):
        trained = load_trained(tmp_path / f"{name}.pth")
        assert (trained.arch, trained.patch_size) == (arch, 7)
        found = trained.backbone(batch)[0].double()
        torch.testing.assert_close(found, expected[-1][0].detach(), rtol=0, atol=1e-5)
    # Their periods are rounded to bfloat16, and taken as they are.
    torch.save({**state, "rope_embed.periods": state["rope_embed.periods"].bfloat16()}, tmp_path / "backbone.pth")
    periods = dino_train.load_backbone(tmp_path / "backbone.pth").rope_embed.periods
    assert torch.equal(periods, periods.bfloat16().float()) and not torch.equal(periods, state["rope_embed.periods"])


@torch.no_grad()
@pytest.mark.parametrize("arch", ["small_vit3", "small_vit3plus", "small_vitg"])
def test_original_files_are_read_as_timm_reads_them(tmp_path, arch):
    timm = pytest.importorskip("timm")
    state, _ = original(small(arch), torch.Generator().manual_seed(2))
    if arch == "small_vitg":
        state = {name.replace("storage", "register"): x for name, x in state.items() if "bias_mask" not in name}
        name, options, convert = "giant_patch14_reg4_dinov2", {"mlp_ratio": 5.5}, timm.models.vision_transformer
    else:
        name = "small_plus_patch16_dinov3_qkvb" if arch.endswith("plus") else "small_patch16_dinov3_qkvb"
        options = {"global_pool": "token", "mlp_ratio": SMALL[arch].hidden_dim / 64}
        convert = timm.models.eva
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 7, "img_size": 28, "num_classes": 0}
    model = timm.create_model(f"vit_{name}", **shape, **options).eval()
    torch.save(state, tmp_path / "original.pth")
    found = model.load_state_dict(convert.checkpoint_filter_fn(dict(state), model), strict=False)
    assert not found.missing_keys
    expected = dino_train.load_backbone(tmp_path / "original.pth")(images())
    torch.testing.assert_close(expected, model(images()), rtol=0, atol=1e-4)


def test_checkpoints_of_dinov2s_training_load(tmp_path):
    """Blocks in chunks; a mask token, and heads."""
    net = shaken(vit("vit_nano", patch_size=7, img_size=28, registers=2))
    chunks = {"0": "0.0", "1": "1.1", "2": "1.2"}
    state = {}
    for name, tensor in net.state_dict().items():
        parts = name.split(".")
        parts[1:2] = [chunks[parts[1]]] if parts[0] == "blocks" else parts[1:2]
        state["backbone." + ".".join(parts)] = tensor
    state |= {"backbone.mask_token": torch.ones(1, 96), "dino_head.mlp.0.weight": torch.ones(2, 2)}
    torch.save({"teacher": state}, tmp_path / "teacher_checkpoint.pth")
    found = dino_train.load_backbone(tmp_path / "teacher_checkpoint.pth")
    assert torch.equal(found(images()), net(images()))


def of_huggingface(name):
    t = transformers
    with_registers = {"num_register_tokens": 4}
    kind, model, shape, options = {
        "dinov2": (t.Dinov2Config, t.Dinov2Model, NANO, {}),
        "dinov2_g": (t.Dinov2Config, t.Dinov2Model, SHAPE, {"use_swiglu_ffn": True}),
        "registers": (t.Dinov2WithRegistersConfig, t.Dinov2WithRegistersModel, NANO, with_registers),
        "registers_g": (
            *(t.Dinov2WithRegistersConfig, t.Dinov2WithRegistersModel, SHAPE),
            with_registers | {"use_swiglu_ffn": True},
        ),
        "dinov3": (t.DINOv3ViTConfig, t.DINOv3ViTModel, SHAPE, with_registers | {"intermediate_size": 256}),
        "dinov3_plus": (
            *(t.DINOv3ViTConfig, t.DINOv3ViTModel, SHAPE),
            with_registers | {"intermediate_size": 176, "use_gated_mlp": True, "hidden_act": "silu"},
        ),
    }[name]
    return shaken(model(kind(**shape, **IMAGE, **options)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "dinov2_g", "registers", "registers_g", "dinov3", "dinov3_plus"])
def test_nets_of_hugging_face_load_and_go_back(tmp_path, name):
    model = of_huggingface(name)
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "names_of_modules.pth")
    trained = load_trained(tmp_path / "folder")
    assert (type(trained.backbone) is PlainViT) == (trained.arch in SMALL)
    lead = trained.backbone.lead
    # Without registers Dinov2Model interpolates positions a little otherwise than DINOv2's own code, which we follow.
    for size in [(28, 28)] + [(42, 35)] * (lead > 1):
        expected = model(images(*size)).last_hidden_state
        expected = torch.cat((expected[:, :1], expected[:, lead:]), dim=1)
        torch.testing.assert_close(trained.backbone.features(images(*size))[0], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(trained.backbone(images(*size)), expected[:, 0], rtol=0, atol=1e-4)
    again = dino_train.load_backbone(tmp_path / "names_of_modules.pth")
    assert torch.equal(again(images()), trained.backbone(images()))
    if name == "dinov2":  # without layer scale and registers it goes to ViTModel, as in test_export.py
        return
    export(trained, tmp_path / "back", "huggingface")
    back, info = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    found = back.eval()(images()).last_hidden_state[:, 0]
    torch.testing.assert_close(found, model(images()).last_hidden_state[:, 0], rtol=0, atol=1e-4)
    assert torch.equal(dino_train.load_backbone(tmp_path / "back")(images()), trained.backbone(images()))


TIMM = {
    "vit_small_patch14_reg4_dinov2": {"embed_dim": 96, "depth": 3, "num_heads": 3, "dynamic_img_size": True},
    "vit_giant_patch14_dinov2": {"mlp_ratio": 5.5},
    "vit_giant_patch14_reg4_dinov2": {"mlp_ratio": 5.5, "dynamic_img_size": True},
    "vit_small_patch16_dinov3": {"global_pool": "token"},
    "vit_small_patch16_dinov3_qkvb": {"global_pool": "token"},
    "vit_small_plus_patch16_dinov3_qkvb": {"global_pool": "token", "mlp_ratio": 2.75},
}


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_nets_of_timm_load_and_go_back(tmp_path, name):
    timm = pytest.importorskip("timm")
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 7, "img_size": 28, "num_classes": 0}
    model = shaken(timm.create_model(name, **{**shape, **TIMM[name]}))
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    trained = load_trained(tmp_path / "timm.pth")
    for size in [(28, 28)] + [(42, 35)] * ("reg4" in name or "dinov3" in name):
        torch.testing.assert_close(trained.backbone(images(*size)), model(images(*size)), rtol=0, atol=1e-4)
    trained.image_size = 28
    export(trained, tmp_path / "back", "timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    torch.testing.assert_close(back(images()), model(images()), rtol=0, atol=1e-4)
    assert torch.equal(dino_train.load_backbone(tmp_path / "back")(images()), trained.backbone(images()))


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["small_vitg", "small_vit3plus"])
def test_other_formats(tmp_path, arch, form):
    net = small(arch)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    trained = load_trained(tmp_path / "net.pth")
    trained.image_size = 28
    export(trained, tmp_path / f"net.{form}", form)
    if form == "safetensors":
        assert torch.equal(dino_train.load_backbone(tmp_path / "net.safetensors")(images()), net(images()))
        return
    (found,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"images": images(batch=3).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(images(batch=3)), rtol=0, atol=1e-4)


# In millions: table 4 of the DINOv3 paper and DINOv2's model card, with what was rounded there.
COUNTS = {
    "dinov2_vitg14": 1136,
    "dinov3_vits16": 22,
    "dinov3_vits16plus": 29,
    "dinov3_vitb16": 86,
    "dinov3_vitl16": 303,
    "dinov3_vith16plus": 841,
    "dinov3_vit7b16": 6716,
}


@pytest.mark.parametrize("arch", COUNTS)
def test_sizes_are_the_published_ones_and_known_by_the_weights(arch):
    with torch.device("meta"):
        net = PlainViT(PLAIN_SIZES[arch], patch_size=14 if "dinov2" in arch else 16, img_size=518, registers=4)
    assert round(sum(x.numel() for x in net.parameters()) / 1e6) == COUNTS[arch]
    assert arch_of(net.state_dict(), "", None) == arch
    assert PLAIN_SIZES[arch].embed_dim // PLAIN_SIZES[arch].num_heads in (64, 128)


def test_they_are_evaluated_and_not_offered_for_training(tmp_path, capsys):
    torch.save(small("small_vit3").state_dict(), tmp_path / "net.pth")
    data = make_images(tmp_path / "images")
    words = ["--checkpoint", str(tmp_path / "net.pth"), "--data", str(data), "--image-size", "28"]
    assert main(["evaluate", "knn", *words]) == 0 and main(["evaluate", "attention", *words]) == 0
    assert "top-1" in capsys.readouterr().out and (tmp_path / "attention/sheet.png").exists()
    assert not set(PLAIN_SIZES) & set(VIT_SIZES)
    with pytest.raises(SystemExit):
        main(["pretrain", "--data", str(data), "--arch", "dinov3_vits16"])
