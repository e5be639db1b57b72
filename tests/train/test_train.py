"""The training run: resuming, signals, bad input, output files."""

import ctypes
import errno
import fcntl
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import dino_train
import numpy as np
import pytest
import torch
from dino_train.common import checkpoint
from dino_train.common.files import locked
from dino_train.common.metrics import Metrics, read_metrics
from dino_train.common.process import _ADDRESSES
from dino_train.config.pretrain import PretrainConfig
from dino_train.data.folder import DataError, split
from dino_train.engine import train
from dino_train.engine.learner import Learner
from dino_train.engine.log import RunLog
from dino_train.engine.train import NonFiniteLoss, pretrain
from dino_train.engine.watch import CollapseWatch
from tiny_run import TINY_FIELDS, assert_same, final_weights, make_images

import dino_kernels

STEPS_PER_EPOCH = 5
MEMORY_OF_STEPS = """
from dino_train.common.process import tune, use_huge_pages
tune()
import torch
held = torch.ones(8 << 20)
before = int(open("/proc/self/statm").read().split()[1])
use_huge_pages()
print(int(open("/proc/self/statm").read().split()[1]) - before)
x = torch.ones(4 << 20)
for line in open("/proc/self/smaps"):
    words = line.split()
    if not words[0].endswith(":"):
        begin, end = (int(bound, 16) for bound in words[0].split("-"))
    elif words[0] == "VmFlags:" and begin <= x.data_ptr() < end:
        print(*words)
"""


@pytest.fixture
def config(tmp_path) -> PretrainConfig:
    return PretrainConfig(
        data=make_images(tmp_path / "images"),
        output_dir=tmp_path / "run",
        **TINY_FIELDS,
        epochs=3,
        warmup_epochs=1,
        log_interval=2,
    )


# A run in a separate process that kills itself before update number `step`, or while it writes a checkpoint.
_KILLED = """
import json, os, pathlib, signal, sys
from dino_train.common import checkpoint
from dino_train.engine import train
from dino_train.config.pretrain import PretrainConfig
values, step, amid_save = json.load(sys.stdin)
for name in ("data", "output_dir"):
    values[name] = pathlib.Path(values[name])
update, rename = train.Learner.step, os.replace
def dying_step(self, i, crops):
    if i == step and not amid_save:
        os.kill(os.getpid(), signal.SIGKILL)
    self.current = train.Learner.current = i
    return update(self, i, crops)
def dying_rename(source, target):
    if amid_save and str(target).endswith("last.pt") and train.Learner.current >= step:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
train.Learner.step, os.replace = dying_step, dying_rename
train.pretrain(PretrainConfig(**values))
"""


@pytest.mark.parametrize(
    "step, amid_save, save_minutes",
    [(2, False, 15.0), (9, False, 15.0), (13, False, 0.0), (9, True, 15.0)],
    ids=["before-any-checkpoint", "late-in-epoch", "mid-epoch-checkpoint", "while-saving"],
)
def test_a_killed_and_resumed_run_is_bitwise_identical(config, step, amid_save, save_minutes, monkeypatch):
    config = replace(config, save_minutes=save_minutes)
    whole = replace(config, output_dir=config.output_dir / "whole", num_workers=2)
    pretrain(whole)
    values = {**config.plain(), "save_minutes": save_minutes}
    done = subprocess.run([sys.executable, "-c", _KILLED], input=json.dumps([values, step, amid_save]), text=True)
    assert done.returncode == -signal.SIGKILL
    seen = []
    update = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, i, crops: seen.append(i) or update(self, i, crops))
    pretrain(replace(config, resume=True))
    first = {(2, 15.0): 0, (9, 15.0): 5, (13, 0.0): 13}[step, save_minutes]
    assert seen == list(range(first, 15))
    assert_same(final_weights(config), final_weights(whole))
    steps = [[row["step"] for row in read_metrics(c.output_dir)] for c in (config, whole)]
    assert steps[0] == steps[1]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.skipif(any(resource.getrlimit(kind)[0] >= 0 for kind in _ADDRESSES), reason="addresses are limited here")
def test_tensors_of_steps_use_huge_pages_that_are_allocated_on_demand():
    taken, flags = subprocess.check_output([sys.executable, "-c", MEMORY_OF_STEPS], text=True).splitlines()
    assert int(taken) < 100 and "hg" in flags.split()


