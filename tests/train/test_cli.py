import builtins
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import dino_train
import pytest
import torch
from dino_train import __main__ as start
from dino_train import cli
from dino_train.cli import main
from dino_train.config.presets import PRESETS, recipe
from dino_train.config.pretrain import PretrainConfig
from dino_train.evaluate.attention import Attention
from dino_train.evaluate.copy_detection import CopyDetection
from dino_train.evaluate.finetune import Finetune
from dino_train.evaluate.knn import Knn
from dino_train.evaluate.linear import Linear
from dino_train.evaluate.retrieval import Retrieval
from dino_train.evaluate.segmentation import Segmentation
from safetensors import safe_open
from tiny_run import TINY, tiny_run

import dino_kernels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("cli"))


def parsed(monkeypatch, *words) -> PretrainConfig:
    seen = []
    monkeypatch.setattr(cli, "pretrain", seen.append)
    assert main(["pretrain", *words]) == 0
    return seen[0]


def test_flags_of_the_reference_have_the_same_meaning(monkeypatch):
    flags = """
        --arch vit_small --patch_size 16 --out_dim 4096 --norm_last_layer false --momentum_teacher 0.9995
        --use_bn_in_head on --warmup_teacher_temp 0.03 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30
        --weight_decay 0.05 --weight_decay_end 0.5 --clip_grad 0 --batch_size_per_gpu 32 --epochs 300
        --freeze_last_layer 3 --lr 0.00075 --warmup_epochs 5 --min_lr 1e-5 --optimizer lars --drop_path_rate 0.2
        --global_crops_scale 0.25 1 --local_crops_number 10 --local_crops_scale 0.05 0.25 --data_path /some/where
        --output_dir out --saveckp_freq 7 --seed 3 --num_workers 4
    """
    words = flags.split()
    config = parsed(monkeypatch, *words)
    values = config.plain()
    assert config.norm_last_layer is False and config.use_bn_in_head is True
    assert values["data"] == "/some/where" and config.global_crops_scale == (0.25, 1.0)
    for name, value in re.findall(r"--(\w+) ([\d.e-]+)\s", flags):
        if not name.endswith("_scale"):
            assert values[name] == float(value), name
    assert parsed(monkeypatch, "--resume").resume and not config.resume
    dashed = parsed(monkeypatch, *[word.replace("_", "-") if word.startswith("--") else word for word in words])
    assert dashed == config


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_flags_override_them(monkeypatch, preset):
    config = parsed(monkeypatch, "--preset", preset, "--epochs", "7")
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == (7 if name == "epochs" else value), name


def test_the_demo_of_a_resnet_has_the_optimizer_of_one(monkeypatch):
    config = parsed(monkeypatch, "--preset", "demo", "--arch", "resnet_nano", "--method", "byol")
    assert (config.optimizer, config.lr, config.out_dim) == ("sgd", 0.12, 128)
    config = parsed(monkeypatch, "--arch", "resnet_nano", "--preset", "demo", "--lr", "1")
    assert (config.optimizer, config.lr, config.weight_decay_end) == ("sgd", 1.0, 1e-4)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_settings_from_a_file_and_flags_beside_it(monkeypatch, tmp_path, suffix):
    values = {"preset": "demo", "epochs": 7, "global_crops_scale": [0.3, 0.9], "norm_last_layer": False, "lr": 1e-3}
    path = tmp_path / f"settings.{suffix}"
    text = json.dumps(values) if suffix == "json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items())
    path.write_text(text)
    config = parsed(monkeypatch, "--config", str(path), "--lr", "0.5")
    expected = {**recipe(None, "demo"), **values, "global_crops_scale": (0.3, 0.9), "lr": 0.5}
    for name, value in expected.items():
        assert getattr(config, name) == value, name
    # What a run writes can be read.
    path.write_text(json.dumps(config.plain()))
    assert parsed(monkeypatch, "--config", str(path), "--seed", "3") == replace(config, seed=3)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.json", None, "cannot read .*x.json: No such file"),
        ("x.json", "{", "x.json is not a file of settings"),
        ("x.yaml", "a: [", "x.yaml is not a file of settings"),
        ("x.json", "[1]", "x.json holds a list, expected settings by their names"),
        ("x.json", '{"no_such": 1}', "no-such"),
        ("x.json", '{"epochs": "many"}', "epochs"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, capsys, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    words = ["pretrain", "--config", str(path), "--output-dir", str(tmp_path / "run")]
    try:
        assert main(words) == 1
    except SystemExit as stop:  # of what the parser finds
        assert stop.code == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "run").exists()


