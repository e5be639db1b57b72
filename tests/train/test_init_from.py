"""Runs that start from weights, and the adaption of weights to other images."""

from dataclasses import replace

import dino_train
import pytest
import torch
import torch.nn.functional as F
from dino_train.common import checkpoint
from dino_train.common.checkpoint import CheckpointError
from dino_train.common.metrics import read_metrics
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.init_from import init_from
from dino_train.engine.learner import Learner
from dino_train.engine.train import Run, pretrain
from dino_train.models.adapt import adapt, resample_patch
from dino_train.models.export import export
from dino_train.models.plain_vit import PLAIN_SIZES, PlainViT
from dino_train.models.resnet import resnet50
from dino_train.models.vit import vit
from dino_train.models.weights import load_trained
from safetensors.torch import save_file
from test_model import vit_by_hand
from test_weights import FULL, PATCH, SIZE, TEACHER, assert_is, full_checkpoint, published_vit
from tiny_run import make_images

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    return PretrainConfig(
        data=make_images(tmp_path / "images"),
        output_dir=tmp_path / "run",
        arch="vit_nano",
        patch_size=8,
        out_dim=16,
        head_hidden_dim=8,
        head_bottleneck_dim=4,
        global_crops_size=32,
        local_crops_size=16,
        local_crops_number=1,
        batch_size_per_gpu=4,
        epochs=2,
        log_interval=2,
        num_workers=1,
        knn_freq=1,
        device="cpu",
    )


def learner(config, **changes) -> Learner:
    torch.manual_seed(3)
    return Learner(replace(config, **changes), 5, CPU)


def head_of(net):
    return {key: value for key, value in net.state_dict().items() if not key.startswith("backbone.")}


def test_a_run_continues_from_a_finished_one_with_a_fresh_optimizer(config, tmp_path, capsys):
    last = pretrain(config)
    saved = checkpoint.load(last)
    again = Run(replace(config, output_dir=tmp_path / "again", init_from=last))
    again.begin()
    for name in ("student", "teacher"):
        state = getattr(again.learner, name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in saved[name].items()), name
    assert torch.equal(again.learner.method.center, saved["dino_loss"]["center"]) and again.step == 0
    fresh = learner(config).optimizer.state_dict()
    assert again.learner.optimizer.state_dict()["state"].keys() == fresh["state"].keys()
    again.train()
    assert f"starts from {last}: student and teacher with their heads; the method's state\n" in capsys.readouterr().out
    again.held.close()
    before, after = (read_metrics(folder) for folder in (config.output_dir, tmp_path / "again"))
    ends = [row for row in before if "knn10" in row][-1]
    (start,) = [row for row in after if row["step"] == 0]
    assert {k: v for k, v in start.items() if k in ("knn10", "retrieval")} == {
        k: v for k, v in ends.items() if k in ("knn10", "retrieval")
    }
    # Resumed, the run goes on from its own checkpoint.
    resumed = Run(replace(config, output_dir=tmp_path / "again", init_from=last, resume=True))
    resumed.begin()
    assert resumed.step == resumed.total_steps
    resumed.held.close()


def test_a_checkpoint_of_the_reference_gives_both_networks_and_the_center(config, tmp_path):
    state = full_checkpoint(TEACHER, published_vit(1))
    state["dino_loss"]["center"] = torch.arange(16.0)[None]
    torch.save(state, tmp_path / "checkpoint.pth")
    made = learner(config)
    init_from(made, tmp_path / "checkpoint.pth")
    for net, prefix in ((made.student, "module."), (made.teacher, "")):
        theirs = state["student" if net is made.student else "teacher"]
        assert all(torch.equal(value, theirs[prefix + key]) for key, value in net.state_dict().items())
    assert torch.equal(made.method.center, state["dino_loss"]["center"])


@pytest.mark.parametrize(
    "changes", [{"out_dim": 32}, {"method": "byol", "head_bottleneck_dim": 256}, {"norm_last_layer": False}]
)
def test_other_heads_stay_new_and_both_networks_get_the_evaluated_backbone(config, tmp_path, changes):
    torch.save(FULL, tmp_path / "checkpoint.pth")
    made, plain = learner(config, **changes), learner(config, **changes)
    said = init_from(made, tmp_path / "checkpoint.pth")
    if changes == {"norm_last_layer": False}:  # of the same shapes
        assert "with their heads" in said
        return
    assert said.endswith(": the backbone (teacher); the heads are new")
    for net, untouched in ((made.student, plain.student), (made.teacher, plain.teacher)):
        backbone = net.backbone.state_dict()
        assert all(torch.equal(backbone[key], value) for key, value in TEACHER.items())
        mine, theirs = head_of(net), head_of(untouched)
        assert mine and all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_head_trained_with_free_norms_gets_rows_of_norm_1_where_these_are_kept(config, tmp_path):
    state = full_checkpoint(TEACHER, published_vit(1))
    state["student"]["module.head.last_layer.weight_g"] = torch.full((16, 1), 3.0)
    torch.save(state, tmp_path / "checkpoint.pth")
    for kept, norm in ((True, 1.0), (False, 3.0)):
        made = learner(config, norm_last_layer=kept)
        init_from(made, tmp_path / "checkpoint.pth")
        assert made.student.head.last_layer.weight_g.unique().tolist() == [norm]


