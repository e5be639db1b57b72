"""All GPU code of the trainer, run with a test double of the GPU that checks the order of operations."""

import ast
import math
import os
import re
import signal
import tarfile
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import coverage
import numpy as np
import pytest
import torch
from dino_train.common import checkpoint, parallel
from dino_train.common.metrics import read_metrics
from dino_train.config.pretrain import PretrainConfig
from dino_train.data import loader
from dino_train.data.folder import ImageFolder
from dino_train.engine import gradient_sum, graph, learner, train
from dino_train.engine.learner import Learner
from dino_train.engine.train import NonFiniteLoss, pretrain
from dino_train.evaluate.features import extract
from dino_train.evaluate.images import training_loader
from dino_train.evaluate.knn import view_retrieval
from dino_train.models.resnet import RESNETS, ResNet
from double import Double, Misuse
from tiny_run import assert_same, final_weights, make_images

from dino_kernels import nn

PACKAGE, NN = Path(train.__file__).resolve().parents[1], Path(nn.__file__).resolve().parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def measured():
    """Which lines of the trainer and of the modules run."""
    coverage_of = coverage.Coverage(data_file=None, include=[f"{PACKAGE}/*", f"{NN}/*"])
    coverage_of.start()
    yield coverage_of
    coverage_of.stop()


@pytest.fixture
def config(tmp_path):
    """3 epochs of 5 steps, 22 images; the last layer is frozen in the first; view retrieval and k-NN after each."""
    make_images(tmp_path / "data/train", n=22)
    make_images(tmp_path / "data/val", n=9)
    return PretrainConfig(
        data=str(tmp_path / "data"), output_dir=tmp_path / "run", arch="vit_nano", patch_size=8, out_dim=64,
        head_hidden_dim=16, global_crops_size=16, local_crops_size=8, local_crops_number=1, batch_size_per_gpu=4,
        epochs=3, warmup_epochs=1, log_interval=2, num_workers=16, knn_freq=1, drop_path_rate=0.3, precision="float32",
    )  # fmt: skip


def losses(config):
    return [row["loss"] for row in read_metrics(config.output_dir) if "loss" in row]


def evaluations(config):
    return [row for row in read_metrics(config.output_dir) if "knn10" in row]


def on_cpu(config):
    """The config of the same run on a CPU, after the run."""
    config = replace(config, output_dir=config.output_dir / "cpu", resume=False)
    pretrain(config)
    return config