def test_resume_alone_takes_the_settings_of_the_run(monkeypatch, tmp_path, caplog):
    stated = ["--preset", "demo", "--lr", "0.25", "--global-crops-scale", "0.3", "0.9", "--num-workers", "7"]
    folder = tmp_path / "run"
    config = parsed(monkeypatch, *stated, "--output-dir", str(folder))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.plain() | {"of_another_version": 1}))
    words = ["--output-dir", str(folder), "--resume"]
    assert parsed(monkeypatch, *words).arch == PretrainConfig().arch  # there is nothing to resume yet
    (folder / "last.pt").touch()
    own = {"resume": True, "num_workers": PretrainConfig().num_workers}
    assert parsed(monkeypatch, "--output-dir", str(folder), "--resume") == replace(config, **own)
    assert parsed(monkeypatch, f"--output-dir={folder}", "--resume") == replace(config, **own)
    again = parsed(monkeypatch, "--resume", "--output_dir", str(folder), "--preset", "demo", "--epochs", "40")
    assert again == replace(config, **own, epochs=40)  # the run's own preset does not undo its flags
    other = parsed(monkeypatch, "--resume", "--output-dir", str(folder), "--preset", "vits16-vanilla")
    assert other.arch == "vit_small" and other.global_crops_scale == config.global_crops_scale
    # The folder may be named in a file.
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"output_dir": str(folder), "epochs": 40}))
    assert parsed(monkeypatch, "--resume", "--config", str(settings)) == replace(again, config=settings)
    (folder / "config.json").write_text("")
    assert parsed(monkeypatch, *words, "--preset", "demo").lr == recipe(None, "demo")["lr"]
    assert "settings that are not given are the defaults" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 1 bytes\nMore"),
    ],
)
def test_out_of_memory_is_one_line_with_what_to_change(monkeypatch, capsys, error):
    def fail(config):
        raise error

    monkeypatch.setattr(cli, "pretrain", fail)
    assert main(["pretrain"]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "out of memory: take fewer images a step (--batch-size-per-gpu)" in text
    monkeypatch.setattr(cli.Export, "run", fail)
    assert main(["export", "--checkpoint", "x"]) == 1
    assert "out of memory: take a smaller --batch-size (" in capsys.readouterr().err
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        main(["pretrain"])


def test_defaults_equal_the_reference():
    config = PretrainConfig()
    assert (config.arch, config.patch_size, config.out_dim, config.lr) == ("vit_small", 16, 65536, 0.0005)
    assert (config.momentum_teacher, config.weight_decay_end, config.clip_grad) == (0.996, 0.4, 3.0)


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in PretrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert "in pixels" in text and "(default: 65536)" in text


@pytest.mark.parametrize("protocol", [Knn, Linear, Finetune, Retrieval, CopyDetection, Segmentation, Attention])
def test_help_documents_every_field_of_a_protocol(capsys, protocol):
    name = {"CopyDetection": "copy-detection"}.get(protocol.__name__, protocol.__name__.lower())
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in protocol.__dataclass_fields__:
        # A flag, its metavar or alias, and a description.
        assert re.search(rf"--{field.replace('_', '-')}\b[^(]*[a-z]{{3}}", text), field


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "/nowhere"], "error: .*/nowhere"),
        (["--batch-size-per-gpu", "999"], "fewer than one batch of 999"),
        (["--teacher-temp", "0"], "teacher_temp must be above 0"),
        (["--global-crops-size", "20"], "multiple of patch_size 8"),
        (["--output-dir", "DATA/class0/000.png"], "error: "),
        (["--no-such-flag"], "no-such-flag"),
        (["--norm-last-layer", "maybe"], "expected true or false.*got maybe"),
    ],
)
def test_errors_are_short_and_say_what_is_wrong(run, tmp_path, capsys, words, message):
    words = [word.replace("DATA", str(run / "images")) for word in words]
    base = ["pretrain", "--data", str(run / "images"), "--output-dir", str(tmp_path / "out"), *TINY]
    try:
        code = main([*base, *words])
    except SystemExit as stop:  # from tyro
        code = stop.code
    error = " ".join(capsys.readouterr().err.split())
    assert code in (1, 2) and re.search(message, error) and "Traceback" not in error, error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Expected one of {pretrain, pack, stats, embed, evaluate, compare, export}"),
        (["pretrain", "--resume", "--output-dir", "none"], "none holds no run to resume, and there are no images"),
    ],
)
def test_commands_without_what_they_need(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(words) == 1
    except SystemExit as stop:  # from tyro
        assert stop.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room, or write to another"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a b"),
            "a b: Permission denied: give this user the",
        ),
        (OSError("of no kind"), "of no kind\n"),
    ],
)
def test_where_nothing_can_be_written_it_is_said_what_helps(monkeypatch, capsys, error, message):
    monkeypatch.setattr(cli, "_run", Mock(side_effect=error))
    assert main(["stats"]) == 1
    assert capsys.readouterr().err.startswith(f"dino-train: error: {message}")