@pytest.mark.parametrize("patch_head", ["untied", "separate"])
def test_so_do_the_rows_of_the_head_of_patches(config, tmp_path, patch_head):
    settings = {"method": "ibot", "patch_head": patch_head}
    before = learner(config, **settings, norm_last_layer=False)
    with torch.no_grad():
        before.student.patch_last_layer.weight_g.fill_(3.0)
    torch.save({**before.state_dict(), "args": before.config.plain()}, tmp_path / "checkpoint.pth")
    for kept, norm in ((True, 1.0), (False, 3.0)):
        made = learner(config, **settings, norm_last_layer=kept)
        assert "with their heads" in init_from(made, tmp_path / "checkpoint.pth")
        assert made.student.patch_last_layer.weight_g.unique().tolist() == [norm]


def test_the_number_of_heads_that_a_file_tells_must_be_that_of_the_run(config, tmp_path):
    weights = vit("vit_small_12heads", patch_size=8, img_size=32).state_dict()
    small = replace(config, arch="vit_small")
    torch.save({"state_dict": {f"module.base_encoder.{k}": v for k, v in weights.items()}}, tmp_path / "mocov3.pth")
    with pytest.raises(ValueError, match="mocov3.pth holds a vit_small_12heads, and --arch is vit_small$"):
        init_from(learner(small), tmp_path / "mocov3.pth")
    init_from(learner(small, arch="vit_small_12heads"), tmp_path / "mocov3.pth")
    torch.save(weights, tmp_path / "untold.pth")
    save_file(weights, tmp_path / "untold.safetensors")
    for arch in ("vit_small", "vit_small_12heads"):
        for name in ("untold.pth", "untold.safetensors"):
            init_from(learner(small, arch=arch), tmp_path / name)


@pytest.mark.parametrize("freeze_patch_embed", [False, True])
def test_heads_are_trained_before_the_backbone(config, freeze_patch_embed):
    made = learner(config, freeze_backbone_steps=3, freeze_last_layer=0, freeze_patch_embed=freeze_patch_embed, lr=0.1)
    moved: dict[str, set[int]] = {"backbone": set(), "patch": set(), "head": set()}
    for step in range(5):
        before = {key: value.clone() for key, value in made.student.state_dict().items()}
        made.step(step, [torch.randn(4, 3, size, size) for size in (32, 32, 16)])
        for key, value in made.student.state_dict().items():
            part = "patch" if "patch_embed" in key else key.split(".")[0]
            if not torch.equal(value, before[key]):
                moved[part].add(step)
        if step < 3:
            mine, theirs = made.student.backbone.state_dict(), made.teacher.backbone.state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    assert moved["head"] >= {1, 2, 3, 4} and moved["backbone"] == {3, 4}
    assert moved["patch"] == (set() if freeze_patch_embed else {3, 4})


@pytest.mark.parametrize("form", ["timm", "huggingface", "safetensors"])
def test_exported_backbones_load_again(tmp_path, form):
    torch.save(TEACHER, tmp_path / "backbone.pth")
    export(load_trained(tmp_path / "backbone.pth"), tmp_path / "out", form)
    path = tmp_path / "out"
    if form == "safetensors":
        path = path.rename(tmp_path / "out.safetensors")
    assert_is(dino_train.load_backbone(path), TEACHER)


