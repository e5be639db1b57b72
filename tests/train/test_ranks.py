"""Runs of several ranks: bitwise resuming, signals, and a rank that dies. Two processes with gloo."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dino_train.common import checkpoint, parallel
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.resume import set_random_state
from dino_train.engine.train import pretrain
from tiny_run import RANKS, assert_same, final_weights, make_images, torchrun

# Executes some code before every step, with the variables `rank` and `number` (of the step).
_RANK = """
import os, signal, sys, time
from pathlib import Path
from dino_train.engine import train
from dino_train.cli import main
act, output, *arguments = sys.argv[1:]
rank, update = int(os.environ["RANK"]), train.Learner.step
def step(self, number, crops):
    exec(act)
    return update(self, number, crops)
train.Learner.step = step
code = main(["pretrain", "--output-dir", output, *arguments])
if rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
    time.sleep(2)  # torchrun ends processes that are still running
Path(output, f"exit{rank}").write_text(str(code))
sys.exit(code)
"""


def job(images: Path, output: Path, act: str = "", **changes: object) -> list[str]:
    """The command of a rank."""
    (output.parent / "rank.py").write_text(_RANK)
    values = {"data": images, **RANKS, **changes}
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [str(output.parent / "rank.py"), act, str(output), "--resume", *flags]


def run_both(command: list[str], second: list[str] | None = None) -> tuple[list[int], str]:
    """Exit codes and output of two ranks started without torchrun; `second`: the command of the second one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    environment = {**os.environ, **group, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *(second if rank and second else command)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = "".join(rank.communicate(timeout=300)[1] for rank in ranks)
    return [rank.returncode for rank in ranks], said


def weights(output: Path) -> dict:
    return final_weights(PretrainConfig(output_dir=output))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Images, and the folder of an uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    images = make_images(folder / "images")
    codes, said = run_both(job(images, folder / "run"))
    assert codes == [0, 0], said
    return images, folder / "run"


@pytest.mark.parametrize("signum, rank", [pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow), (signal.SIGINT, 0)])
def test_a_signal_to_one_rank_stops_both_and_the_resumed_run_is_bitwise_the_same(straight, tmp_path, signum, rank):
    images, whole = straight
    act = f"if number == 6 and rank == {rank}: os.kill(os.getpid(), {signum:d})"
    codes, said = run_both(job(images, tmp_path / "run", act))
    assert codes == [128 + signum] * 2, said
    assert said.count("dino-train: stopped at step 7 of 15; --resume continues") == 2  # at once, not at the next log
    state = checkpoint.load(tmp_path / "run/last.pt")
    first, second = state["rng"]["torch"]
    assert state["step"] == 7 and not first.equal(second)
    assert "  rank 1, stopped at step 7 of 15" in (tmp_path / "run/log.txt").read_text()
    codes, said = run_both(job(images, tmp_path / "run"))
    assert codes == [0, 0] and "bitwise" not in said, said
    assert_same(weights(tmp_path / "run"), weights(whole))


