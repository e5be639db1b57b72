import pytest
import torch
from dino_train.cli import main
from dino_train.evaluate.baselines import raw_pixels
from tiny_run import colored_classes, error_of, evaluate, tiny_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    colored_classes(folder / "images")
    return tiny_checkpoint(folder), folder / "images"


def test_each_row_equals_the_result_of_the_other_protocols(run, capsys):
    checkpoint, images = run
    options = "--checkpoint", checkpoint, "--data", images
    found = evaluate(capsys, "baselines", *options, "--epochs", "3", "--seed", "0")
    assert found["train"] == 36 and found["val"] == 15
    assert found["chance"] == {"knn10": pytest.approx(100 / 3), "linear": pytest.approx(100 / 3)}
    assert found["raw pixels"]["knn10"] == 100  # the classes are colors
    knn = evaluate(capsys, "knn", *options, "--nb-knn", "10")
    linear = evaluate(capsys, "linear", *options, "--epochs", "3")
    assert found["teacher"] == {"knn10": knn["knn10"]["top1"], "linear": linear["best"]["top1"]}
    # random weights with seed 0 equal an untrained checkpoint with seed 0
    assert found["random weights"] == found["teacher"]
    assert evaluate(capsys, "baselines", *options, "--epochs", "3", "--seed", "0") == found  # from the cache


def test_text_names_every_row_and_the_number_of_images(run, capsys):
    checkpoint, images = run
    capsys.readouterr()
    assert main(["evaluate", "baselines", "--checkpoint", str(checkpoint), "--data", str(images), "--epochs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("top-1")[1].strip() == "in % of 15 held-out images"
    assert [line[:16].strip() for line in lines[1:]] == ["chance", "raw pixels", "random weights", "teacher"]


def test_raw_pixels_are_downscaled_to_32():
    pixels = torch.arange(2 * 3 * 64 * 64.0).view(2, 3, 64, 64)
    assert torch.equal(raw_pixels(pixels)[0, :2], pixels[0, 0].view(32, 2, 32, 2).mean(dim=(1, 3))[0, :2])
    assert torch.equal(raw_pixels(pixels[..., :8, :8]), pixels[..., :8, :8].flatten(1))


def test_wrong_options(run, capsys):
    assert "epochs must be at least 1, got 0" in error_of(capsys, "baselines", "--checkpoint", run[0], "--epochs", "0")
