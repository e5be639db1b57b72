import json
import os

import pytest
import torch
from dino_train.cli import main
from dino_train.common import checkpoint
from dino_train.common.files import locked
from dino_train.evaluate import finetune
from dino_train.evaluate.finetune import Classifier, parameter_groups, rate_factor
from dino_train.models.resnet import resnet50
from dino_train.models.vit import vit
from dino_train.models.weights import load_trained
from tiny_run import colored_classes, error_of, evaluate, tiny_checkpoint


@pytest.fixture
def words(tmp_path):
    data = colored_classes(tmp_path / "data", train=8)
    run = tiny_checkpoint(tmp_path / "run")
    return ["finetune", "--checkpoint", run, "--data", data, "--batch-size", 8, "--output-dir", tmp_path / "out"]


def test_it_learns_and_writes_a_checkpoint_that_commands_can_load(words, tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / f"data/{part}/red/unreadable.png").write_bytes(b"")
    found = evaluate(capsys, *words, "--epochs", 12, "--lr", 0.02)
    assert (found["train"], found["val"]) == (24, 15)  # number of images used
    assert found["top1"] > 90 and found["checkpoint"] == str(tmp_path / "out/last.pt")
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3 * (i + 1) for i in range(12)]
    assert rows[-1]["top1"] == found["top1"] and rows[-1]["loss"] < rows[0]["loss"]
    before, after = load_trained(tmp_path / "run").backbone, load_trained(tmp_path / "out").backbone
    assert not before.blocks[0].attn.qkv.weight.equal(after.blocks[0].attn.qkv.weight)
    knn = evaluate(capsys, "knn", "--checkpoint", tmp_path / "out", "--nb-knn", 5)  # uses the same images
    assert knn["knn5"]["top1"] > 90


def test_a_stopped_run_is_resumed_bitwise(words, tmp_path, capsys, caplog, monkeypatch):
    words = [*words, "--epochs", 4]
    whole = evaluate(capsys, *words, "--resume")  # no checkpoint yet: starts from the beginning
    expected = torch.load(tmp_path / "out/last.pt", weights_only=True)
    words[words.index(tmp_path / "out")] = tmp_path / "stopped"
    step = finetune._Tuning._step

    def stopping(self, pixels, labels, factor):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return step(self, pixels, labels, factor)

    monkeypatch.setattr(finetune._Tuning, "_step", stopping)
    assert main(["evaluate", *map(str, words), "--num-workers", "1"]) == 130
    monkeypatch.setattr(finetune._Tuning, "_step", step)
    assert "stopped in epoch 3; --resume continues with it" in caplog.text
    assert "stopped holds a run already: add --resume" in error_of(capsys, *words)
    resumed = evaluate(capsys, *words, "--resume")
    assert resumed["top1"] == whole["top1"]
    found = torch.load(tmp_path / "stopped/last.pt", weights_only=True)
    assert found["epoch"] == 4
    for name, tensor in expected["teacher"].items():
        assert tensor.equal(found["teacher"][name]), name
    rows = [json.loads(line) for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert evaluate(capsys, *words, "--resume")["top1"] == whole["top1"]  # already complete
    assert "has epochs 4, not 5" in error_of(capsys, *words[:-1], 5, "--resume")
    tiny_checkpoint(tmp_path / "run", seed=1)
    assert "has checkpoint" in error_of(capsys, *words, "--resume")


def test_a_pretraining_run_is_not_overwritten(words, tmp_path, capsys):
    words[words.index(tmp_path / "out")] = tmp_path / "run"
    before = (tmp_path / "run/last.pt").read_bytes()
    assert "run holds a run already: add --resume" in error_of(capsys, *words)
    assert "is not from fine-tuning and cannot be resumed" in error_of(capsys, *words, "--resume")
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_a_full_disk_ends_only_the_last_epoch_and_data_is_absolute(words, tmp_path, capsys, monkeypatch, caplog):
    save = checkpoint.save

    def full(state, *arguments, **options):
        if state["epoch"] in failing:
            raise checkpoint.CheckpointError("cannot write last.pt: No space left on device")
        save(state, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.chdir(tmp_path)
    words[words.index(tmp_path / "data")] = "data"
    failing = {1}
    evaluate(capsys, *words, "--epochs", 2)
    assert "No space left on device; training continues" in caplog.text
    state = checkpoint.load(tmp_path / "out/last.pt")
    assert state["epoch"] == 2 and state["args"]["data"] == str(tmp_path / "data")
    words[words.index(tmp_path / "out")] = tmp_path / "other"
    failing = {2}
    assert "No space left on device" in error_of(capsys, *words, "--epochs", 2)


def test_a_folder_is_used_by_one_process_at_a_time(words, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out/lock", tmp_path):
        assert f"out is in use by process {os.getpid()} on " in error_of(capsys, *words)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("make, layers", [(lambda: vit("vit_nano", patch_size=8, img_size=16), 3), (resnet50, 4)])
def test_learning_rates_decrease_towards_the_input(make, layers):
    backbone = make()
    model = Classifier(backbone, backbone.embed_dim, 5)
    groups = parameter_groups(model, 0.5, 0.05)
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    assert len(by_parameter) == sum(1 for _ in model.parameters())
    for name, parameter in model.named_parameters():
        group = by_parameter[id(parameter)]
        if name.startswith(("backbone.blocks.1.", "backbone.layer2.")):
            assert group["scale"] == 0.5 ** (layers - 1), name
        elif name.startswith(("head.", "backbone.norm.")):
            assert group["scale"] == 1, name
        elif name.startswith(("backbone.cls", "backbone.pos", "backbone.patch", "backbone.conv1", "backbone.bn1")):
            assert group["scale"] == 0.5 ** (layers + 1), name
        decayed = parameter.dim() > 1 and "cls_token" not in name and "pos_embed" not in name
        assert group["weight_decay"] == (0.05 if decayed else 0), name


def test_warmup_and_decay_of_the_learning_rate():
    factors = [rate_factor(step, 200) for step in range(200)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False)) and 0.001 < factors[-1] < 0.0013
    assert factors[105] == pytest.approx(0.5005)


def test_bad_options_are_reported(words, capsys):
    assert "layer_decay in (0, 1]" in error_of(capsys, *words, "--layer-decay", 0)
    assert "weight_decay of at least 0" in error_of(capsys, *words, "--weight-decay", -1)
    assert "label_smoothing in [0, 1]" in error_of(capsys, *words, "--label-smoothing", 1.1)
    assert "fewer than one batch of 999" in error_of(capsys, *words, "--batch-size", 999)
    assert "try a lower --lr" in error_of(capsys, *words, "--lr", 1e30, "--epochs", 2)