def test_with_limited_addresses_the_heap_is_not_changed():
    code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)){MEMORY_OF_STEPS}"
    assert "hg" not in subprocess.check_output([sys.executable, "-c", code], text=True).split()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_write_a_checkpoint_and_stop(config, signum, monkeypatch, request):
    whole = replace(config, output_dir=config.output_dir / "whole")
    pretrain(whole)
    update = Learner.step

    def interrupted(self, step, crops):
        if step == 7:
            os.kill(os.getpid(), signum)
        return update(self, step, crops)

    monkeypatch.setattr(Learner, "step", interrupted)
    handler = signal.SIG_DFL if signal.getsignal(signum) == signal.SIG_IGN else signal.getsignal(signum)
    before = signal.signal(signum, handler)  # nohup, which may run the tests, ignores SIGHUP
    request.addfinalizer(lambda: signal.signal(signum, before))
    with pytest.raises(train.Interrupted, match="stopped at step 8 of 15; --resume continues: ") as stop:
        pretrain(config)
    assert str(stop.value).endswith(f"dino-train pretrain --output-dir {config.output_dir} --resume")
    assert stop.value.signum == signum and signal.getsignal(signum) is handler
    assert checkpoint.load(config.output_dir / "last.pt")["step"] == 8
    monkeypatch.setattr(Learner, "step", update)
    pretrain(replace(config, resume=True))
    assert_same(final_weights(config), final_weights(whole))


@pytest.mark.parametrize("evaluation, step", [(0, 0), (1, 5)])
def test_a_signal_during_an_evaluation_stops_at_once_with_a_checkpoint(config, evaluation, step, monkeypatch):
    monkeypatch.setattr(train, "plot_curves", lambda folder: folder)
    config = replace(config, data=make_images(config.data, n=60), batch_size_per_gpu=11, knn_freq=0, epochs=1)
    whole, retrieval, calls = replace(config, output_dir=config.output_dir / "whole"), train.view_retrieval, []
    pretrain(whole)

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == evaluation + 1:
            os.kill(os.getpid(), signal.SIGINT)
            calls.append("went on")
        return retrieval(*arguments, **options)

    monkeypatch.setattr(train, "view_retrieval", interrupted)
    with pytest.raises(train.Interrupted, match=f"stopped at step {step} of 5; --resume continues"):
        pretrain(config)
    assert len(calls) == evaluation + 1 and checkpoint.load(config.output_dir / "last.pt")["step"] == step
    pretrain(replace(config, resume=True))
    assert_same(final_weights(config), final_weights(whole))
    steps = [[row["step"] for row in read_metrics(c.output_dir)] for c in (config, whole)]
    assert steps[0] == steps[1] and "went on" not in calls


def test_checkpoint_has_the_reference_keys_and_metrics_are_written(config):
    pretrain(replace(config, saveckp_freq=2, knn_freq=1))
    state = torch.load(config.output_dir / "last.pt", weights_only=True)
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"} <= state.keys()
    assert state["epoch"] == 3 and state["dino_loss"]["center"].shape == (1, 64)
    assert all(name.startswith(("backbone.", "head.")) for name in state["teacher"])
    assert sorted(p.name for p in config.output_dir.glob("*.pt")) == ["checkpoint0002.pt", "last.pt", "previous.pt"]
    rows = read_metrics(config.output_dir)
    log = [row for row in rows if "loss" in row]
    assert [row["step"] for row in log] == [2, 4, 6, 8, 10, 12, 14, 15]
    for row in log:
        assert 0 < row["teacher_single_entropy"] <= row["teacher_entropy"] + 1e-4 <= np.log(64) + 1e-3
        assert row["teacher_kl_to_uniform"] == pytest.approx(np.log(64) - row["teacher_entropy"])
    evaluated = [row for row in rows if "knn10" in row]
    assert [row["step"] for row in evaluated] == [0, 5, 10, 15]
    assert (config.output_dir / "curves.png").stat().st_size > 10_000


