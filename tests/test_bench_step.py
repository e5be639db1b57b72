"""The benchmark of a whole step runs, and its peers train exactly what ours trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_step import ours
from step_peers import FIRST_STEP, PEERS, PHASES, Setting, start_weights

ROOT = Path(__file__).resolve().parent.parent
TOY = ["--arch", "vit_nano", "--batch", "2", "--local-crops", "2", "--out-dim", "256", "--threads", "2"]


def test_a_toy_run_writes_what_it_measured(tmp_path):
    names = ["ours", "reference", "stock"]
    options = [*TOY, "--steps", "2", "--warmup", "1", "--device", "cpu", "--providers", ",".join(names)]
    command = [sys.executable, str(ROOT / "bench/bench_step.py"), *options, "--json", str(tmp_path / "step.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "step.json").read_text())
    assert {"setting", "versions", "machine", "date", "providers"} == set(results)
    assert list(results["providers"]) == names
    for name, row in results["providers"].items():
        assert done.stdout.count(f"| {name} |") == 2  # in both tables
        assert row["images_per_s"] == pytest.approx(2e3 / row["step_ms"])
        assert 100 < row["peak_mib"] < 4000
        assert set(row["phases"]) == set(PHASES) and min(row["phases"].values()) > 0
        assert row["threads"] == 2 and row["others_cores"] < 2
        assert row["losses"] == pytest.approx(
            results["providers"]["reference"]["losses"], rel=0.05
        )  # drop path differs
        assert row["idle_cpu_ms"] < 100  # its threads sleep while it is another's turn


@pytest.mark.parametrize("peer", ["reference", "stock"])
def test_peers_take_the_same_steps_as_ours(peer):
    sizes = {"patch": 8, "global_size": 32, "local_size": 16, "hidden": 64}
    setting = Setting("vit_nano", 2, "cpu", local_crops=3, out_dim=256, drop_path=0.0, lr=2.0, **sizes)
    weights = start_weights(setting)
    mine = ours(setting, weights, "float32")
    theirs = PEERS[peer](setting, weights, dtype=torch.float32)
    assert mine.lr == pytest.approx(theirs.lr) and mine.momentum == pytest.approx(theirs.momentum)
    losses = []
    for step in range(FIRST_STEP, FIRST_STEP + 3):
        crops = setting.crops(0)
        losses.append(theirs.step(step, crops))
        assert mine.step(step, crops).loss == pytest.approx(losses[-1], rel=1e-4), f"step {step}"
    assert abs(losses[2] - losses[0]) > 0.01  # of one batch: what changed it are the weights
    for name, weight in theirs.teacher.state_dict().items():
        difference = (mine.teacher.state_dict()[name] - weight).norm() / (weight - weights[name]).norm().clamp_min(1e-6)
        # A key bias has no gradient but rounding, which AdamW scales up.
        assert difference < 0.002 or name.endswith("qkv.bias"), f"{name} differs by {difference:.1e} of its change"
