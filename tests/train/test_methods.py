"""What holds for every training method, and the details of BYOL, MoCo and SwAV that decide whether they learn."""

import json
import math
from pathlib import Path

import dino_train
import pytest
import tiny_run
import torch
import torch.nn.functional as F
from dino_train.cli import main
from dino_train.common import checkpoint
from dino_train.common.metrics import collapse_signs
from dino_train.config.presets import METHODS, PRESETS, READ_BY, recipe
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner
from dino_train.engine.watch import CollapseWatch
from dino_train.methods.flops import flops_per_image
from dino_train.methods.koleo import koleo
from dino_train.models.resnet import SplitBatchNorm, split_batch_norm
from tiny_run import make_images, torchrun

CPU = torch.device("cpu")
SMALL = {
    "arch": "vit_nano",
    "patch_size": 8,
    "out_dim": 32,
    "head_hidden_dim": 64,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "batch_size_per_gpu": 8,
    "epochs": 5,
    "warmup_epochs": 1,
    "lr": 0.02,
    "device": "cpu",
}
KINDS = {
    "dino": {"method": "dino", "local_crops_number": 2},
    "byol": {"method": "byol"},
    "mocov2": {"method": "moco", "queue_size": 20},
    "mocov3": {"method": "moco", "predictor": True, "queue_size": 0},
    "swav": {"method": "swav", "local_crops_number": 2, "head_bottleneck_dim": 16, "queue_size": 16},
    "dino with sinkhorn": {"method": "dino", "local_crops_number": 2, "centering": "sinkhorn"},
    "ibot": {"method": "ibot", "local_crops_number": 2, "head_bottleneck_dim": 16, "norm_last_layer": False},
    "dinov2": {
        **{"method": "ibot", "local_crops_number": 2, "head_bottleneck_dim": 16, "registers": 2},
        **{"centering": "sinkhorn", "koleo": 0.1, "patch_head": "separate", "patch_out_dim": 24},
    },
}


def make(kind, **changes):
    changes = {**KINDS[kind], **changes}
    return PretrainConfig(**{**recipe(changes["method"], "none"), **SMALL, **changes})


def crops(config, step, batch=8):
    g = torch.Generator().manual_seed(step)
    sizes = [32] * 2 + [16] * config.local_crops_number
    images = [torch.randn(batch, 3, size, size, generator=g) for size in sizes]
    if config.mask_kind is None:
        return images
    return [*images, torch.stack([torch.from_numpy(config.mask_kind.draw(step, 0, i, i)) for i in range(batch)])]


def started(config, seed=3):
    torch.manual_seed(seed)
    return Learner(config, 2, CPU)


def tensors(state):
    for key, value in sorted(state.items(), key=str):
        if isinstance(value, dict):
            yield from tensors(value)
        elif isinstance(value, torch.Tensor):
            yield key, value


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["none", *PRESETS])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_every_preset_is_valid_with_every_method(preset, method):
    if method == "ibot" and PRESETS.get(preset, {}).get("arch") == "resnet50":
        return  # it hides patches
    config = PretrainConfig(**recipe(method, preset))
    assert config.method == (method or PRESETS.get(preset, {}).get("method", "dino"))
    assert len(config.crop_kinds) == 2 + config.local_crops_number


def test_a_preset_of_another_method_leaves_what_means_something_else_in_each():
    swav = PretrainConfig(**recipe("swav", "mocov3-resnet50"))
    assert (swav.student_temp, swav.out_dim, swav.optimizer, swav.epochs) == (0.1, 65536, "lars", 100)
    dino = PretrainConfig(**recipe("dino", "mocov2-resnet50"))
    assert (dino.out_dim, dino.student_temp, dino.momentum_teacher, dino.momentum_teacher_end) == (65536, 0.1, 0.996, 1)
    for preset, decay in (("resnet50", 1e-4), ("byol-resnet50", 1e-6), ("vits16-vanilla", 0.05)):
        assert PretrainConfig(**recipe("moco", preset)).weight_decay == decay
    assert PretrainConfig(**recipe("byol", "demo")).out_dim == 128  # for any method