def test_only_the_newest_numbered_checkpoints_are_kept(config):
    config.output_dir.mkdir()
    own = config.output_dir / "checkpoint_best.pt"
    own.touch()
    pretrain(replace(config, epochs=4, saveckp_freq=1, keep_last=2))
    names = {"checkpoint0003.pt", "checkpoint0004.pt", "last.pt", "previous.pt", own.name}
    assert {path.name for path in config.output_dir.glob("*.pt")} == names
    (config.output_dir / "checkpoint10000.pt").touch()
    assert checkpoint.numbered(config.output_dir)[-1].name == "checkpoint10000.pt"


def test_weights_depend_on_the_seed_and_bfloat16_trains(config, monkeypatch):
    losses = {}
    monkeypatch.setattr(train, "plot_curves", lambda folder: folder)
    for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"precision": "bfloat16"}}.items():
        c = replace(config, output_dir=config.output_dir / name, **changes)
        pretrain(c)
        losses[name] = [row["loss"] for row in read_metrics(c.output_dir) if "loss" in row]
    assert losses["a"] != losses["b"]
    assert losses["a"] == pytest.approx(losses["c"], rel=2e-2) and losses["a"] != losses["c"]


def test_damaged_checkpoint_falls_back_to_the_previous(config, caplog):
    pretrain(config)
    last, previous = config.output_dir / "last.pt", config.output_dir / "previous.pt"
    intact = last.read_bytes()
    middle = len(intact) // 2
    for damaged in (intact[:middle], intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :], b""):
        last.write_bytes(damaged)
        caplog.clear()
        state, path = checkpoint.load_newest(config.output_dir)
        assert state["step"] == 10 and path == previous
        assert "damaged" in caplog.text and "previous.pt instead" in caplog.text
    pretrain(replace(config, resume=True))
    assert checkpoint.load(last)["step"] == 15 and checkpoint.load(previous)["step"] == 10
    last.write_bytes(b"")
    previous.write_bytes(b"junk")
    with pytest.raises(checkpoint.CheckpointError, match="last.pt is damaged.*previous.pt is damaged"):
        pretrain(replace(config, resume=True))
    assert previous.read_bytes() == b"junk"


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # writes beyond 1 MiB fail, as on a full disk
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"last.pt: (File too large|is the disk full\?)"):
            checkpoint.save({"step": 2, "x": torch.zeros(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert checkpoint.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(checkpoint.CheckpointError, match=f"cannot write {path}: .*No space left on device"):
        checkpoint.save({"step": 2, "x": torch.zeros(1 << 20)}, path)
    assert checkpoint.load(path) == {"step": 1}


def test_metrics_that_cannot_be_written_are_left_out(tmp_path, caplog):
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, loss=1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, before[1]))
    try:
        for step in (2, 3):
            metrics.write(step, loss=1.0)  # the first line is cut, the second does not begin
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics.write(4, loss=1.0)
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]
    assert "metrics of step 2 cannot be written" in caplog.text and "training continues" in caplog.text


def test_each_row_of_metrics_is_handed_to_a_callback_whose_errors_end_the_run(config):
    rows = []
    dino_train.pretrain(config, on_metrics=rows.append)
    assert rows == read_metrics(config.output_dir) and {"loss", "step"} <= rows[1].keys()

    def stop(row):
        if row["step"] > 5:
            raise KeyError("enough")

    other = replace(config, output_dir=config.output_dir / "other")
    with pytest.raises(KeyError, match="enough"):
        pretrain(other, on_metrics=stop)
    assert checkpoint.load(other.output_dir / "last.pt")["step"] == 5


class Package(ModuleType):
    """Stands for wandb or mlflow."""

    def __init__(self, name, fails=""):
        super().__init__(name)
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            if name == self.fails:
                raise ConnectionError("no network\nmore")
            return SimpleNamespace(id="its-id", info=SimpleNamespace(run_id="its-id"))

        return call