def test_names_of_a_classifier_of_hugging_face(tmp_path):
    from safetensors.torch import load_file

    torch.save(TEACHER, tmp_path / "backbone.pth")
    export(load_trained(tmp_path / "backbone.pth"), tmp_path / "out", "huggingface")
    weights = load_file(tmp_path / "out/model.safetensors")
    classifier = {f"vit.{key}": value for key, value in weights.items()} | {"classifier.weight": torch.zeros(3, 96)}
    save_file(classifier, tmp_path / "classifier.safetensors")
    save_file(weights | {"pooler.dense.weight": torch.zeros(96, 96)}, tmp_path / "pooler.safetensors")
    for name in ("classifier", "pooler"):
        assert_is(dino_train.load_backbone(tmp_path / f"{name}.safetensors"), TEACHER)
    del weights["encoder.layer.1.attention.attention.key.weight"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(
        ValueError, match=r"missing blocks\.1\.attn\.qkv\.weight; unexpected blocks\.1\.attn\.q_proj\.weight; "
    ):
        dino_train.load_backbone(tmp_path / "part.safetensors")


def test_layer_scale_is_folded(tmp_path):
    """With the names of DINOv2, and its token for masked patches."""
    g = torch.Generator().manual_seed(2)
    scales = [torch.randn(2, 96, generator=g) for _ in range(3)]
    gammas = {f"blocks.{i}.ls{j + 1}.gamma": scales[i][j] for i in range(3) for j in range(2)}
    torch.save({**TEACHER, **gammas, "mask_token": torch.zeros(1, 96)}, tmp_path / "dinov2.pth")
    image = torch.randn(3, SIZE, SIZE, generator=g)
    parameters = {name: value.double() for name, value in TEACHER.items()}
    exact, _ = vit_by_hand(parameters, image.double(), PATCH, heads=3, scales=[s.double() for s in scales])
    backbone = dino_train.load_backbone(tmp_path / "dinov2.pth")
    torch.testing.assert_close(backbone(image[None])[0].double(), exact[-1][0], rtol=0, atol=1e-5)


def test_parts_that_only_one_side_has_are_left_or_start_anew():
    tokens = {"register_tokens": torch.ones(1, 4, 96), "mask_token": torch.ones(1, 96)}
    dinov2 = TEACHER | tokens | {"blocks.1.ls1.gamma": torch.full((96,), 3.0)}
    plain = vit("vit_nano", patch_size=8, img_size=32)
    adapted, notes = adapt(dinov2, plain)
    assert notes == ["layer scale folded", "4 registers left"]
    plain.load_state_dict(adapted)
    assert torch.equal(adapted["blocks.1.attn.proj.bias"], 3 * TEACHER["blocks.1.attn.proj.bias"])

    same = vit("vit_nano", patch_size=8, img_size=32, registers=4, mask_token=True)
    adapted, notes = adapt(TEACHER | tokens, same)
    assert notes == [] and all(torch.equal(adapted[name], tokens[name]) for name in tokens)

    other = vit("vit_nano", patch_size=8, img_size=32, registers=2, mask_token=True)
    adapted, notes = adapt(TEACHER | {"register_tokens": tokens["register_tokens"]}, other)
    assert notes == ["4 registers left", "2 registers are new"]
    assert all(torch.equal(adapted[name], other.state_dict()[name]) for name in tokens)
    assert adapt(TEACHER, other)[1] == ["2 registers are new"]

    for block in plain.blocks:
        for name in ("ls1", "ls2"):
            setattr(block, name, torch.nn.ParameterDict({"gamma": torch.zeros(96)}))
    adapted, notes = adapt(TEACHER, plain)
    assert notes == ["layer scale starts at 1"] and torch.equal(adapted["blocks.2.ls2.gamma"], torch.ones(96))
    gammas = {name: torch.full((96,), 3.0) for name in adapted.keys() - TEACHER.keys()}
    adapted, notes = adapt(TEACHER | gammas, plain)
    assert notes == [] and torch.equal(adapted["blocks.2.ls2.gamma"], gammas["blocks.2.ls2.gamma"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "layer scale folded; 4 registers left"),
        ({"method": "ibot", "registers": 4}, "layer scale folded"),
        ({"method": "ibot", "registers": 2}, "layer scale folded; 4 registers left; 2 registers are new"),
    ],
)
def test_tokens_of_dinov2_go_to_the_run_that_has_them(config, tmp_path, changes, words):
    tokens = {"register_tokens": torch.ones(1, 4, 96), "mask_token": torch.ones(1, 96)}
    torch.save({**TEACHER, **tokens, "blocks.0.ls1.gamma": torch.ones(96)}, tmp_path / "dinov2.pth")
    made = learner(config, **changes)
    assert init_from(made, tmp_path / "dinov2.pth").endswith(f"the backbone (weights); the heads are new; {words}")
    for net in (made.student, made.teacher):
        own = net.backbone.state_dict()
        assert ("mask_token" in own) == ("method" in changes)
        for name in tokens.keys() & own.keys():
            assert torch.equal(own[name], tokens[name]) or (name, changes["registers"]) == ("register_tokens", 2)