@pytest.mark.parametrize("setting", READ_BY)
def test_a_setting_that_a_method_does_not_read_is_an_error(setting):
    field = PretrainConfig.__dataclass_fields__[setting]
    other = not field.default if isinstance(field.default, bool) else field.default
    if isinstance(other, str):
        other = "sinkhorn"
    elif isinstance(other, tuple):
        other = other[:1] * 2
    elif not isinstance(other, bool):
        other = other + 1 if isinstance(other, int) else other / 2 + 0.1
    for method in set(METHODS) - set(READ_BY[setting]):
        with pytest.raises(ValueError, match=f"{setting} is for {' and '.join(READ_BY[setting])}, not for {method}"):
            PretrainConfig(**{**recipe(method, "none"), setting: other})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mocov2", {"local_crops_number": 2}, "local_crops_number must be 0 for moco, got 2"),
        ("mocov3", {"out_dim": 257}, "out_dim must be at most 256 for moco, got 257"),
        ("mocov2", {"queue_size": 0}, "queue_size must be 0 with a predictor .*, at least 1 without one .*, got 0"),
        ("mocov3", {"queue_size": 64}, "queue_size must be 0 with a predictor .*, got 64"),
        ("mocov2", {"bn_split": 3}, "bn_split must be a divisor of the 8 images of a micro-batch.*, got 3"),
        ("mocov2", {"bn_split": 8}, "bn_split must be a divisor of the 8 .* with at least 2 parts, got 8"),
        ("mocov2", {"bn_split": 1}, "bn_split must be a divisor of the 8 .* at least 2, .*, got 1"),
        ("mocov3", {"bn_split": 4}, r"bn_split must be 0 with a predictor \(MoCo v3\), got 4"),
        ("mocov3", {"accumulate": 8}, "batch_size_per_gpu / accumulate must be at least 2 for moco, got 1"),
        ("byol", {"batch_size_per_gpu": 1}, "batch_size_per_gpu / accumulate must be at least 2 for byol, got 1"),
        ("swav", {"norm_last_layer": False, "arch": "resnet50"}, "norm_last_layer must be true for swav with a conv"),
        ("byol", {"freeze_patch_embed": True, "arch": "resnet50"}, "freeze_patch_embed must be false for a convnet"),
    ],
)
def test_settings_that_do_not_fit_together(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **changes)