def assert_close(config, other, tolerance=2e-5):
    ours, expected = final_weights(config), final_weights(other)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("attn.qkv.bias"):  # the gradient of a key bias is rounding error, which AdamW amplifies
            torch.testing.assert_close(torch.as_tensor(ours[name]), torch.as_tensor(value), rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_whole_run_equals_a_cpu_run(config, precision, caplog):
    """Two graphs, with frozen and trained last layer; evaluations in between; batches computed in a separate stream."""
    config = replace(config, precision=precision)
    with Double().installed() as gpu:
        pretrain(config)
    assert (gpu.captures, gpu.replays) == (2, 2 + 7)  # each after three eager steps
    assert "capture failed" not in caplog.text
    cpu = on_cpu(config)
    assert losses(config) == pytest.approx(losses(cpu), rel=1e-5 if precision == "float32" else 2e-2)
    if precision == "float32":
        assert_close(config, cpu)
    for ours, expected in zip(evaluations(config), evaluations(cpu), strict=True):
        assert ours["retrieval_images"] == expected["retrieval_images"] == 9 and ours["knn_images"] == 9
        assert ours["retrieval"] == pytest.approx(expected["retrieval"], abs=12)  # with 9 images, one is 11 %
    assert len(evaluations(config)) == 4


def test_a_run_on_16_bit_images_of_mixed_dtypes_equals_a_cpu_run(config):
    """A batch is packed in the widest dtype of its images."""
    config = replace(config, data=config.data + "16", channels=2, epochs=1, value_range=(0.0, 4095.0), knn_freq=0)
    rng = np.random.default_rng(0)
    for i in range(12):
        path = Path(config.data, f"{i}.npy")
        path.parent.mkdir(exist_ok=True)
        np.save(path, rng.integers(0, 4096, (20, 24, 2)).astype(np.float32 if i % 3 else np.uint16))
    with Double().installed():
        pretrain(config)
    assert losses(config) == pytest.approx(losses(on_cpu(config)), rel=1e-5)


def test_a_graph_changes_nothing_but_the_number_of_launches(config):
    plain = replace(config, output_dir=config.output_dir / "plain", cuda_graph=False)
    for each in (config, plain):
        with Double().installed() as gpu:
            pretrain(each)
    assert gpu.captures == 0
    assert_same(final_weights(config), final_weights(plain))


def test_bfloat16_is_the_default_of_a_gpu(config, capsys):
    with Double().installed():
        pretrain(replace(config, precision="auto", epochs=1))
        assert replace(config, precision="auto").dtype(CPU) == torch.bfloat16
        assert config.dtype(CPU) == torch.float32
    assert (
        "dino: vit_nano, 0.4 M parameters with head, 64 outputs, bfloat16 on a double of a GPU, 0 GiB"
        in capsys.readouterr().out
    )
    assert replace(config, precision="auto").dtype(CPU) == torch.float32


def test_steps_between_log_lines_do_not_synchronize(config, monkeypatch):
    """The host also does not wait for the upload of a batch before it launches the step."""
    waits, update = [], Learner.step
    with Double().installed() as gpu:

        def counted(self, step, crops):
            before = len(gpu.waits)
            result = update(self, step, crops)
            waits.append(len(gpu.waits) - before)
            return result

        monkeypatch.setattr(Learner, "step", counted)
        pretrain(config)
    assert sum(waits) == 2 and waits[3] == waits[8] == 1  # the starts of the captures


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_within_an_epoch_is_resumed_bitwise(config, monkeypatch, signum):
    whole = replace(config, output_dir=config.output_dir / "whole")
    update = Learner.step

    def interrupted(self, step, crops):
        if step == 7:
            os.kill(os.getpid(), signum)
        return update(self, step, crops)

    with Double().installed():
        pretrain(whole)
        monkeypatch.setattr(Learner, "step", interrupted)
        with pytest.raises(train.Interrupted, match="stopped at step 8 of 15"):
            pretrain(config)
        monkeypatch.setattr(Learner, "step", update)
    state = checkpoint.load(config.output_dir / "last.pt")
    assert state["step"] == 8 and len(state["rng"]["cuda"]) == 1
    with Double().installed():
        pretrain(replace(config, resume=True))
    assert_same(final_weights(config), final_weights(whole))


def test_a_run_of_shards_resumes_after_one_of_two_processes(config, caplog):
    folder = Path(config.data)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for path in sorted((folder / "train").rglob("*.png"))[11 * shard : 11 * shard + 11]:
                tar.add(path, path.name)
    config = replace(config, data=f"{folder}/{{0..1}}.tar", epochs=1)
    with Double().installed() as gpu:
        pretrain(config)
        path = config.output_dir / "last.pt"
        state = checkpoint.load(path)
        state["rng"] = {name: rows.repeat(2, 1) for name, rows in state["rng"].items()}
        checkpoint.save(state, path)
        pretrain(replace(config, epochs=2, resume=True))
    assert "the interrupted run had 2 processes and this one has 1" in caplog.text
    assert gpu.replays == 2 + 2 and all(map(math.isfinite, losses(config)))


@pytest.mark.parametrize("poisoned", [7, 13])  # an eager step, and a replay
def test_a_non_finite_loss_ends_the_run_and_updates_nothing(config, monkeypatch, poisoned):
    update = Learner.step

    def step(self, number, crops):
        return update(self, number, [crop * math.nan for crop in crops] if number == poisoned else crops)

    monkeypatch.setattr(Learner, "step", step)
    message = rf"loss is nan at step {poisoned} .*last.pt was written before this"
    with Double().installed(), pytest.raises(NonFiniteLoss, match=message):
        pretrain(config)
    state = checkpoint.load(config.output_dir / "last.pt")
    assert state["step"] == poisoned // 5 * 5
    assert all(value.isfinite().all() for value in state["student"].values())


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": "sgd"}, marks=pytest.mark.slow),
        {"optimizer": "larc", "decay_all": True},
        {"accumulate": 2, "layer_decay": 0.8, "patch_embed_lr": 0.2, "clip_per_module": True, "layer_scale": 0.5},
    ],
)
def test_other_optimizers_and_micro_batches(config, changes):
    config = replace(config, **changes)
    with Double().installed() as gpu:
        pretrain(config)
    assert (gpu.captures, gpu.replays) == (2, 2 + 7)
    assert_close(config, on_cpu(config))