@pytest.mark.parametrize(
    "name, begin, log, end",
    [("wandb", ["init"], "log", "finish"), ("mlflow", ["start_run", "log_params"], "log_metrics", "end_run")],
)
def test_a_tracker_gets_the_settings_and_every_row(config, monkeypatch, caplog, name, begin, log, end):
    package = Package(name)
    monkeypatch.setattr(train, "plot_curves", lambda folder: folder)
    monkeypatch.setitem(sys.modules, name, package)
    pretrain(replace(config, tracker=name))
    logged = [(call[1][0], call[2]["step"]) for call in package.calls if call[0] == log]
    rows = [(row, row.pop("step")) for row in read_metrics(config.output_dir)]
    assert logged == rows and package.calls[-1][0] == end and not caplog.records
    assert [call[0] for call in package.calls[: len(begin)]] == begin
    settings = package.calls[0][2]["config"] if name == "wandb" else package.calls[1][1][0]
    assert settings["arch"] == "vit_nano" and "run" in package.calls[0][2].values()
    package.calls.clear()
    pretrain(replace(config, tracker=name, resume=True))
    assert [call[0] for call in package.calls] == [begin[0], end] and "its-id" in package.calls[0][2].values()
    for fails in (begin[0], log, end):
        caplog.clear()
        monkeypatch.setitem(sys.modules, name, Package(name, fails))
        pretrain(replace(config, tracker=name, epochs=1, output_dir=config.output_dir / fails))
        (warned,) = [record.getMessage() for record in caplog.records]
        assert warned == f"{name} gets no more metrics (no network); training continues"


def test_a_tracker_that_is_not_installed_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--tracker wandb needs a package: pip install wandb"):
        pretrain(replace(config, tracker="wandb"))
    assert not config.output_dir.exists()


def test_rows_after_a_damaged_line_are_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize("output", ["full disk", "closed pipe"])
def test_a_run_whose_output_goes_nowhere_is_trained_to_its_end(config, output):
    words = ["--data", config.data, "--output-dir", config.output_dir, "--arch", "vit_nano", "--patch-size", "8"]
    words += ["--out-dim", "64", "--head-hidden-dim", "16", "--global-crops-size", "16", "--local-crops-number", "0"]
    words += ["--batch-size-per-gpu", "4", "--epochs", "2", "--device", "cpu"]
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as full:
        stdout = full if output == "full disk" else write
        command = [sys.executable, "-m", "dino_train", "pretrain", *map(str, words)]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and checkpoint.load(config.output_dir / "last.pt")["step"] == 10, done.stderr
    assert done.stderr.count("progress cannot be written") == 1 and "Traceback" not in done.stderr


def test_a_folder_is_used_by_one_run_at_a_time(config, monkeypatch):
    update, seen = Learner.step, []

    def meanwhile(self, step, crops):
        if not seen:
            for changes in ({}, {"resume": True}):
                with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on ") as error:
                    pretrain(replace(config, **changes))
                seen.append(error)
        return update(self, step, crops)

    monkeypatch.setattr(Learner, "step", meanwhile)
    pretrain(config)
    assert len(seen) == 2 and not (config.output_dir / "lock").exists()
    # A lock file that a killed run left behind locks nothing.
    (config.output_dir / "lock").write_text("process 1 on another")
    pretrain(replace(config, resume=True))


def test_the_log_has_what_was_said_and_how_it_ended(config, capsys, monkeypatch):
    (Path(config.data) / "class0/000.png").write_bytes(b"no image")
    pretrain(replace(config, knn_freq=1))
    said = capsys.readouterr().out.splitlines()
    lines = (config.output_dir / "log.txt").read_text().splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    text = [line[21:] for line in lines]
    assert text[0].startswith(f"dino-kernels {dino_kernels.__version__}") and f"torch {torch.__version__}" in text[0]
    assert not [line for line in said if line not in text]
    assert "warning: skipped unreadable image class0/000.png: not an image that Pillow reads" in text
    assert re.fullmatch(r"ended; 0:00:\d\d, at most \d+ MiB of memory", text[-1])
    best = max(row["knn10"] for row in read_metrics(config.output_dir) if "knn10" in row)
    assert any(line.startswith(f"best k-NN (k = 10): {best:.1f} % after ") for line in said)
    before = logging.getLogger().handlers[:]
    monkeypatch.setattr(Learner, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(replace(config, output_dir=config.output_dir / "other"))
    assert "division by zero; " in (config.output_dir / "other/log.txt").read_text().splitlines()[-1]
    assert logging.getLogger().handlers == before


def test_other_ranks_append_their_warnings_to_the_log(tmp_path):
    with RunLog(tmp_path):
        pass
    with RunLog(tmp_path, rank=1):
        logging.getLogger("x").warning("seen")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) == 3 and lines[-1].endswith("  rank 1, warning: seen")


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / "lock", tmp_path):
        assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text


