"""The benchmark of a whole step runs, and its peers compute the same updates as ours."""

import json
import subprocess
import sys
from pathlib import Path

import bench_step
import pytest
import torch
from bench_step import ours
from step_peers import FIRST_STEP, PEERS, PHASES, Net, Reference, Setting, compile_blocks, start_weights

ROOT = Path(__file__).resolve().parents[2]
TOY = ["--arch", "vit_nano", "--batch", "2", "--local-crops", "2", "--out-dim", "256", "--threads", "2"]


def toy_run(folder: Path, *options: str) -> tuple[str, dict]:
    """What it prints and writes."""
    command = [sys.executable, str(ROOT / "bench/bench_step.py"), *TOY, "--steps", "2", "--warmup", "1"]
    command += ["--device", "cpu", "--json", str(folder / "step.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((folder / "step.json").read_text())


@pytest.mark.slow
def test_a_toy_run_writes_its_results(tmp_path):
    names = ["ours", "reference", "stock"]
    printed, results = toy_run(tmp_path, "--providers", ",".join(names))
    assert {"setting", "versions", "machine", "date", "providers"} == set(results)
    assert list(results["providers"]) == names
    for name, row in results["providers"].items():
        assert printed.count(f"| {name} |") == 2  # in both tables
        assert row["images_per_s"] == pytest.approx(2e3 / row["step_ms"])
        assert 100 < row["peak_mib"] < 4000
        assert set(row["phases"]) == set(PHASES) and min(row["phases"].values()) > 0
        assert row["threads"] == 2 and row["others_cores"] < 2
        assert row["losses"] == pytest.approx(
            results["providers"]["reference"]["losses"], rel=0.05
        )  # drop path differs
        assert row["idle_cpu_ms"] < 100  # its threads sleep while another provider runs


# With the names that bench_step.py takes from a clone of moco-v3; without its momentum encoder.
PUBLIC_MOCO_V3 = """
import torch

class MoCo_ViT(torch.nn.Module):
    def __init__(self, network, dim, mlp_dim, T):
        super().__init__()
        self.base_encoder = network(num_classes=mlp_dim)
        self.predictor = torch.nn.Linear(mlp_dim, dim)
        self.T = T

    def forward(self, x1, x2, m):
        q, k = (torch.nn.functional.normalize(self.predictor(self.base_encoder(x)), dim=1) for x in (x1, x2))
        return torch.nn.functional.cross_entropy(q @ k.T / self.T, torch.arange(len(q)))
"""


@pytest.mark.slow
def test_methods_are_compared_by_what_they_compute_and_with_public_code(tmp_path):
    clone = tmp_path / "moco-v3/moco"
    clone.mkdir(parents=True)
    (clone / "builder.py").write_text(PUBLIC_MOCO_V3)
    printed, results = toy_run(tmp_path, "--methods", "dino,mocov3", "--public", str(tmp_path))
    names = ["method dino", "method mocov3", "public mocov3 float32", "public mocov3 bfloat16"]
    assert list(results["providers"]) == names
    for name, row in results["providers"].items():
        assert row["step_ms"] > 0 and all(loss > 0 for loss in row["losses"]), name
    lines = [line.split(" | ") for line in printed.splitlines() if line.endswith(tuple("0123456789 |"))]
    table = {cells[0].removeprefix("| "): cells[1:] for cells in lines if len(cells) == 5}
    assert set(table) >= {"dino", "mocov3", "public mocov3 float32", "public mocov3 bfloat16"}
    assert table["mocov3"][1] == table["public mocov3 float32"][1] != table["dino"][1]  # GFLOP per image
    assert table["dino"][3] == "1.00 |"  # the first


def test_public_code_that_is_not_there_is_an_error(monkeypatch, tmp_path, capsys):
    arguments = ["bench_step.py", "--device", "cpu", "--methods", "byol,mocov2", "--public", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        bench_step.parse()
    assert f"--public {tmp_path} has no code of these methods" in capsys.readouterr().err


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
    assert abs(losses[2] - losses[0]) > 0.01  # same batch: the weights have changed
    for name, weight in theirs.teacher.state_dict().items():
        difference = (mine.teacher.state_dict()[name] - weight).norm() / (weight - weights[name]).norm().clamp_min(1e-6)
        # The gradient of a key bias is only rounding error, which AdamW amplifies.
        assert difference < 0.002 or name.endswith("qkv.bias"), f"{name} differs by {difference:.1e} of its change"


SMALL = {"patch": 8, "global_size": 32, "local_size": 16, "hidden": 64, "local_crops": 2, "out_dim": 256}


def test_the_float16_reference_scales_its_loss_and_skips_overflows():
    """The configuration for a GPU, here on a CPU."""
    setting = Setting("vit_nano", 2, "cpu", **SMALL, drop_path=0.0, lr=0.1)
    weights = start_weights(setting)
    half, full = Reference(setting, weights, torch.float16), Reference(setting, weights)
    assert half.scaler.is_enabled() and not full.scaler.is_enabled()
    # The gradients of such a small network overflow with the default initial scale of 65536.
    half.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    seen = []
    half.phase_hook = lambda phase: phase == "teacher" and seen.append(torch.is_autocast_enabled("cpu"))
    for step in range(FIRST_STEP, FIRST_STEP + 3):
        crops = setting.crops(step)
        assert half.step(step, crops) == pytest.approx(full.step(step, crops), rel=1e-3)
    assert seen == [True] * 3 and half.scaler.get_scale() == 256
    before = [p.clone() for p in half.student.parameters()]
    half.scaler.update(2.0**100)
    half.step(FIRST_STEP + 3, setting.crops(3))
    assert all(torch.equal(a, b) for a, b in zip(before, half.student.parameters(), strict=True))
    assert half.scaler.get_scale() < 2.0**100


def test_stock_compiles_one_block_for_all_blocks():
    """Blocks differ in their drop path rates, which are tensors, and in whether they have drop path."""
    from torch._dynamo.utils import counters

    counters.clear()
    setting = Setting("vit_tiny", 2, "cpu", **SMALL, drop_path=0.1)
    student, teacher = Net(setting, 0.1), Net(setting)
    crops, plain = setting.crops(0), Net(setting, 0.1)
    plain.load_state_dict(student.state_dict())
    compile_blocks(student, teacher, backend="aot_eager")
    outputs = []
    for net in (student, plain):
        torch.manual_seed(0)
        outputs.append(net(crops))
        outputs[-1].sum().backward()
    with torch.no_grad():
        teacher(crops[:2])
    assert torch.allclose(*outputs, atol=1e-5)
    # Two crop sizes of the student, with and without drop path; global crops of the teacher, without gradients.
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]


def test_on_a_gpu_no_provider_holds_memory_while_another_is_measured(monkeypatch):
    turns = []

    def take_turns(setting, names, options):
        turns.append(names)
        return {name: {"step_ms": 1.0} for name in names}

    monkeypatch.setattr(bench_step, "take_turns", take_turns)
    for device, expected in (("cpu", [["ours", "stock"]]), ("cuda", [["ours"], ["stock"]])):
        turns.clear()
        rows = bench_step.measure(Setting("vit_nano", 2, device), ["ours", "stock"], None)
        assert turns == expected and list(rows) == ["ours", "stock"]


@pytest.mark.parametrize("device, given, expected", [("cpu", [], 2), ("cuda", [], 6), ("cuda", ["--warmup", "4"], 4)])
def test_number_of_warmup_steps(monkeypatch, device, given, expected):
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--device", device, *given])
    assert bench_step.parse().warmup == expected
