"""Export of weights: outputs of other libraries compared with ours."""

import json
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from dino_train.common.views import eval_transform
from dino_train.models.export import export
from dino_train.models.resnet import resnet50
from dino_train.models.vit import vit
from dino_train.models.weights import Trained, load_trained
from PIL import Image
from safetensors.torch import load_file

FORMATS = ("safetensors", "timm", "huggingface", "onnx")


def trained(arch="vit_nano", patch_size=8, image_size=32):
    """Weights that all affect the output: no bias is 0, no scale of a norm is 1."""
    torch.manual_seed(0)
    net = resnet50() if arch == "resnet50" else vit(arch, patch_size=patch_size, img_size=image_size)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01 if arch == "resnet50" else 0.05)
    return Trained(net.eval(), "weights", arch, patch_size, image_size, None)


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    """Make torchvision importable for timm and transformers, even if its compiled operators are for another build of
    torch (for example the default wheel with a CPU build of torch). The tests do not call them; the import needs two
    operators to be declared.
    """
    operators = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield operators


@pytest.fixture(scope="module", params=["vit_nano", "resnet50"])
def net(request):
    return trained(request.param)


@torch.no_grad()
def assert_same_features(model, net, batch=3):
    images = torch.randn(batch, 3, net.image_size, net.image_size)
    want = net.backbone(images)
    assert (want - net.backbone(torch.zeros_like(images))).abs().max() > 0.01  # the output depends on the images
    torch.testing.assert_close(torch.as_tensor(model(images)), want, rtol=1e-4, atol=1e-4)


def test_safetensors_can_be_loaded_again(net, tmp_path):
    path = tmp_path / "out/backbone.safetensors"
    for _ in range(2):  # the second overwrites the first
        export(net, path)
    back = load_trained(path)
    assert (back.arch, back.patch_size, back.image_size) == (net.arch, net.patch_size if "vit" in net.arch else 16, 32)
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(back.backbone.state_dict()[name], value), name
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_timm(net, tmp_path):
    timm = pytest.importorskip("timm")
    export(net, tmp_path / "timm", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert_same_features(model, net)
    seen = timm.data.resolve_model_data_config(model)
    assert (seen["interpolation"], seen["crop_pct"], seen["crop_mode"]) == ("bicubic", 0.875, "center")
    sizes = [tuple(seen[key]) for key in ("input_size", "mean", "std")]
    assert sizes == [(3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]


@pytest.mark.parametrize("patch", [16, 8])
def test_timm_by_the_name_of_the_published_weights(tmp_path, patch):
    timm = pytest.importorskip("timm")
    net = trained("vit_small", patch, 224)
    export(net, tmp_path / "timm", "timm")
    weights = tmp_path / "timm/model.safetensors"
    assert_same_features(timm.create_model(f"vit_small_patch{patch}_224.dino", checkpoint_path=weights).eval(), net, 2)


def test_a_folder_for_timm(net, tmp_path):
    """Works without timm too: its names are those of the reference, as ours."""
    export(net, tmp_path / "timm", "timm")
    assert sorted(file.name for file in (tmp_path / "timm").iterdir()) == ["config.json", "model.safetensors"]
    written, own = load_file(tmp_path / "timm/model.safetensors"), net.backbone.state_dict()
    assert written.keys() == own.keys() and all(torch.equal(written[name], own[name]) for name in own)
    config = json.loads((tmp_path / "timm/config.json").read_text())
    if net.arch == "resnet50":
        assert (config["architecture"], config["model_args"]) == ("resnet50", {})
    else:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}
        assert (config["architecture"], config["model_args"]) == ("vit_tiny_patch16_224", sizes)


def test_huggingface(tmp_path):
    net = trained()
    export(net, tmp_path / "hf", "huggingface")
    model, report = transformers.ViTModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report
    assert_same_features(lambda images: model.eval()(images).last_hidden_state[:, 0], net)
    images = torch.randn(2, 3, 32, 32)
    tokens = model(images).last_hidden_state
    torch.testing.assert_close(tokens, net.backbone.features(images)[0], rtol=0, atol=1e-4)


def test_huggingface_processor_equals_our_evaluation_transform(tmp_path):
    export(trained(image_size=224), tmp_path / "hf", "huggingface")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (333, 500, 3), np.uint8))
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    # Tolerance: one 8-bit level, if torchvision is installed and resizes; otherwise exact.
    torch.testing.assert_close(pixels, eval_transform(image, 224), rtol=0, atol=0.0176)


def test_onnx(net, tmp_path):
    export(net, tmp_path / "backbone.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "backbone.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        assert_same_features(lambda images: session.run(["features"], {"images": images.numpy()})[0], net, batch)


def test_a_failed_export_leaves_no_files(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="huggingface takes a ViT, got resnet50; for it .* timm and onnx"):
        export(trained("resnet50"), tmp_path / "hf", "huggingface")
    with pytest.raises(ValueError, match="timm has no resnet_nano; for it there are safetensors and onnx"):
        export(replace(trained("resnet50"), arch="resnet_nano"), tmp_path / "timm", "timm")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ValueError, match=r"the ONNX format needs .*onnxscript.*: pip install .*onnxscript, or the extra \[onnx\]"
    ):
        export(trained(), tmp_path / "backbone.onnx", "onnx")
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    for form in FORMATS[:3]:
        with pytest.raises(OSError, match="disk full"):
            export(trained(), tmp_path / form, form)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path):
    kept = tmp_path / "folder/kept.txt"
    kept.parent.mkdir()
    (tmp_path / "file").write_text("kept")
    export(trained(), kept.parent, "timm")  # an empty folder may be replaced
    before = sorted(kept.parent.iterdir())
    for form in FORMATS:
        with pytest.raises(ValueError, match="folder is a folder.*; choose another --output"):
            export(trained(), kept.parent, form)
    with pytest.raises(ValueError, match="file is a file, and timm is written as a folder"):
        export(trained(), tmp_path / "file", "timm")
    assert sorted(kept.parent.iterdir()) == before and (tmp_path / "file").read_text() == "kept"
