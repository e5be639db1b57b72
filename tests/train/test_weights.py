"""Import of weights: generated files with the names of the published reference weights."""

import argparse
import os
import re
import zipfile
from datetime import date
from pathlib import Path

import dino_train
import numpy as np
import pytest
import torch
from dino_train.cli import main
from dino_train.models.export import export
from dino_train.models.resnet import resnet50, resnet_nano
from dino_train.models.vit import vit
from dino_train.models.weights import fit, load_linear, load_trained
from test_model import vit_by_hand

PATCH, SIZE = 8, 32


def published_vit(seed=0, dim=96, depth=3, patch=PATCH, size=SIZE):
    cells = (size // patch) ** 2
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + cells, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        for name, shape in {
            "norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
            "norm2": (dim,), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
        }.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) * 0.05 for name, shape in shapes.items()}


def published_head(dim=96, hidden=8, bottleneck=4, out=16):
    sizes = {"mlp.0": (hidden, dim), "mlp.2": (hidden, hidden), "mlp.4": (bottleneck, hidden)}
    head = {f"{name}.weight": torch.zeros(shape) for name, shape in sizes.items()}
    head |= {f"{name}.bias": torch.zeros(shape[0]) for name, shape in sizes.items()}
    return {**head, "last_layer.weight_g": torch.ones(out, 1), "last_layer.weight_v": torch.zeros(out, bottleneck)}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def full_checkpoint(teacher, student, module=""):
    """The checkpoint of main_dino.py:276-290; `module` is the prefix of a teacher with batch norms."""
    head = prefixed(published_head(), "head.")
    return {
        "student": prefixed({**prefixed(student, "backbone."), **head}, "module."),
        "teacher": prefixed({**prefixed(teacher, "backbone."), **head}, module),
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": np.float64(0.1)}]},
        "epoch": 100,
        "args": argparse.Namespace(  # run_with_submitit.py stores a Path
            arch="deit_tiny", patch_size=16, data_path="/x", global_crops_scale=(0.4, 1.0), output_dir=Path("/out/7")
        ),
        "dino_loss": {"center": torch.zeros(1, 16)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
    }


def assert_is(backbone, state):
    own = backbone.state_dict()
    assert own.keys() == state.keys() and not backbone.training
    assert all(torch.equal(own[key], state[key]) for key in state)


TEACHER, STUDENT = published_vit(0), published_vit(1)
FULL = full_checkpoint(TEACHER, STUDENT)
PUBLISHED = {
    "backbone": (TEACHER, "weights"),
    "module": (prefixed(TEACHER, "module."), "weights (without prefix 'module.')"),
    "net": (FULL["teacher"], "weights (without prefix 'backbone.' and 8 tensors of a head)"),
    "classifier": ({**TEACHER, "fc.weight": torch.zeros(3, 96)}, "weights (without 1 tensors of a head)"),
    "full": (FULL, "teacher (without prefix 'backbone.' and 8 tensors of a head)"),
    "batch_norm": (
        full_checkpoint(TEACHER, STUDENT, "module."),
        "teacher (without prefix 'module.backbone.' and 8 tensors of a head)",
    ),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vits_load_and_log_what_was_loaded(tmp_path, caplog, name, zipped):
    caplog.set_level("INFO", "dino_train.models.weights")
    state, words = PUBLISHED[name]
    path = tmp_path / f"{name}.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    trained = load_trained(path)
    assert_is(trained.backbone, TEACHER)
    assert (trained.arch, trained.patch_size, trained.image_size) == ("vit_nano", PATCH, SIZE)
    assert f"{path}: {words}, a vit_nano/8\n" in caplog.text


def test_the_student_of_a_full_checkpoint(tmp_path, caplog):
    caplog.set_level("INFO", "dino_train.models.weights")
    torch.save(FULL, tmp_path / "checkpoint.pth")
    assert_is(dino_train.load_backbone(tmp_path / "checkpoint.pth", net="student"), STUDENT)
    words = "student (without prefix 'module.backbone.' and 8 tensors of a head), a vit_nano/8"
    assert f"checkpoint.pth: {words}\n" in caplog.text


@pytest.mark.parametrize(
    ("here", "there"),
    [(b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"pathlib\nPosixPath", b"pathlib._local\nPosixPath")],
    ids=["numpy 1", "Python 3.13"],
)
def test_names_of_other_versions_load(tmp_path, here, there):
    torch.save(FULL, tmp_path / "checkpoint.pth")
    changed = 0
    with zipfile.ZipFile(tmp_path / "checkpoint.pth") as own, zipfile.ZipFile(tmp_path / "other.pth", "w") as other:
        for name in own.namelist():
            changed += own.read(name).count(here)
            other.writestr(name, own.read(name).replace(here, there))
    assert changed
    assert_is(dino_train.load_backbone(tmp_path / "other.pth"), TEACHER)


@pytest.mark.parametrize("value", [np.float32(0.1), np.float16(0.1), np.int64(3), np.uint8(3), np.bool_(True)])
def test_numpy_scalars_of_any_dtype_load(tmp_path, value):
    torch.save({**FULL, "best": value}, tmp_path / "checkpoint.pth")
    assert_is(dino_train.load_backbone(tmp_path / "checkpoint.pth"), TEACHER)


def test_published_weights_give_the_expected_features(tmp_path):
    torch.save(TEACHER, tmp_path / "backbone.pth")
    image = torch.randn(3, SIZE, SIZE)
    parameters = {name: value.double() for name, value in TEACHER.items()}
    outputs, weights = vit_by_hand(parameters, image.double(), PATCH, heads=3)
    backbone = dino_train.load_backbone(str(tmp_path / "backbone.pth"))
    torch.testing.assert_close(backbone(image[None])[0].double(), outputs[-1][0], rtol=0, atol=1e-5)
    for tokens, expected in zip(backbone.features(image[None], 2), outputs[-2:], strict=True):
        torch.testing.assert_close(tokens[0].double(), expected, rtol=0, atol=1e-5)
    attention = backbone.attention(image[None])
    torch.testing.assert_close(attention[0].double(), weights[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "patch", "size"),
    [("vit_nano", 16, 32), ("vit_tiny", 8, 64), ("vit_small", 16, 224), ("vit_small", 8, 224), ("vit_base", 16, 224)],
)
def test_arch_and_sizes_are_inferred_from_the_weights(tmp_path, arch, patch, size):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in vit(arch, patch_size=patch, img_size=size).state_dict().items()}
    torch.save({key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}, tmp_path / "x.pth")
    trained = load_trained(tmp_path / "x.pth")
    assert (trained.arch, trained.patch_size, trained.image_size) == (arch, patch, size)


def test_a_resnet_nano_is_known_by_its_weights(tmp_path):
    net = resnet_nano()
    torch.save(net.state_dict(), tmp_path / "nano.pth")
    trained = load_trained(tmp_path / "nano.pth")
    assert trained.arch == "resnet_nano"
    assert_is(trained.backbone, net.state_dict())


def test_published_resnet50s_load(tmp_path, caplog):
    caplog.set_level("INFO", "dino_train.models.weights")
    torch.manual_seed(0)
    state = resnet50().state_dict()
    formats = {
        "backbone": state,
        "imagenet": {**state, "fc.weight": torch.zeros(5, 2048), "fc.bias": torch.zeros(5)},
        "full": full_checkpoint(state, state, "module."),
    }
    for name, published in formats.items():
        torch.save(published, tmp_path / f"{name}.pth")
        trained = load_trained(tmp_path / f"{name}.pth")
        assert_is(trained.backbone, state)
        assert trained.arch == "resnet50" and f"{name}.pth: " in caplog.text and caplog.text.endswith(", a resnet50\n")
    assert dino_train.load_backbone(tmp_path / "full.pth")(torch.zeros(1, 3, 64, 64)).shape == (1, 2048)
    for call in (trained.backbone.features, trained.backbone.attention):
        with pytest.raises(ValueError, match="a ResNet has no blocks of tokens and no attention"):
            call(torch.zeros(1, 3, 64, 64))


OTHERS = {
    # file: what its keys are, for (online network, its moving average), and whether it has both
    "moco": lambda online, average: {
        "state_dict": {
            **prefixed({**online, "fc.0.weight": torch.zeros(4, 4), "fc.2.bias": torch.zeros(4)}, "module.encoder_q."),
            **prefixed({**average, "fc.0.weight": torch.zeros(4, 4)}, "module.encoder_k."),
            "module.queue": torch.zeros(4, 8),
            "module.queue_ptr": torch.zeros(1),
        },
        "arch": "resnet50",
    },
    "mocov3": lambda online, average: {
        "state_dict": {
            **prefixed({**online, "fc.0.weight": torch.zeros(4, 4)}, "module.base_encoder."),
            **prefixed({**average, "fc.0.weight": torch.zeros(4, 4)}, "module.momentum_encoder."),
            "module.predictor.0.weight": torch.zeros(4, 4),
        },
    },
    "swav": lambda online, average: prefixed(
        {**online, "projection_head.0.weight": torch.zeros(4, 4), "prototypes.weight": torch.zeros(3, 4)}, "module."
    ),
    "solo": lambda online, average: {
        "state_dict": {
            **prefixed(online, "backbone."),
            **prefixed(average, "momentum_backbone."),
            "projector.0.weight": torch.zeros(4, 4),
            "predictor.0.weight": torch.zeros(4, 4),
            "classifier.weight": torch.zeros(4, 4),
        },
    },
    "lightly": lambda online, average: {
        "state_dict": {
            **prefixed(numbered(online), "backbone."),
            **prefixed(numbered(average), "backbone_momentum."),
            "projection_head.layers.0.weight": torch.zeros(4, 4),
        },
    },
}


def numbered(state):
    """Names of torch.nn.Sequential(*resnet.children())."""
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{numbers[name.partition('.')[0]]}.{name.partition('.')[2]}": x for name, x in state.items()}


@pytest.mark.parametrize(
    "name", ["moco", "lightly", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mocov3", "swav", "solo"))]
)
def test_checkpoints_of_other_methods_load(tmp_path, name):
    torch.manual_seed(0)
    online, average = resnet50().state_dict(), resnet50().state_dict()
    torch.save(OTHERS[name](online, average), tmp_path / "x.pth.tar")
    trained = load_trained(tmp_path / "x.pth.tar")
    assert_is(trained.backbone, online)
    assert trained.arch == "resnet50" and trained.net == "weights"
    assert_is(dino_train.load_backbone(tmp_path / "x.pth.tar", net="student"), online)
    if name == "swav":
        return
    assert_is(dino_train.load_backbone(tmp_path / "x.pth.tar", net="teacher"), average)
    torch.save({"state_dict": prefixed(online, "module.base_encoder.")}, tmp_path / "one.pth")
    with pytest.raises(ValueError, match="the file has no teacher, only base_encoder"):
        load_trained(tmp_path / "one.pth", net="teacher")


WRAPPED = {
    "torch.compile": prefixed(TEACHER, "module._orig_mod."),
    "compiled checkpoint": {"teacher": prefixed(TEACHER, "backbone._orig_mod."), "student": STUDENT},
    "DeiT": {"model": TEACHER, "optimizer": {}, "epoch": 3},
    "Lightning": {"state_dict": {**prefixed(TEACHER, "model.backbone."), "criterion.center": torch.zeros(1, 4)}},
    "DINO of lightly": {
        "state_dict": {**prefixed(STUDENT, "student_backbone.vit."), **prefixed(TEACHER, "teacher_backbone.vit.")},
    },
    "both nets by prefix": {**prefixed(STUDENT, "student.backbone."), **prefixed(TEACHER, "teacher.backbone.")},
    "iBOT": {"teacher": {**prefixed(TEACHER, "backbone."), "backbone.masked_embed": torch.zeros(1, 96)}},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_known_wrappers_are_removed(tmp_path, name):
    torch.save(WRAPPED[name], tmp_path / "x.pth")
    assert_is(load_trained(tmp_path / "x.pth").backbone, TEACHER)


def test_vits_of_mocov3_have_12_heads(tmp_path):
    weights = published_vit(dim=384, depth=12, patch=16, size=32)
    torch.save({"state_dict": prefixed(weights, "module.base_encoder.")}, tmp_path / "x.pth.tar")
    trained = load_trained(tmp_path / "x.pth.tar")
    assert trained.arch == "vit_small_12heads" and trained.backbone.attention(torch.zeros(1, 3, 32, 32)).shape[1] == 12
    export(trained, tmp_path / "x.safetensors", "safetensors")
    assert load_trained(tmp_path / "x.safetensors").arch == "vit_small_12heads"
    torch.save(weights, tmp_path / "bare.pth")
    assert load_trained(tmp_path / "bare.pth").arch == "vit_small"


def test_published_linear_classifiers_load(tmp_path, caplog):
    caplog.set_level("INFO", "dino_train.models.weights")
    weight, bias = torch.randn(10, 1536), torch.randn(10)
    state = {"module.linear.weight": weight, "module.linear.bias": bias}
    published = {"epoch": 100, "state_dict": state, "optimizer": {}, "scheduler": {"base_lrs": [0.1]}, "best_acc": 77.0}
    for form in (published, state, {"linear.weight": weight, "linear.bias": bias}):
        torch.save(form, tmp_path / "checkpoint.pth.tar")
        linear = load_linear(tmp_path / "checkpoint.pth.tar")
        x = torch.randn(3, 1536)
        torch.testing.assert_close(linear(x), x @ weight.T + bias)
    assert "checkpoint.pth.tar: linear classifier, 10 classes of 1536 features" in caplog.text
    for wrong in (TEACHER, {"linear.weight": weight}, {"linear.weight": weight, "linear.bias": bias[:9]}, {}):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=r"no linear classifier: expected linear.weight \[classes, features\]"):
            load_linear(tmp_path / "wrong.pth")
    torch.save(published, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="expected a backbone's weights, got module.linear.weight, "):
        load_trained(tmp_path / "linear.pth")


def nano(**kwargs):
    torch.manual_seed(0)
    return vit("vit_nano", **{"patch_size": 8, "img_size": 32, **kwargs})


def test_mismatched_weights_are_an_error():
    source = nano().state_dict()
    missing = {key: value for key, value in source.items() if key not in ("norm.bias", "cls_token")}
    with pytest.raises(ValueError, match=r"missing cls_token; missing norm\.bias$"):
        fit(nano(), missing)
    for value in (torch.zeros(1), 3):
        with pytest.raises(ValueError, match=r"unexpected extra\.weight$"):
            fit(nano(), {**source, "extra.weight": value})
    with pytest.raises(ValueError, match=r"pos_embed has shape \[1, 17, 96\], expected \[1, 65, 96\]$"):
        fit(nano(img_size=64), source)
    target = nano()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    for allowed in (False, True):  # no name matches: an error also with partial loading
        with pytest.raises(ValueError, match=r"missing .*; and \d+ more$") as error:
            fit(target, {"conv1.weight": torch.zeros(64, 3, 7, 7)}, allow_partial=allowed)
    assert str(error.value).count("missing") == 5
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_partial_weights_load_only_on_request(tmp_path, capsys, caplog):
    state = {key: value + 1 for key, value in nano().state_dict().items() if not key.startswith("blocks.1.")}
    state |= {"blocks.1.norm1.bias": torch.zeros(5), "register_tokens": torch.zeros(1)}
    path = tmp_path / "part.pth"
    torch.save(state, path)
    words = ["export", "--checkpoint", str(path), "--output", str(tmp_path / "out.safetensors")]
    assert main(words) == 1
    assert "do not fit this backbone" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
    assert main([*words, "--allow-partial"]) == 0
    assert "missing blocks.1.attn.qkv.weight" in caplog.text and "unexpected register_tokens" in caplog.text
    assert "blocks.1.norm1.bias has shape [5], expected [96]" in caplog.text and "30 of 42 weights" in caplog.text
    loaded = dino_train.load_backbone(tmp_path / "out.safetensors").state_dict()
    for key, value in loaded.items():
        assert key.startswith("blocks.1.") or torch.equal(value, state[key]), key


@pytest.mark.parametrize(
    ("state", "words", "message"),
    [
        ({"student": {}, "epoch": 1}, [], "the checkpoint has no 'teacher', only student, epoch"),
        ({"teacher": {}}, [], "expected a backbone's weights, or a teacher and a student, got nothing"),
        ({"a": torch.zeros(1)}, [], "of no known architecture .vit_nano, .*, resnet_nano, .*, dinov3_vit7b16.: a;"),
        (TEACHER, ["--arch", "vit_tiny"], r"missing blocks.3.norm1.weight; .*; and 145 more$"),
        (TEACHER, ["--patch-size", "16"], r"pos_embed has shape \[1, 17, 96\], expected \[1, 5, 96\]"),
        ({"teacher": TEACHER, "evil": os.system}, [], r"not loaded for safety \(it asks for posix.system\)$"),
        ({"teacher": TEACHER, "x": date(2020, 1, 1)}, [], r"not loaded for safety \(it asks for datetime.date\)$"),
        (None, [], "no checkpoint at"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, state, words, message):
    path = tmp_path / "x.pth"
    if state is not None:
        torch.save(state, path)
    assert main(["export", "--checkpoint", str(path), *words]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error


def test_invalid_safetensors(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        dino_train.load_backbone(tmp_path / "junk.safetensors")
    with pytest.raises(ValueError, match="no weights at"):
        dino_train.load_backbone(tmp_path / "nothing.safetensors")
