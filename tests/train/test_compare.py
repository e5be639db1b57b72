"""The comparison of methods: every method trains, the table has all rows, what is done is not done again."""

import json
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest
from dino_train.cli import main
from dino_train.common import checkpoint
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine import compare
from dino_train.engine.compare import NOTE, VARIANTS
from tiny_run import colored_classes


def words(folder, *more):
    images = folder / "images"
    if not images.exists():
        colored_classes(images, train=30)
    budget = ["--budget-images", "180", "--num-workers", "1", "--device", "cpu"]
    budget += [] if "--seeds" in more else ["--seeds", "1"]
    return ["compare", "--data", str(images), "--output-dir", str(folder / "compare"), *budget, *more]


@pytest.mark.slow
def test_all_methods_are_trained_and_compared_and_nothing_is_done_twice(tmp_path, capsys, monkeypatch):
    names = ["dino", "byol"]
    assert main(words(tmp_path, "--methods", *names)) == 0
    text = capsys.readouterr().out
    table = json.loads((tmp_path / "compare/compare.json").read_text())
    assert list(table["methods"]) == names and table["note"] == NOTE and NOTE in text
    assert (tmp_path / "compare/compare.png").stat().st_size > 1000
    lines = (tmp_path / "compare/compare.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [
        *("raw pixels", "random weights", "dino", "dino", "byol", "byol")
    ]
    for row in table["methods"].values():
        assert row["epochs"] == 2 and row["sweep_seconds"] == 0 and row["rate"] == 1
        assert 0 <= row["knn10"] <= 100 and row["knn10_sd"] >= 0 and row["peak_mib"] > 100
        assert row["tflops"] == pytest.approx(row["gflop_per_image"] * row["images_per_second"] / 1e3, rel=0.2)
        assert row["time"]["epochs"] >= 1
    assert table["methods"]["dino"]["time"]["epochs"] == 2  # it is the measure
    monkeypatch.setattr("dino_train.engine.compare._train", None)  # no run starts again
    assert main(words(tmp_path, "--methods", *names)) == 0
    assert json.loads((tmp_path / "compare/compare.json").read_text()) == table
    colored_classes(tmp_path / "other", train=30)
    assert main([*words(tmp_path, "--methods", *names), "--data", str(tmp_path / "other")]) == 1
    error = capsys.readouterr().err
    assert f"holds a comparison of vit_nano on {tmp_path / 'images'}, not of vit_nano on {tmp_path / 'other'}" in error


def test_the_process_of_a_run_has_the_settings_of_pretrain(monkeypatch, tmp_path):
    order = []
    for name in ("tune", "pretrain", "_stop_with_parent"):
        monkeypatch.setattr(compare, name, lambda *_, name=name: order.append(name))
    compare._train(PretrainConfig(output_dir=tmp_path), tmp_path / "end.json")
    assert json.loads((tmp_path / "end.json").read_text())["peak_mib"] > 0
    assert order[0] == "tune" and "pretrain" in order


@pytest.mark.slow
def test_every_variant_trains_at_its_best_rate(tmp_path):
    assert main(words(tmp_path, "--methods", *VARIANTS, "--equal-time", "false", "--sweep")) == 0
    table = json.loads((tmp_path / "compare/compare.json").read_text())
    assert list(table["methods"]) == list(VARIANTS)
    swept = sum(row["sweep_seconds"] for row in table["methods"].values())
    text = (tmp_path / "compare/compare.md").read_text()
    assert f"The other learning rates of the sweep took {swept:.0f} s of training." in text
    for name, row in table["methods"].items():
        tried = {}
        for path in (tmp_path / "compare" / name).glob("2-epochs-rate-*-seed-0/validation.json"):
            tried[path.parent.name.split("-")[3]] = json.loads(path.read_text())
        assert len(tried) == 3 and row["sweep_seconds"] > 0
        assert tried[f"{row['rate']:.2g}"] == max(tried.values())


@pytest.mark.slow
def test_a_rate_that_diverges_is_a_result_and_never_chosen(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(compare, "RATES", (1.0, 1e25))
    options = words(tmp_path, "--methods", "dino", "--equal-time", "false", "--sweep")
    assert main(options) == 0
    assert json.loads((tmp_path / "compare/compare.json").read_text())["methods"]["dino"]["rate"] == 1
    monkeypatch.setattr(compare, "RATES", (1e25,))
    monkeypatch.setattr(compare, "_train", None)  # known from before
    assert main(options) == 1
    assert "dino has diverged with each learning rate: " in capfd.readouterr().err


def test_the_peak_memory_of_a_run_that_was_trained_before_is_that_of_its_training(tmp_path, monkeypatch):
    asked = compare.Compare(output_dir=tmp_path)
    asked.count = 10
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "end.json").write_text('{"peak_mib": 123, "crops": "2 + 4", "epochs": 1}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 5.0}\n')
    monkeypatch.setattr(compare, "_train", None)
    evaluation = MagicMock(**{"of_backbone.return_value": {}})
    monkeypatch.setattr(compare.Compare, "_evaluation", lambda *_: evaluation)
    monkeypatch.setattr(compare.Compare, "_parts", lambda *_: ())
    assert asked._trained("dino", folder, 1, 1.0, 0)["peak_mib"] == 123


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_run_behind_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "dino_train", *words(tmp_path, "--methods", "dino", "--equal-time", "false")]
    command += ["--budget-images", "5400"]
    folder = tmp_path / "compare/dino/60-epochs-rate-1-seed-0"
    killed = subprocess.Popen(command)
    while not (folder / "last.pt").exists():
        time.sleep(0.1)
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    size = -1
    while size != (size := (folder / "metrics.jsonl").stat().st_size):  # until it grows no more
        time.sleep(3)
    step = checkpoint.load(folder / "last.pt")["step"]
    assert 0 < step < 60
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"from step {step}" in done.stdout


def test_a_run_that_fails_is_named(tmp_path, capfd):
    (tmp_path / "images").mkdir()
    colored_classes(tmp_path / "images")
    assert main(words(tmp_path, "--methods", "dino")) == 1
    error = capfd.readouterr().err
    assert "error: 36 images are fewer than one batch of 64" in error and "dino with seed 0 has failed" in error


def test_wrong_options(tmp_path, capsys):
    assert main(words(tmp_path, "--methods", "dino", "ibot", "--arch", "resnet_nano")) == 1
    assert "arch must be a ViT for ibot" in capsys.readouterr().err and not (tmp_path / "compare/dino").exists()
    assert main(words(tmp_path, "--methods", "dino", "nonsense")) == 1
    assert "methods must be among dino, dino-sinkhorn, byol" in capsys.readouterr().err
    assert main(words(tmp_path, "--seeds", "0")) == 1
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