def test_the_lock_of_a_file_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    """Another process takes a new file while this one waits for the old one."""
    path, flock, seen = tmp_path / "lock", fcntl.flock, []

    def removed_meanwhile(file, how):
        if not seen:
            path.unlink()
        seen.append(os.fstat(file.fileno()).st_ino)
        flock(file, how)

    monkeypatch.setattr("fcntl.flock", removed_meanwhile)
    with locked(path, tmp_path):
        assert len(seen) == 2 and path.stat().st_ino == seen[1]


def test_warnings_are_shown_where_logging_is_not_configured(config):
    code = "import json, logging, sys; from dino_train.engine.log import RunLog; from pathlib import Path\n"
    code += f"with RunLog(Path({str(config.output_dir.parent)!r})): logging.getLogger('x').warning('seen')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "dino-train: seen\n"
    assert "warning: seen" in (config.output_dir.parent / "log.txt").read_text()


@pytest.mark.parametrize("code, falls_back", [(errno.EIO, True), (errno.EINVAL, True), (errno.EMFILE, False)])
def test_errors_of_a_read_that_say_nothing_about_the_file_are_no_damage(tmp_path, monkeypatch, code, falls_back):
    for name in ("last", "previous"):
        checkpoint.save({"step": len(name)}, tmp_path / f"{name}.pt")

    def is_zipfile(path):
        if path.name == "last.pt":
            raise OSError(code, os.strerror(code))
        return True

    monkeypatch.setattr(checkpoint.zipfile, "is_zipfile", is_zipfile)
    if falls_back:
        assert checkpoint.load_newest(tmp_path)[0] == {"step": 8}
    else:
        with pytest.raises(OSError, match="Too many open files"):
            checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("code, falls_back", [(errno.EACCES, True), (errno.EISDIR, True), (errno.ESTALE, False)])
def test_a_checkpoint_that_cannot_be_opened_falls_back_to_the_previous(tmp_path, monkeypatch, caplog, code, falls_back):
    checkpoint.save({"step": 1}, tmp_path / "previous.pt")
    last, opened = tmp_path / "last.pt", Path.open
    last.mkdir()
    why = os.strerror(code)

    def fails(path, *arguments):
        if path == last:
            raise OSError(code, why)
        return opened(path, *arguments)

    monkeypatch.setattr(Path, "open", fails)
    if not falls_back:
        with pytest.raises(OSError, match=why):
            checkpoint.load_newest(tmp_path)
        return
    assert checkpoint.load_newest(tmp_path) == ({"step": 1}, tmp_path / "previous.pt")
    assert caplog.messages == [f"cannot read {last}: {why}; using {tmp_path / 'previous.pt'} instead"]
    (tmp_path / "previous.pt").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=f"^cannot read .*last.pt: {why}; no checkpoint at "):
        checkpoint.load_newest(tmp_path)


def test_any_damage_of_a_checkpoint_is_found(tmp_path, caplog):
    """Single bytes, cuts and holes, such as a bad sector leaves."""
    checkpoint.save({"step": 1}, tmp_path / "previous.pt")
    checkpoint.save({"step": 2, "x": torch.arange(3000.0)}, tmp_path / "last.pt")
    intact = (tmp_path / "last.pt").read_bytes()
    rng, found = np.random.default_rng(0), 0
    for i in range(300):
        at = int(rng.integers(len(intact))) if i % 2 else len(intact) - int(rng.integers(1, 400))  # its directory
        length = int(rng.choice([1, 16, 512]))
        hole = bytes(length) if i % 3 else rng.bytes(length)
        damaged = intact[:at] if i % 5 == 0 else (intact[:at] + hole + intact[at + length :])[: len(intact)]
        (tmp_path / "last.pt").write_bytes(damaged)
        state, path = checkpoint.load_newest(tmp_path)
        if path.name == "last.pt":  # what was hit holds nothing
            assert state["step"] == 2 and torch.equal(state["x"], torch.arange(3000.0))
        else:
            found += 1
            assert state["step"] == 1 and "last.pt" in caplog.records[-1].getMessage()
    assert found > 200


