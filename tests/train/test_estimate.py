"""What is said before the first step: memory, disk and time; and that nothing is silent for long."""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from dino_train.cli import main
from dino_train.common import checkpoint, machine
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine import estimate, watch
from dino_train.engine.train import Run, pretrain
from tiny_run import TINY, TINY_FIELDS, make_images


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    return PretrainConfig(
        data=str(make_images(tmp_path / "images")),
        output_dir=tmp_path / "run",
        **TINY_FIELDS,
        epochs=2,
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--preset demo --epochs 1",
        pytest.param("--arch vit_small --batch-size-per-gpu 8 --epochs 1", marks=pytest.mark.slow),
        pytest.param("--arch resnet50 --optimizer sgd --batch-size-per-gpu 8 --epochs 1", marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_a_run_is_near_the_estimate(tmp_path, flags):
    words = flags.split()
    count = int(words[words.index("--batch-size-per-gpu") + 1]) if "--batch-size-per-gpu" in words else 64
    data = make_images(tmp_path / "images", n=count * 21 // 20 + 2, classes=1)
    words += ["--data", str(data), "--output-dir", str(tmp_path / "run"), "--device", "cpu", "--knn-freq", "0"]
    subprocess.run([sys.executable, "-m", "dino_train", "pretrain", *words], check=True, capture_output=True)
    log = (tmp_path / "run/log.txt").read_text()
    number, unit = re.search(r"needs about ([\d.]+) (GiB|MiB) of memory", log).groups()
    (peak,) = re.findall(r"at most (\d+) MiB of memory", log)
    assert float(number) * (1024 if unit == "GiB" else 1) == pytest.approx(int(peak), rel=0.25), peak


def test_the_disk_of_checkpoints_is_counted(config):
    pretrain(config)
    needed = estimate.estimate(Run(replace(config, output_dir=config.output_dir / "other")).learner)
    written = (config.output_dir / checkpoint.LAST).stat().st_size
    assert needed.checkpoint == pytest.approx(written, rel=0.05) and needed.checkpoints == 3
    run = Run(replace(config, output_dir=config.output_dir / "other", epochs=100, saveckp_freq=10, keep_last=4))
    assert estimate.estimate(run.learner).checkpoints == 3 + 4


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(config, monkeypatch):
    monkeypatch.setattr(estimate, "memory", lambda gpu: (200 << 20, 100 << 20))
    message = (
        r"training needs about \d+ MiB of memory and there are 200 MiB: .*--batch-size-per-gpu, --accumulate, --pre"
    )
    with pytest.raises(ValueError, match=message):
        pretrain(config)
    assert not config.output_dir.exists()


def test_little_memory_and_disk_are_warned_of_in_the_log(config, monkeypatch, caplog):
    monkeypatch.setattr(estimate, "memory", lambda gpu: (1 << 40, 100 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    pretrain(config)
    first, second = [record.getMessage() for record in caplog.records]
    assert "100 MiB are available: if it runs out, lower it by --batch-size-per-gpu" in first
    assert "0 MiB free: set --keep-last or raise --saveckp-freq" in second
    assert f"warning: {first}\n" in (config.output_dir / "log.txt").read_text()
    caplog.clear()
    pretrain(replace(config, resume=True))  # what is there need not fit again
    assert len(caplog.records) == 2 and "checkpoints will take about 1 MiB" not in caplog.text


def test_processes_on_one_machine_share_its_memory(config, monkeypatch):
    learner = Run(config).learner
    monkeypatch.setattr(estimate, "memory", lambda gpu: (1 << 30, 1 << 30))
    estimate.require_memory(estimate.estimate(learner), learner)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="needs about 2.4 GiB of memory and there are 1.0 GiB"):
        estimate.require_memory(estimate.estimate(learner), learner)


def test_a_dry_run_says_what_is_needed_and_leaves_nothing(tmp_path, capsys):
    words = ["--data", str(make_images(tmp_path / "images", n=40)), "--output-dir", str(tmp_path / "run"), *TINY]
    assert main(["pretrain", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "38 images to train on, 2 held out" in said and "needs about 3" in said and "MiB of disk for 3" in said
    assert re.search(r"very roughly [\d.e-]+ s a step and 0:00:0\d in all", said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line, group, name",
    [("0::/a/b", "a", "memory.max"), ("4:memory:/a/b", "memory/a", "memory.limit_in_bytes")],
)
def test_limits_of_control_groups(tmp_path, line, group, name):
    assert machine.limits(tmp_path) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu:/elsewhere\n{line}\n")
    folder = tmp_path / "sys/fs/cgroup" / group
    (folder / "b").mkdir(parents=True)
    (folder / "b" / name).write_text("max\n")
    (folder / name).write_text("1000\n")
    (folder.parent / name).write_text("5000\n")
    assert machine.limits(tmp_path) == [1000, 5000]


def test_what_takes_long_is_named(monkeypatch, capsys):
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.05)
    progress = watch.Progress()
    with progress.doing("quick"):
        pass
    with progress.doing("the first step"):
        time.sleep(0.2)
    assert capsys.readouterr().out == "the first step ...\n"


def test_long_steps_are_shown_without_waiting_for_log_interval(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    progress = watch.Progress()
    progress.begin(0, 100, 1, 4, 10)
    for step, seconds in enumerate([30, 31, 20, 20, 25, 1, 1, 1, 1], 1):
        now[0] += seconds
        assert not progress.due(step)
        progress.between(step)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "4/100"]
    assert lines[0] == "step 1/100  30.0 s a step  ETA 0:49:30"


def test_data_must_be_stated(tmp_path, capsys):
    assert main(["pretrain", "--output-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--data" in error and "--preset demo" in error
    assert not os.listdir(tmp_path)