@pytest.mark.parametrize(
    "act",
    [
        # To torchrun, which forwards it, and to a rank, which gets it twice, as from a scheduler.
        "if number == 6 and rank == 0: os.kill(os.getppid(), signal.SIGTERM); "
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(3)",
        # To one rank only: torchrun ends the other, which has stopped too and is about to end.
        "if number == 6 and rank == 1: os.kill(os.getpid(), signal.SIGTERM)",
        pytest.param(
            "if number == 6 and rank == 1: os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["job", "rank", "twice"],
)
def test_a_signal_under_torchrun_stops_all_ranks_with_a_checkpoint(straight, tmp_path, act):
    images, _ = straight
    # Data workers get the signals of torchrun too.
    process = torchrun(job(images, tmp_path / "run", act, num_workers=1), stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert checkpoint.load(tmp_path / "run/last.pt")["step"] == 7, said
    expected = str(128 + (signal.SIGINT if "SIGINT" in act else signal.SIGTERM))
    assert [(tmp_path / f"run/exit{rank}").read_text() for rank in range(2)] == [expected] * 2, said


@pytest.mark.parametrize("restarts", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_dies_ends_the_job_or_torchrun_resumes_it(straight, tmp_path, restarts):
    images, whole = straight
    act = (
        "if number == 7 and rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': "
        f"Path({str(tmp_path / 'died')!r}).touch(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = torchrun(
        [f"--max-restarts={restarts}", *job(images, tmp_path / "run", act)],
        stderr=subprocess.PIPE,
    )
    _, said = process.communicate(timeout=300)
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    if restarts:
        assert process.returncode == 0, said
        assert_same(weights(tmp_path / "run"), weights(whole))
    else:
        assert process.returncode != 0 and f"rank      : 1 (local_rank: 1)\n  exitcode  : {-signal.SIGKILL}" in said
        assert checkpoint.load(tmp_path / "run/last.pt")["step"] == 5


def test_ranks_with_other_images_or_settings_end_with_a_line_that_says_so(straight, tmp_path):
    images, whole = straight
    copy = shutil.copytree(images, tmp_path / "copy")
    (copy / "class0/000.png").rename(copy / "class0/x.png")
    shutil.copytree(whole, tmp_path / "resumed")
    (tmp_path / "run").mkdir()
    for second, what in (
        (job(copy, tmp_path / "run", num_workers=2), "the names of the 21 images in "),
        (job(images, tmp_path / "resumed", lr=0.1), "lr, whether output_dir holds a checkpoint: start"),
    ):
        codes, said = run_both(job(images, tmp_path / "run"), second)
        assert codes == [1, 1] and said.count(f"dino-train: error: the processes differ in {what}") == 2, said
        assert "Traceback" not in said and not (tmp_path / "run/config.json").exists()


def test_ranks_agree_when_a_checkpoint_is_due(straight, tmp_path):
    """Even if their clocks differ: here it is due only on the second rank, in step number 6."""
    images, _ = straight
    act = "if number == 6 and rank == 1: time.monotonic = lambda now=time.monotonic: now() + 1e6\n"
    act += "if number == 7: os.abort()"
    codes, said = run_both(job(images, tmp_path / "run", act))
    assert codes == [-signal.SIGABRT] * 2, said
    assert checkpoint.load(tmp_path / "run/last.pt")["step"] == 7


def test_resuming_with_another_number_of_ranks_warns(straight, tmp_path, caplog):
    images, whole = straight
    shutil.copytree(whole, tmp_path / "run")
    alone = {**RANKS, "data": images, "output_dir": tmp_path / "run", "epochs": 4, "batch_size_per_gpu": 4}
    pretrain(replace(PretrainConfig(**alone), resume=True))
    assert [record.getMessage() for record in caplog.records] == [
        "the run continues with batch_size_per_gpu 2 -> 4, epochs 3 -> 4",
        "the interrupted run had 2 processes and this one has 1: it continues, but will not be bitwise identical to "
        "a run without the interruption",
    ]
    assert checkpoint.load(tmp_path / "run/last.pt")["step"] == 20
    codes, said = run_both(job(images, tmp_path / "run", epochs=5))
    assert codes == [0, 0] and said.count("had 1 processes and this one has 2: it continues") == 1, said
    assert checkpoint.load(tmp_path / "run/last.pt")["step"] == 25


def test_each_gpu_restores_its_own_random_state(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: taken.append(state.tolist()))
    device = torch.device("cuda", 1)
    before = torch.get_rng_state()
    own = torch.Generator().manual_seed(7).get_state()
    try:
        saved = {"torch": torch.stack([before, own]), "cuda": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)}
        set_random_state(saved, device, 0, 0)
        assert torch.get_rng_state().equal(own) and taken == [[3, 4]]
        monkeypatch.setattr(parallel, "size", lambda: 1)
        monkeypatch.setattr(parallel, "rank", lambda: 0)
        set_random_state({"torch": before, "cuda": []}, device, 0, 0)  # checkpoint of an earlier version, from a CPU
        assert torch.get_rng_state().equal(before) and len(taken) == 1
    finally:
        torch.set_rng_state(before)