def test_training_continues_if_a_checkpoint_cannot_be_written(config, monkeypatch, caplog):
    save, calls = checkpoint.save, []

    def failing(state, path, **options):
        calls.append(state["step"])
        if state["step"] == 5:
            raise checkpoint.CheckpointError("cannot write last.pt: No space left on device")
        save(state, path, **options)

    monkeypatch.setattr(checkpoint, "save", failing)
    pretrain(config)
    assert calls == [5, 10, 15] and "No space left on device; training continues" in caplog.text


def test_a_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(config, monkeypatch):
    update = Learner.step

    def poisoned(self, step, crops):
        return update(self, step, [c * float("nan") for c in crops] if step == 7 else crops)

    monkeypatch.setattr(Learner, "step", poisoned)
    message = r"loss is nan at step 7 \(epoch 1, lr .*\). Try a lower --lr, .*last.pt was written before this"
    with pytest.raises(NonFiniteLoss, match=message):
        pretrain(config)
    state = checkpoint.load(config.output_dir / "last.pt")
    assert state["step"] == 5 and all(v.isfinite().all() for v in state["student"].values())
    with pytest.raises(NonFiniteLoss, match="No checkpoint was written before this$"):
        pretrain(replace(config, batch_size_per_gpu=2, output_dir=config.output_dir / "first"))


def test_unreadable_images_are_reported_once_skipped_and_counted(config, caplog, capsys):
    make_images(config.data, n=60)  # so that three are held out
    train_images, held_out = split(config.data)
    broken = [train_images.names[3], train_images.names[8], held_out.names[0]]
    for name in broken:
        (config.data / name).write_bytes(b"")
    pretrain(replace(config, knn_freq=1))
    lines = [r.getMessage() for r in caplog.records]
    for name in broken:
        assert [line for line in lines if name in line] == [f"skipped unreadable image {name}: empty file"]
    output = capsys.readouterr().out
    assert "2 of 57 training images could not be read" in output
    assert "1 of 3 held-out images could not be read" in output


def test_a_run_of_few_steps_is_told_so_and_commands_to_paste_are_quoted(config, capsys):
    pretrain(replace(config, epochs=1, output_dir=config.output_dir / "my run"))
    said = capsys.readouterr().out
    assert "note: 5 steps in all are few" in said and "raise --epochs to 100 or more" in said
    assert f"--run '{config.output_dir}/my run'" in said