def test_the_command_line_takes_a_methods_defaults_and_a_preset_of_it(tmp_path, capsys):
    data = make_images(tmp_path / "images", n=20)
    words = ["pretrain", "--preset", "demo", "--method", "byol", "--data", str(data), "--epochs", "1"]
    words += [
        "--output-dir",
        str(tmp_path / "run"),
        "--batch-size-per-gpu",
        "4",
        "--device",
        "cpu",
        "--num-workers",
        "1",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out.count("byol: vit_nano") == 1
    settings = json.loads((tmp_path / "run/config.json").read_text())
    asked = {
        name: settings[name] for name in ("method", "preset", "local_crops_number", "head_hidden_dim", "patch_size")
    }
    assert asked == {
        "method": "byol",
        "preset": "demo",
        "local_crops_number": 0,
        "head_hidden_dim": 512,
        "patch_size": 4,
    }
    state, _ = checkpoint.load_newest(tmp_path / "run")
    assert state["evaluate"] == "student"
    for net, folder in (("auto", tmp_path / "run"), ("student", tmp_path / "run")):
        weights = dino_train.load_backbone(folder, net=net).state_dict()
        assert all(torch.equal(weights[name], state["student"][f"backbone.{name}"]) for name in weights)
    assert main([*words, "--resume", "--method", "dino"]) == 1
    assert "has method byol, not dino: pass the same settings" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dino", "swav"])
def test_the_width_of_the_normalized_features_is_a_setting(kind):
    method = started(make(kind, head_bottleneck_dim=24)).method
    for net in (method.student, method.teacher):
        assert net.head.last_layer.weight_v.shape == (32, 24)


# --- every method ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [kind if kind in ("mocov2", "dinov2") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_operations_of_a_step_are_counted(kind):
    """Not far from those of the blocks' products: 3 times forward for the student, once for the teacher."""
    config = make(kind)
    layers = started(config).student.backbone.blocks.named_parameters()
    weights = sum(p.numel() for _, p in layers)
    tokens = [17] * 2 + [5] * config.local_crops_number
    views, targets = {"mocov2": (1, 1), "swav": (len(tokens), 0)}.get(kind, (len(tokens), 2))
    expected = 2 * weights * (3 * sum(tokens[:views]) + sum(tokens[:targets]))
    assert flops_per_image(config) == pytest.approx(expected, rel=0.5)


def test_operations_are_counted_with_batch_norm_of_parts():
    assert flops_per_image(make("mocov2", batch_size_per_gpu=16, bn_split=2)) == flops_per_image(make("mocov2"))


def test_operations_are_counted_where_few_patches_are_hidden():
    """Of images by fours there would be none, and Sinkhorn-Knopp needs a row."""
    few, many = (flops_per_image(make("dinov2", mask_probability=p)) for p in (0.1, 0.5))
    assert 0 < few < many


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, kind, precision):
    config = make(kind, precision=precision, accumulate=2)
    whole = started(config)
    for step in range(6):
        whole.step(step, crops(config, step))
    first = started(config)
    for step in range(3):
        first.step(step, crops(config, step))
    checkpoint.save(first.state_dict(), tmp_path / "x.pt")
    random_state = torch.get_rng_state()
    second = started(config, seed=4)
    second.load_state_dict(checkpoint.load(tmp_path / "x.pt"))
    torch.set_rng_state(random_state)
    for step in range(3, 6):
        second.step(step, crops(config, step))
    for (name, got), (_, expected) in zip(tensors(second.state_dict()), tensors(whole.state_dict()), strict=True):
        assert torch.equal(got, expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_changes_nothing(kind):
    config = make(kind)
    learner = started(config)
    for step in range(2):
        learner.step(step, crops(config, step))
    networks = {"student", "teacher"}  # batch norm has seen the images

    def state():
        kept = {name: value for name, value in learner.state_dict().items() if name not in networks}
        return kept | {
            "weights": {str(i): flat.weights for i, flat in enumerate((learner.student_flat, learner.teacher_flat))}
        }

    before = [(name, value.clone()) for name, value in tensors(state())]
    result = learner.step(2, [crop * math.nan if crop.is_floating_point() else crop for crop in crops(config, 2)])
    assert not math.isfinite(result.loss)
    for (name, value), (_, now) in zip(before, tensors(state()), strict=True):
        assert torch.equal(value, now), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind]["method"] in ("byol", "moco")])
def test_a_constant_output_is_seen_as_a_collapse(kind):
    config = make(kind)
    learner = started(config)
    result = learner.step(0, crops(config, 0))
    assert result.health()["spread"] > 0.5
    assert collapse_signs({"loss": result.loss, **result.health()}, 0.0) == {"constant": False}
    result.kept = result.kept[:1, :1].expand_as(result.kept)
    assert collapse_signs({"loss": result.loss, **result.health()}, 0.0) == {"constant": True}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind]["method"] == "ibot"])