@pytest.mark.parametrize("size", [16, 9])
def test_larger_patches_give_the_products_of_enlarged_images(size):
    g = torch.Generator().manual_seed(0)
    weight, image = torch.randn(5, 3, 8, 8, generator=g), torch.randn(2, 3, 8, 8, generator=g)
    enlarged = F.interpolate(image, size=(size, size), mode="bicubic")
    products = F.conv2d(enlarged, resample_patch(weight, size))
    torch.testing.assert_close(products, F.conv2d(image, weight), rtol=1e-4, atol=1e-4)


def test_smaller_patches_give_products_as_near_as_their_fewer_pixels_can():
    weight = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.eye(64).view(64, 1, 8, 8)
    reduced = F.interpolate(pixels, size=(6, 6), mode="bicubic", antialias=True)
    errors = (F.conv2d(reduced, resample_patch(weight, 6)) - F.conv2d(pixels, weight)).flatten(1)  # [64, 5]
    assert errors.abs().max() > 0.1
    # Of a least squares solution they are orthogonal to what the products are made of.
    torch.testing.assert_close(reduced.flatten(1).T @ errors, torch.zeros(36, 5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [64, 16])
def test_positions_are_interpolated(size):
    weights = vit("vit_nano", patch_size=4, img_size=32).state_dict()
    rows = torch.linspace(0, 1, 8)  # a ramp in one direction, at the centers of 8 patches
    weights["pos_embed"][0, 1:] = rows.repeat_interleave(8)[:, None]
    target = vit("vit_nano", patch_size=4, img_size=size)
    adapted, notes = adapt(weights, target)
    side = size // 4
    assert notes == [f"positions of 8 x 8 patches interpolated to {side} x {side}"]
    target.load_state_dict(adapted)
    assert torch.equal(target.pos_embed[:, 0], weights["pos_embed"][:, 0])
    grid = target.pos_embed[0, 1:].view(side, side, -1)
    expected = ((torch.arange(side) + 0.5) * 8 / side - 0.5) / 7
    inner = slice(side // 4, side - side // 4)
    torch.testing.assert_close(grid[inner, 0, 0], expected[inner], rtol=0, atol=0.01)  # of values from 0 to 1
    torch.testing.assert_close(grid[:, 0], grid[:, -1])


def test_dinov3_is_not_trained(config, tmp_path):
    with torch.device("meta"):
        shapes = PlainViT(PLAIN_SIZES["dinov3_vits16"], patch_size=16, registers=4).state_dict()
    torch.save({name: torch.zeros(1).expand(x.shape) for name, x in shapes.items()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth holds a dinov3_vits16, which is not trained here; of DINOv2 ViT-S, B"):
        init_from(learner(config), tmp_path / "x.pth")


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize("arch", ["vit_nano", "resnet50"])
def test_first_layers_of_other_channels_see_the_same_in_gray_images(arch, channels):
    backbone = resnet50() if arch == "resnet50" else vit("vit_nano", patch_size=8, img_size=32)
    name = "conv1.weight" if arch == "resnet50" else "patch_embed.proj.weight"
    weights = backbone.state_dict()
    weights[name] = torch.randn(weights[name].shape[0], channels, *weights[name].shape[2:])
    adapted, notes = adapt(weights, backbone)
    assert notes == [f"first layer of {channels} channels adapted to 3"]
    assert adapted[name].shape[1] == 3
    torch.testing.assert_close(adapted[name].sum(1), weights[name].sum(1), rtol=1e-4, atol=1e-5)
    backbone.load_state_dict(adapted)


def test_a_run_from_weights_of_other_sizes_says_what_it_adapts(config, tmp_path, capsys):
    torch.save(published_vit(patch=16, size=64), tmp_path / "backbone.pth")
    pretrain(replace(config, init_from=tmp_path / "backbone.pth", global_crops_size=48, epochs=1))
    words = "patches of 16 resampled to 8 pixels; positions of 4 x 4 patches interpolated to 6 x 6"
    assert f"the backbone (weights); the heads are new; {words}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "state, message",
    [
        (published_vit(depth=4), "of no known architecture"),
        (published_vit(dim=192, depth=12), "x.pth holds a vit_tiny, and --arch is vit_nano"),
        ({**TEACHER, "cls_token2": torch.zeros(1, 4, 96)}, "unexpected cls_token2"),
        (None, "no checkpoint at"),
    ],
)
def test_weights_that_do_not_fit_leave_no_run_behind(config, tmp_path, state, message):
    path = tmp_path / "x.pth"
    if state is not None:
        torch.save(state, path)
    with pytest.raises((ValueError, CheckpointError), match=message):
        pretrain(replace(config, init_from=path))
    assert not config.output_dir.exists()