def test_version_is_that_of_both_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dino-train {dino_train.__version__}\n"
    assert dino_train.__version__ == dino_kernels.__version__ == version("dino-kernels")


def test_names_that_are_not_utf8_are_printed_escaped(run, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    shutil.copytree(run / "images", f"{odd}/images")
    Path(odd, os.fsdecode(b"images/class0/\xfe.png")).write_bytes(b"")
    words = ["pack", "--data", f"{odd}/images", "--out", f"{odd}/packed.tar", "--size", "16"]
    command = [sys.executable, "-m", "dino_train", *words]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as of a terminal in en_US.UTF-8
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"40 of 41 images in {tmp_path}/\\udcff/packed.tar" in done.stdout
    assert "skipped unreadable image class0/\\udcfe.png: empty file" in done.stderr


def test_export_is_the_teachers_backbone(run, tmp_path):
    path = tmp_path / "out/backbone.safetensors"
    assert main(["export", "--checkpoint", str(run / "run"), "--output", str(path)]) == 0
    state = torch.load(run / "run/last.pt", weights_only=True)["teacher"]
    with safe_open(path, "pt") as file:
        assert file.metadata()["arch"] == "vit_nano" and file.metadata()["patch_size"] == "8"
        names = {name for name in state if name.startswith("backbone.")}
        assert {f"backbone.{name}" for name in file.keys()} == names  # noqa: SIM118
        for name in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(name), state[f"backbone.{name}"])


def test_ctrl_c_while_importing_is_one_line(monkeypatch, capsys):
    real = builtins.__import__

    def interrupted(name, *arguments):
        if name == "dino_train.cli":
            raise KeyboardInterrupt
        return real(name, *arguments)

    monkeypatch.setattr(start, "tune", lambda: None)
    monkeypatch.setattr(builtins, "__import__", interrupted)
    assert start.main() == 130
    assert capsys.readouterr().err == "dino-train: interrupted\n"


def test_data_is_stored_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parsed(monkeypatch, "--data", "my/images").plain()["data"] == f"{tmp_path}/my/images"
    assert parsed(monkeypatch, "--data", "https://host/{0..3}.tar").plain()["data"] == "https://host/{0..3}.tar"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_in_a_real_process_exits_cleanly(run, tmp_path, workers):
    words = ["pretrain", "--data", str(run / "images"), "--output-dir", str(tmp_path / "run"), *TINY]
    words += ["--epochs", "10000", "--num-workers", workers, "--knn-freq", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dino_train", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and "loss" in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal: the workers get it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert "--resume continues" in errors
    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["step"]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert step > 0 and rows[-1]["step"] <= step