def test_a_collapse_of_class_tokens_or_of_patches_is_seen(kind, caplog):
    config = make(kind)
    learner, log_k = started(config), math.log(config.out_dim)
    result = learner.step(0, crops(config, 0))

    def signs():
        row = {"loss": result.loss, **result.health()}
        watch = CollapseWatch(config.out_dim, quiet_steps=0, patience=1)
        watch.update(1, row)
        seen = {sign for sign, here in collapse_signs(row, log_k).items() if here}
        assert seen == watch.warned.keys()
        return seen

    assert not signs()
    whole, method = result.kept, learner.method
    for i, (center, sign, words) in enumerate(
        ((method.center, "constant", "every image gets"), (method.patch_center, "constant patches", "every patch gets"))
    ):
        result.kept = whole.clone()
        result.kept[:, i] = whole[:1, i]
        assert signs() == {sign} and words in caplog.text
        logits = (method.teacher.patch_last_layer if i else method.teacher.head.last_layer)(result.kept[:1, i])
        center.copy_(logits)
        assert signs() == ({"uniform patches"} if i else set())
    method.losses[0] = log_k
    assert signs() == {"uniform", "uniform patches"}


def test_the_patches_that_are_watched_are_from_all_places_of_the_grid():
    """In images of an object on a plain background all upper left patches are alike, and that is no collapse."""
    config = make("ibot")
    learner, of_step = started(config), crops(config, 0)
    method = learner.method
    kept = method.forward(of_step, torch.tensor(0.04)).kept[:, 1]
    tokens, packing = method.teacher.backbone.tokens(of_step[:2])
    views = len(kept)
    patches = tokens.view(views, -1, tokens.shape[1])[:, 1:].flatten(0, 1)
    rows = method.teacher.bottlenecks(tokens[packing.cu_seqlens[:-1]], patches)[1]
    found = (kept.unsqueeze(1) == rows).all(2).int().argmax(1)
    assert torch.equal(rows[found], kept) and (found // 16).tolist() == list(range(views))
    assert (found % 16).tolist() == list(range(views))  # 16 patches, 16 views


def test_a_teacher_of_momentum_1_stays_bitwise():
    config = make("byol", momentum_teacher=1.0)
    learner = started(config)
    before = learner.teacher_flat.weights.clone()
    for step in range(3):
        learner.step(step, crops(config, step))
    assert torch.equal(learner.teacher_flat.weights, before)
    assert not torch.equal(learner.student_flat.weights, before)


def test_local_crops_of_byol_are_compared_with_both_targets():
    config = make("byol", local_crops_number=2, drop_path_rate=0.0)
    learner = started(config)
    method, images = learner.method, crops(config, 0)
    loss = method.forward(images, torch.tensor(0.0)).loss
    p = F.normalize(method.student.predict(method.student.project(images).unbind()), dim=-1)
    z = F.normalize(method.teacher.project(images[:2]), dim=-1)
    pairs = [(p[v] - z[u]).square().sum(1).mean() for u in range(2) for v in range(4) if u != v]
    assert loss.item() == pytest.approx(2 * sum(pairs).item() / len(pairs), rel=1e-6)


# --- MoCo --------------------------------------------------------------------------------------------


def test_the_queue_holds_the_last_keys_in_order():
    config = make("mocov2", queue_size=20, accumulate=2)
    learner = started(config)
    keys = [learner.step(step, crops(config, step)).kept[:, 1] for step in range(4)]
    queue = learner.method.queue
    assert queue.position == 4 * 8 % 20
    order = (queue.position + torch.arange(20)) % 20
    assert torch.equal(queue.rows[order], torch.cat(keys)[-20:])
    with pytest.raises(ValueError, match="queue_size must be 0 or at least the 8 images of a step, got 7"):
        started(make("mocov2", queue_size=7))


def spread_out(features):
    """KoLeo row by row, from its formula."""
    rows = [row / max(row.norm(), 1e-8) for row in features]
    logs = []
    for i, row in enumerate(rows):
        nearest = max((other for j, other in enumerate(rows) if j != i), key=lambda other: (row @ other).item())
        logs.append((((row - nearest + 1e-8) ** 2).sum().sqrt() + 1e-8).log())
    return -sum(logs) / len(rows)


@pytest.mark.parametrize("shape", [(2, 3), (9, 64), (33, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_koleo_is_its_formula(shape, dtype):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, exact = features.clone().requires_grad_(), features.double().requires_grad_()
    loss, truth = koleo(ours), spread_out(exact)
    (2 * loss).backward()
    (2 * truth).backward()
    assert loss.dtype == torch.float32 and ours.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_koleo_of_twins_is_finite_and_repeats_bitwise():
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    features[1], features[2], features[3] = features[0], -features[0], 0
    features[10:] = features[9] + 1e-3 * features[10:]  # many have the same neighbor
    grads = []
    for _ in range(2):
        leaf = features.clone().requires_grad_()
        loss = koleo(leaf)
        loss.backward()
        grads.append(leaf.grad)
    assert loss.isfinite() and grads[0].isfinite().all() and torch.equal(*grads)
    opposite = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])  # the nearest other row, not the row itself
    torch.testing.assert_close(koleo(opposite), -torch.tensor(2.0).log())


def test_koleo_of_a_single_row_is_zero():
    leaf = torch.randn(1, 5).requires_grad_()
    loss = koleo(leaf)
    loss.backward()
    assert loss == 0 and not leaf.grad.any()


@pytest.mark.parametrize("shape", [(12,), (12, 5, 4)])
def test_split_batch_norm_is_a_batch_norm_for_each_part(shape):
    torch.manual_seed(0)
    channels, splits = shape[0], 3
    plain = torch.nn.BatchNorm1d(channels) if len(shape) == 1 else torch.nn.BatchNorm2d(channels)
    net = torch.nn.Sequential(plain)
    split_batch_norm(net, splits)
    split = net[0]
    assert isinstance(split, SplitBatchNorm)
    x = torch.randn(24, *shape, requires_grad=True)
    with torch.no_grad():
        for norm in (plain, split):
            norm.weight.copy_(torch.linspace(0.5, 2, channels))
            norm.bias.copy_(torch.linspace(-1, 1, channels))
    out = split(x)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weights).sum(), x)
    means = []
    for part in range(splits):
        y = x.detach()[part::splits].clone().requires_grad_()
        plain.reset_running_stats()
        expected = plain(y)
        torch.testing.assert_close(out[part::splits], expected, rtol=1e-6, atol=1e-6)
        (expected_grad,) = torch.autograd.grad((expected * weights[part::splits]).sum(), y)
        torch.testing.assert_close(grad[part::splits], expected_grad, rtol=1e-5, atol=1e-6)
        means.append(plain.running_mean.clone())
    torch.testing.assert_close(split.running_mean, torch.stack(means).mean(0))
    assert split.num_batches_tracked == 1
    plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x), plain.eval()(x))