OTHER_METHODS = {
    "byol": {"method": "byol", "local_crops_number": 0},
    "mocov2": {"method": "moco", "local_crops_number": 0, "predictor": False, "queue_size": 10, "bn_split": 2},
    "mocov3": {"method": "moco", "local_crops_number": 0},
    "swav": {"method": "swav", "head_bottleneck_dim": 16, "queue_size": 12, "queue_start_epoch": 1},
    "sinkhorn": {"centering": "sinkhorn"},
    "ibot": {"method": "ibot", "mask_ratio": (0.3, 0.6), "patch_head": "untied"},
    "dinov2": {
        **{"method": "ibot", "mask_ratio": (0.3, 0.6), "centering": "sinkhorn", "koleo": 0.1, "patch_head": "separate"},
        **{"registers": 2, "accumulate": 2},
    },
}


@pytest.mark.parametrize(
    "name", [n if n == "dinov2" else pytest.param(n, marks=pytest.mark.slow) for n in OTHER_METHODS]
)
def test_other_methods_equal_a_cpu_run(config, name, caplog):
    config = replace(config, **OTHER_METHODS[name], freeze_patch_embed=name == "mocov3")
    with Double().installed() as gpu:
        pretrain(config)
    assert gpu.captures > 0 and gpu.replays > 0 and "capture failed" not in caplog.text
    assert losses(config) == pytest.approx(losses(on_cpu(config)), rel=1e-3)