def test_too_many_unreadable_images_stop_the_run_unless_they_are_allowed(config):
    make_images(config.data, n=40)
    for name in split(config.data)[0].names[::3]:
        (config.data / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"^more than 0.05 of the 38 images cannot be read.*--max-unreadable. 11: "):
        pretrain(config)
    pretrain(replace(config, epochs=1, max_unreadable=0.9, output_dir=config.output_dir / "allowed"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": Path("/nowhere")}, "/nowhere"),
        ({"batch_size_per_gpu": 50}, "21 images are fewer than one batch of 50"),
        ({"device": "cuda"}, "torch sees no GPU"),
    ],
)
def test_bad_options_are_reported(config, changes, message):
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((DataError, ValueError), match=message):
        pretrain(replace(config, **changes))
    assert not config.output_dir.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"out_dim": 1}, "out_dim must be at least 2"),
        ({"teacher_temp": 0.0}, "teacher_temp must be above 0"),
        ({"momentum_teacher": 1.5}, "momentum_teacher must be from 0 to 1, got 1.5"),
        ({"max_unreadable": 5.0}, "max_unreadable must be from 0 to 1, got 5.0"),
        ({"global_crops_scale": (0.5, 0.2)}, "global_crops_scale must be two increasing fractions"),
        ({"global_crops_size": 20}, "global_crops_size must be a multiple of patch_size 8, got 20"),
        ({"local_crops_size": 4}, "local_crops_size must be at least patch_size 8"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be from 0 to below 1"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
        ({"patch_embed_lr": 0.2, "optimizer": "sgd"}, "patch_embed_lr is for adamw, not for sgd"),
        ({"clip_per_module": True, "optimizer": "lars"}, "clip_per_module is for adamw, not for lars"),
        ({"layer_decay": 0.9, "arch": "resnet50"}, "layer_decay must be 1 for a convnet, got 0.9"),
        ({"layer_scale": 1e-5, "arch": "resnet50"}, "layer_scale must be 0 for a convnet, got 1e-05"),
        ({"clip_per_module": True, "clip_grad": 0.0}, "clip_grad must be above 0 with clip_per_module, got 0.0"),
    ],
)
def test_config_checks_itself(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_a_second_run_does_not_overwrite_the_first_and_options_must_match(config):
    pretrain(config)
    with pytest.raises(ValueError, match="holds a run already: add --resume"):
        pretrain(config)
    with pytest.raises(ValueError, match="has out_dim 64, not 32"):
        pretrain(replace(config, resume=True, out_dim=32))


def test_what_differs_from_the_interrupted_run_is_named_or_refused(config, caplog, tmp_path, monkeypatch):
    pretrain(replace(config, epochs=2))
    before = (config.output_dir / "config.json").read_text()
    moved = make_images(tmp_path / "moved")
    for changes, words in (
        ({"lr": 0.001}, "lr 0.0005 -> 0.001"),
        ({"data": moved}, f"data {config.data} -> {moved}"),
        ({"epochs": 1}, "epochs 2 -> 1"),
        ({"lr": 0.001, "epochs": 1}, "lr 0.0005 -> 0.001, epochs 2 -> 1"),
    ):
        with pytest.raises(ValueError, match=f"would continue with {words}: leave that out, or add --allow-changes"):
            pretrain(replace(config, **{"epochs": 2, "resume": True, **changes}))
        assert (config.output_dir / "config.json").read_text() == before
    changed = replace(config, resume=True, epochs=3, clip_grad=1.0, local_crops_scale=(0.05, 0.3), num_workers=2)
    caplog.clear()
    pretrain(changed)
    words = "the run continues with epochs 2 -> 3, clip_grad 3.0 -> 1.0, local_crops_scale (0.05, 0.4) -> (0.05, 0.3)"
    assert [record.getMessage() for record in caplog.records] == [words]
    assert json.loads((config.output_dir / "config.json").read_text())["clip_grad"] == 1.0
    moving = replace(changed, epochs=4, lr=0.001, data=moved, allow_changes=True)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", lambda *_: 1 / 0)
        before = (config.output_dir / "config.json").read_text()
        with pytest.raises(ZeroDivisionError):  # before its first checkpoint
            pretrain(moving)
        assert (config.output_dir / "config.json").read_text() == before
    caplog.clear()
    pretrain(moving)
    assert f"data {config.data} -> {moved}, epochs 3 -> 4, lr 0.0005 -> 0.001" in caplog.text
    caplog.clear()
    pretrain(replace(changed, epochs=4, lr=0.001, data=moved))
    assert not caplog.records


def test_resuming_with_another_number_of_threads_warns_of_rounding(config, caplog):
    pretrain(replace(config, epochs=1))
    state = checkpoint.load(config.output_dir / "last.pt")
    assert state["threads"] == torch.get_num_threads()
    checkpoint.save({**state, "threads": 97}, config.output_dir / "last.pt")
    pretrain(replace(config, epochs=1, resume=True))
    (warned,) = [record.getMessage() for record in caplog.records]
    assert warned.startswith(f"the interrupted run had 97 threads and this one has {torch.get_num_threads()}: results ")


def test_resuming_with_other_images_starts_the_epoch_again(config, caplog):
    pretrain(replace(config, epochs=1))
    make_images(config.data, n=30)
    pretrain(replace(config, resume=True, epochs=2))
    assert "epoch 2 starts again" in caplog.text
    assert checkpoint.load(config.output_dir / "last.pt")["step"] == 14  # 29 images: 7 steps an epoch


def test_a_zip_trains_like_its_folder(config):
    archive = config.data.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in config.data.rglob("*.png"):
            file.write(path, path.relative_to(config.data))
    zipped = replace(config, data=archive, output_dir=config.output_dir / "zip")
    pretrain(config)
    pretrain(zipped)
    assert_same(final_weights(config), final_weights(zipped))


@pytest.mark.parametrize("arch, optimizer", [("resnet50", "sgd"), ("vit_nano", "lars")])
def test_other_networks_and_optimizers_run(config, arch, optimizer):
    torch.manual_seed(0)
    config = replace(config, arch=arch, optimizer=optimizer, use_bn_in_head=True, lr=0.5, global_crops_size=32)
    learner = Learner(config, 2, torch.device("cpu"))
    before = {k: v.clone() for k, v in learner.teacher.state_dict().items()}
    crops = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    for step in range(3):
        learner.step(step, crops)
    after = learner.teacher.state_dict()
    assert not torch.equal(after["head.mlp.0.weight"], before["head.mlp.0.weight"])
    # The batch norms of the teacher use its own batches, not the student's.
    assert after["head.mlp.1.num_batches_tracked"] == 3
    assert not torch.equal(after["head.mlp.1.running_mean"], learner.student.state_dict()["head.mlp.1.running_mean"])


@pytest.mark.parametrize(
    "loss, entropy, single, expected",
    [
        (np.log(64), np.log(64), np.log(64), "loss stays at ln K"),
        (1.0, 0.5, 0.5, "same output"),
        (3.0, 3.5, 1.0, None),
    ],
)
def test_a_collapse_is_reported_once_and_not_during_warmup(caplog, loss, entropy, single, expected):
    watch = CollapseWatch(64, quiet_steps=100, patience=3)
    row = {"loss": loss, "teacher_entropy": entropy, "teacher_single_entropy": single}
    row["teacher_kl_to_uniform"] = np.log(64) - entropy
    for step in range(0, 100, 10):
        watch.update(step, row)
    assert not caplog.records
    for step in range(100, 200, 10):
        watch.update(step, row)
    assert len(caplog.records) == (1 if expected else 0)
    if expected:
        assert expected in caplog.text
        assert "same" not in expected or "every image gets the same output (entropy 0.50 of 4.16)" in caplog.text
        assert "same" not in expected or "look at the images: pictures that are nearly black" in caplog.text


def test_a_collapse_is_said_again_at_the_end_and_evaluations_with_their_number_of_images(config, capsys, monkeypatch):
    make_images(config.data, n=60)  # so that three are held out
    monkeypatch.setattr(train, "plot_curves", lambda folder: folder)
    monkeypatch.setattr(CollapseWatch, "update", lambda watch, step, row: watch.warned.update(constant="it collapsed"))
    pretrain(replace(config, epochs=1, knn_freq=1))
    said = capsys.readouterr().out
    assert said.count("\nit collapsed\n") == 1
    assert re.search(r"after 1 epochs: retrieval [\d.]+ % of 3 images \(chance 33.3 %\)  knn10 [\d.]+ %", said)
    assert re.search(r"knn20 [\d.]+ % of 3 images \(chance 50.0 %\)\n", said)
    assert re.search(r"best k-NN .* epochs \(3 images, chance 50.0 %\)\n", said)


def test_a_temporary_read_error_does_not_discard_the_last_checkpoint(config, monkeypatch):
    pretrain(config)

    def failing(*args, **options):
        raise MemoryError

    monkeypatch.setattr(checkpoint.torch, "load", failing)
    with pytest.raises(MemoryError):
        pretrain(replace(config, resume=True))
    monkeypatch.undo()
    assert checkpoint.load(config.output_dir / "last.pt")["step"] == 15


def test_non_finite_weights_are_not_saved(config, monkeypatch):
    update = Learner.step

    def poisoned(self, step, crops):
        result = update(self, step, crops)
        if step == 9:
            with torch.no_grad():
                next(self.student.parameters()).fill_(float("inf"))
        return result

    monkeypatch.setattr(Learner, "step", poisoned)
    with pytest.raises(NonFiniteLoss, match="weights are not finite after step 10; they are not saved"):
        pretrain(config)
    assert checkpoint.load(config.output_dir / "last.pt")["step"] == 5


def test_resuming_a_finished_run_changes_nothing_and_a_foreign_checkpoint_is_rejected(config):
    pretrain(config)
    before, rows = final_weights(config), read_metrics(config.output_dir)
    pretrain(replace(config, resume=True))
    assert_same(final_weights(config), before)
    assert read_metrics(config.output_dir) == rows
    state = checkpoint.load(config.output_dir / "last.pt")
    torch.save({k: state[k] for k in ("student", "teacher", "epoch")}, config.output_dir / "last.pt")
    with pytest.raises(checkpoint.CheckpointError, match="was not written by dino-train"):
        pretrain(replace(config, resume=True))