def test_keys_are_normalized_with_other_images_than_queries():
    config = make("mocov2", bn_split=2)
    learner = started(config)
    method, (one, _) = learner.method, crops(config, 0)
    assert method.splits == 4
    order = torch.arange(8).view(4, 2).t().flatten()
    assert [int(torch.nonzero(order == i)) % 4 for i in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]  # split of key i
    torch.testing.assert_close(method._keys(one)[order], method.teacher.project([one[order]])[0])
    assert not torch.allclose(method._keys(one), method.teacher.project([one])[0], atol=1e-3)


def test_moco_trains_a_resnet_with_split_batch_norms():
    config = make("mocov2", arch="resnet50", bn_split=2, optimizer="sgd", queue_size=16, out_dim=16)
    learner = started(config)
    losses = [learner.step(step, crops(config, 0)).loss for step in range(3)]
    assert all(map(math.isfinite, losses))
    assert sum(isinstance(module, SplitBatchNorm) for module in learner.student.modules()) == 53


# --- SwAV and Sinkhorn-Knopp -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_prototypes_have_norm_1_and_stay_bitwise_while_they_are_frozen(precision):
    config = make("swav", arch="resnet50", optimizer="sgd", use_bn_in_head=True, precision=precision, lr=0.5)
    learner = started(config)
    layer = learner.student.head.last_layer
    for step in range(4):  # of 2 epochs
        before = layer.weight.detach().clone()
        learner.step(step, crops(config, step))
        # On AVX512-BF16, oneDNN's gradient of a stride-2 convolution of so few pixels holds NaN now and then.
        refused = bool(learner.optimizer.nonfinite) and precision == "bfloat16"
        assert (layer.weight.norm(dim=1) - 1).abs().max() < 1e-6
        assert torch.equal(layer.weight, before) == (step < 2 or refused)
        assert step < 2 or refused or (layer.weight - before).norm() > 1e-3
        if precision == "bfloat16":
            assert torch.equal(layer.copies[0], layer.weight.to(torch.bfloat16))