def test_a_resnet_runs_channels_last_with_tuned_convolutions_in_a_graph(config, monkeypatch):
    config = replace(config, arch="resnet50", optimizer="lars")
    crops, layouts, tuned, results, graphs = [torch.randn(8, 3, size, size) for size in (64, 64, 32)], [], [], [], []
    monkeypatch.setattr(Double, "tune_convolutions", lambda self: tuned.append(self))
    monkeypatch.setitem(RESNETS, "resnet50", lambda channels: ResNet((1, 1, 1, 1), 16))
    for gpu in (True, False):
        torch.manual_seed(0)
        with Double().installed() if gpu else nullcontext():
            learner = Learner(config, 5, CPU)
            learner.student.backbone.conv1.register_forward_pre_hook(
                lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
            results.append([learner.step(step, crops).loss for step in range(5)])
            graphs.append(isinstance(learner.update, graph.Graphed) and learner.update.replay is not None)
    assert len(tuned) == 2 and layouts == [True] * 18  # crops of two sizes
    assert graphs == [True, False]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


# --- graphs that fail ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [pytest.param("end", marks=pytest.mark.slow), "optimizer"])
def test_after_a_failed_capture_steps_run_eagerly_with_a_warning(config, monkeypatch, caplog, place):
    plain = replace(config, output_dir=config.output_dir / "plain", cuda_graph=False)
    with Double().installed():
        pretrain(plain)
    with Double().installed() as gpu:
        capture, optimize = Double.capture, learner.AdamWithEMA.step

        def fails(body, stream):
            def broken():
                body()
                raise RuntimeError("operation not permitted when stream is capturing")

            return capture(gpu, broken, stream)

        def optimize_or_fail(self, *settings):
            if gpu.captured:
                raise RuntimeError("operation not permitted when stream is capturing")
            optimize(self, *settings)

        if place == "end":
            gpu.capture = fails
        else:  # the gradient is complete, and is kept
            monkeypatch.setattr(learner.AdamWithEMA, "step", optimize_or_fail)
        pretrain(config)
    assert gpu.replays == 0 and caplog.text.count("steps run without a CUDA graph, because the capture failed") == 2
    assert "operation not permitted" in caplog.text
    assert_same(final_weights(config), final_weights(plain))


def test_a_graph_rejects_inputs_of_another_shape_or_dtype():
    with Double().installed() as gpu:
        graphed = graph.Graphed(gpu, lambda inputs: (inputs[0] * 2, inputs[1] + inputs[0]))
        results = [graphed([torch.full((3,), float(i)), torch.ones(3)]) for i in range(7)]
        assert gpu.captures == 1 and gpu.replays == 4 and len(gpu.streams) == 2  # all use the same side stream
        for i, (double, more) in enumerate(results):  # all results: a later replay must not overwrite earlier outputs
            assert torch.equal(double, torch.full((3,), 2.0 * i)) and torch.equal(more, torch.full((3,), i + 1.0))
        message = r"input 1 of a captured graph must have shape \[3\] and torch.float32, got \[1\] and torch.float32"
        with pytest.raises(ValueError, match=message):
            graphed([torch.ones(3), torch.ones(1)])
        with pytest.raises(ValueError, match="got .* torch.float64"):
            graphed([torch.ones(3), torch.ones(3, dtype=torch.float64)])


# --- batches ---------------------------------------------------------------------------------------------


def batches(config, **changes):
    options = {"batch_size": 4, "seed": 3, "start_step": 0, "total_steps": 12, "num_workers": 2, **changes}
    images = options.pop("images", None) or ImageFolder(Path(config.data) / "train")
    return loader.CropLoader(images, config.crop_kinds, **options)


def copies(crop_loader):
    return [([crop.clone() for crop in crops], bad) for crops, bad in crop_loader]


@pytest.mark.parametrize("num_workers", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_batch_equals_that_of_a_cpu(config, num_workers, dtype):
    expected = copies(batches(config, dtype=dtype))
    with Double().installed() as gpu:
        made = copies(batches(config, num_workers=num_workers, dtype=dtype))
        assert len(gpu.pins) <= 2 * 3  # memory of two batches, sometimes enlarged
    assert len(made) == len(expected) == 12
    for (crops, bad), (others, _) in zip(made, expected, strict=True):
        assert not bad and all(map(torch.equal, crops, others))


def test_crops_are_queued_a_batch_ahead(config):
    with Double().installed() as gpu:
        crop, queued = loader.multicrop_packed, []
        loader.multicrop_packed = lambda *arguments, **scale: (
            queued.append(gpu.current.number) or crop(*arguments, **scale)
        )
        with closing(iter(batches(config))) as steps:
            for step in range(5):
                next(steps)
                deadline = time.monotonic() + 10
                while len(queued) < step + 1 and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(0.2)  # the threads finish decoding, so the next call queues the batch
            assert len(queued) == 6 and set(queued) == {1}  # in another stream than the steps


def without(monkeypatch, what):
    """The test double ignores one of the loader's waits."""
    wait = Double.wait
    if what == "made":
        monkeypatch.setattr(Double, "wait", lambda self, event: None if not self.current.number else wait(self, event))
    elif what == "used":
        monkeypatch.setattr(Double, "wait", lambda self, event: wait(self, event) if not self.current.number else None)
    else:
        monkeypatch.setattr("double._Event.synchronize", lambda self: None)


@pytest.mark.parametrize(
    "what, message",
    [("made", "stream 1 wrote"), ("used", "stream 0 reads"), ("copied", "no event after its last copy was synch")],
)
def test_every_wait_of_the_loader_is_needed(config, monkeypatch, what, message):
    without(monkeypatch, what)
    with Double().installed(), pytest.raises(Misuse, match=message):
        copies(batches(config))


def test_a_loader_that_ends_early_waits_before_its_memory_is_freed(config):
    with Double().installed() as gpu:
        steps = iter(batches(config))
        next(steps)
        time.sleep(0.5)
        next(steps)
        steps.close()
        assert gpu.current.clock.get(1) == gpu.streams[1].clock[1]  # it waited for its last crops


class Ending(ImageFolder):
    """Images with too few steps."""

    def steps(self, *arguments):
        yield from islice(super().steps(*arguments), 2)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_too_few_images_for_the_steps_are_an_error(config, on_gpu, monkeypatch):
    images = Ending(Path(config.data) / "train")
    backbone = Learner(config, 5, CPU).teacher.backbone
    with Double().installed() if on_gpu else nullcontext():
        with pytest.raises(RuntimeError, match="expected 12 steps, got 2"):
            copies(batches(config, images=images))
        monkeypatch.setattr("dino_train.evaluate.knn.BATCH", 4)
        monkeypatch.setattr(ImageFolder, "subset", lambda self, chosen: self)
        with pytest.raises(RuntimeError, match="expected 6 steps, got 2"):
            view_retrieval(backbone, images, loader.BadImages(22, 0), config.crop_kinds[:2], seed=0)
        classes = training_loader(images, 16, 4, 2, seed=0, start_step=0, total_steps=5)
        with pytest.raises(RuntimeError, match="expected 5 batches, got 2"):
            list(classes)
        short = islice(loader.eval_loader(ImageFolder(Path(config.data) / "train"), 16, 4, 2), 3)
        with pytest.raises(RuntimeError, match="expected 22 images, got 12"):
            extract(backbone, backbone, short, 22, loader.BadImages(22, 0))


# --- ranks -----------------------------------------------------------------------------------------------


def test_ranks_join_by_the_type_of_their_device(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 1, 2)]))
    asked = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: asked.append(options))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert parallel.join(CPU) == CPU
    with Double().installed():
        assert parallel.join(CPU) == CPU
    second = torch.device("cuda", 1)
    assert parallel.join(torch.device("cuda")) == second
    kinds = [{key: options.get(key) for key in ("backend", "device_id", "rank", "world_size")} for options in asked]
    both = {"rank": 1, "world_size": 2}
    assert kinds == [{"backend": "gloo", "device_id": None, **both}] * 2 + [
        {"backend": "nccl", "device_id": second, **both}
    ]


def test_batch_norm_over_ranks_and_no_graph_there(config, monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "broadcast", lambda tensors: None)
    monkeypatch.setattr(gradient_sum.GradientSum, "__init__", lambda self, flat: None)
    with Double().installed():
        net = Learner(replace(config, use_bn_in_head=True), 5, CPU)
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in net.student.modules()) == 2
    assert not isinstance(net.update, graph.Graphed)
    with pytest.raises(ValueError, match="batch norm over several processes needs GPUs"):
        Learner(replace(config, use_bn_in_head=True), 5, CPU)


def test_ranks_on_gpus_communicate_only_when_losses_are_read(config, monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "largest", lambda values, device: [value + 1 for value in values])
    asked = []
    for gpu in (Double(), None):
        for step in range(1, 6):
            run = SimpleNamespace(
                last_saved=time.monotonic(),
                config=config,
                step=step,
                steps_per_epoch=5,
                gpu=gpu,
                stop_signal=14,
                device=CPU,
            )
            asked.append(train.Run._requests(run)[0])
    assert asked == [0, 15, 0, 15, 15] + [15] * 5  # log_interval is 2, and 5 ends an epoch


# --- GPU code is in one file, and all of it was run -----------------------------------------------------------


def sources():
    return [path for path in (*PACKAGE.rglob("*.py"), *NN.glob("*.py")) if path.name != "device.py"]


def test_gpu_calls_are_in_one_file():
    for path in sources():
        found = re.findall(r"torch\.cuda|is_cuda|device\.type *[!=]=|\.cuda\(", path.read_text())
        assert not found, (path, found)


def functions_for_gpus(path):
    """(first line of the body, last line) of functions that use a GPU."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            names |= {argument.arg for argument in node.args.args}
            if names & {"gpu", "_gpu", "gpu_of", "on_gpu"}:
                yield node.body[0].lineno, node.end_lineno


def test_every_line_of_functions_with_a_branch_for_a_gpu_ran(measured, request):
    """In the tests above."""
    ran = {item.name for item in request.session.items if item.fspath == request.node.fspath}
    if len(ran) < len([name for name in globals() if name.startswith("test_")]):
        pytest.skip("only a part of this file runs")
    measured.stop()
    missing, found = [], 0
    for path in sources():
        spans = list(functions_for_gpus(path))
        if spans:
            found += len(spans)
            _, _, _, lines, _ = measured.analysis2(str(path))
            missing += [f"{path.name}:{line}" for line in lines if any(a <= line <= b for a, b in spans)]
    assert found > 15 and not missing, " ".join(missing)