def test_the_queue_of_swav_is_filled_from_its_epoch_and_used_once_it_is_full():
    method = started(make("swav", queue_size=20, queue_start_epoch=1)).method
    stages = [method.stage(step, 2) for step in range(6)]
    assert stages == [(False, False)] * 2 + [(True, False)] * 3 + [(True, True)]
    assert started(make("swav", queue_size=0)).method.stage(9, 2) == (False, False)


def test_the_center_of_sinkhorn_balances_the_outputs():
    config = make("dino with sinkhorn", sinkhorn_iterations=50, out_dim=8, warmup_teacher_temp=0.5, teacher_temp=0.5)
    learner = started(config)
    images = crops(config, 0)
    with torch.no_grad():
        logits = learner.teacher(images[:2])
    learner.step(0, images)
    q = ((logits - learner.method.center) / 0.5).softmax(dim=1)
    torch.testing.assert_close(q.sum(0), torch.full((8,), 2.0), rtol=1e-3, atol=0)


def test_what_rarely_works_is_said_at_the_start(caplog):
    started(make("byol", local_crops_number=2))
    assert "local crops made BYOL worse" in caplog.text
    caplog.clear()
    started(make("dino with sinkhorn", out_dim=200))
    started(make("swav", out_dim=500, accumulate=2))
    assert caplog.text.count("Sinkhorn-Knopp balances 16 rows a step over 200 outputs") == 1
    assert "balances 20 rows a step over 500 outputs" in caplog.text and "or --queue-size" in caplog.text
    caplog.clear()
    started(make("dino with sinkhorn", out_dim=160))
    assert not caplog.text


# --- several processes -------------------------------------------------------------------------------

_RANK = """
import json, sys, torch
sys.path[:0] = json.loads(sys.argv[1])
import test_methods
from dino_train.common import parallel
from dino_train.engine.learner import Learner
from dino_train.engine.watch import CollapseWatch
parallel.join(torch.device("cpu"))
parallel.gather = None  # it reads the number of rows on the host, which a step must not
torch.set_num_threads(1)
torch.manual_seed(parallel.rank())
config = test_methods.make("mocov2", batch_size_per_gpu=4, bn_split=2)
learner = Learner(config, 2, torch.device("cpu"))
own = slice(4 * parallel.rank(), 4 * parallel.rank() + 4)
keys = []
for step in range(4):
    result = learner.step(step, [crop[own] for crop in test_methods.crops(config, step)])
    keys.append(result.kept[:, 1])
kept = {"queue": learner.method.queue.rows, "keys": keys, "weights": learner.student_flat.weights}
torch.save(kept, f"{sys.argv[2]}/{parallel.rank()}.pt")
parallel.leave()
"""


def test_all_ranks_have_the_queue_of_all_keys(tmp_path):
    (tmp_path / "rank.py").write_text(_RANK)
    folders = json.dumps([str(Path(file).parent) for file in (__file__, tiny_run.__file__)])
    assert torchrun([str(tmp_path / "rank.py"), folders, str(tmp_path)]).wait(timeout=300) == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["queue"], second["queue"]) and torch.equal(first["weights"], second["weights"])
    keys = torch.cat([key for pair in zip(first["keys"], second["keys"], strict=True) for key in pair])
    position = 4 * 8 % 20
    assert torch.equal(first["queue"][(position + torch.arange(20)) % 20], keys[-20:])
