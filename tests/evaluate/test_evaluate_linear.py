import shutil

import numpy as np
import pytest
import torch
from dino_train.cli import main
from dino_train.common import checkpoint
from dino_train.common.views import eval_transform
from dino_train.data.folder import ImageFolder
from dino_train.evaluate.images import RandomCrop, training_loader
from dino_train.evaluate.linear import Probes, block_features, cosine, n_features
from dino_train.models.vit import vit
from PIL import Image
from tiny_run import colored_classes, error_of, evaluate, tiny_checkpoint
from torch import nn

from dino_kernels import PixelScale


@pytest.fixture
def words(tmp_path):
    data = colored_classes(tmp_path / "data")
    return ["linear", "--checkpoint", tiny_checkpoint(tmp_path / "run"), "--data", data, "--batch-size", "8"]


def test_probes_equal_separate_layers_trained_with_sgd():
    g = torch.Generator().manual_seed(0)
    rates, factors = [0.01, 0.3, 2.0], [1.0, 0.5, 0.25, 0.1]
    batches = [(torch.randn(9, 6, generator=g), torch.randint(0, 4, (9,), generator=g)) for _ in factors]
    probes = Probes(6, 4, rates, seed=3, device=torch.device("cpu"))
    layers = []
    for i, rate in enumerate(rates):
        layer = nn.Linear(6, 4)
        with torch.no_grad():
            layer.weight.copy_(probes.weight[i])
            layer.bias.copy_(probes.bias[i])
        layers.append((layer, torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)))
    assert probes.weight[0].equal(probes.weight[2]) and 0.005 < probes.weight.std() < 0.015
    for (x, labels), factor in zip(batches, factors, strict=True):
        losses = probes.step(x, labels, factor)
        for i, (layer, optimizer) in enumerate(layers):
            optimizer.param_groups[0]["lr"] = rates[i] * factor
            loss = nn.functional.cross_entropy(layer(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(losses[i], loss.detach())
    for i, (layer, _) in enumerate(layers):
        torch.testing.assert_close(probes.weight[i], layer.weight)
        torch.testing.assert_close(probes.bias[i], layer.bias)


def test_learning_rates_equal_the_schedule_of_the_reference():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)  # eval_linear.py:109
    for epoch in range(10):
        assert cosine(epoch, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_block_features_are_class_tokens_of_the_last_blocks_and_mean_patches():
    torch.manual_seed(0)
    backbone = vit("vit_nano", patch_size=8, img_size=16).eval()
    pixels = torch.randn(2, 3, 16, 16)
    tokens = backbone.features(pixels, 2)
    expected = torch.empty(2, 3 * 96)
    expected[:, :96] = tokens[0][:, 0]
    expected[:, 96::2], expected[:, 97::2] = tokens[1][:, 0], tokens[1][:, 1:].mean(1)  # as in eval_linear.py:175
    torch.testing.assert_close(block_features(backbone, 2, True, pixels), expected)
    torch.testing.assert_close(block_features(backbone, 1, False, pixels), backbone(pixels))
    assert block_features(backbone, 4, False, pixels).shape == (2, 3 * 96)  # it has only three blocks
    for blocks, avgpool in ((1, True), (2, False), (4, True)):
        assert block_features(backbone, blocks, avgpool, pixels).shape == (2, n_features(backbone, blocks, avgpool))


def test_command_finds_colors_and_reports_every_rate(words, capsys):
    found = evaluate(capsys, *words, "--epochs", 20, "--lrs", 1e-6, 0.1, 1e9)
    assert [rate["lr"] for rate in found["rates"]] == [1e-6, 0.1, 1e9]
    assert found["best"]["lr"] == 0.1 and found["best"]["top1"] > 90 and found["best"]["top5"] == 100
    assert found["rates"][0]["top1"] < found["best"]["top1"]
    assert evaluate(capsys, *words, "--epochs", 20, "--lrs", 1e-6, 0.1, 1e9) == found  # from the cache, bitwise


def test_one_rate_alone_equals_the_same_rate_in_a_grid(words, capsys):
    grid = evaluate(capsys, *words, "--epochs", 5)["rates"]
    assert len(grid) == 16
    alone = evaluate(capsys, *words, "--epochs", 5, "--lrs", grid[10]["lr"])
    assert alone["rates"] == [grid[10]]


def test_the_reference_protocol_has_one_rate_and_random_crops(words, capsys):
    found = evaluate(capsys, *words, "--epochs", 3, "--reference")
    assert [rate["lr"] for rate in found["rates"]] == [0.001]
    found = evaluate(capsys, *words, "--epochs", 15, "--reference", "--lrs", 0.3)
    assert found["best"]["top1"] > 80


def test_the_reference_protocol_is_resumed_bitwise(words, tmp_path, capsys, monkeypatch):
    words = [*words, "--reference", "--epochs", 6, "--lrs", 0.1]
    whole = evaluate(capsys, *words)
    (kept,) = (tmp_path / "run/features").glob("linear-*.pt")
    expected = checkpoint.load(kept)
    kept.unlink()
    step, calls = Probes.step, []

    def stopping(self, x, labels, factor):
        calls.append(factor)
        if len(calls) == 15:  # in the fourth epoch of four steps
            raise KeyboardInterrupt
        return step(self, x, labels, factor)

    monkeypatch.setattr(Probes, "step", stopping)
    assert main(["evaluate", *map(str, words), "--num-workers", "1"]) == 130
    assert checkpoint.load(kept)["epochs"] == 3
    assert evaluate(capsys, *words) == whole and len(calls) == 15 + 12
    found = checkpoint.load(kept)
    assert found["epochs"] == 6 and found["weight"].equal(expected["weight"])
    assert evaluate(capsys, *words) == whole and len(calls) == 15 + 12  # already complete
    kept.write_bytes(kept.read_bytes()[:500])
    assert evaluate(capsys, *words) == whole and len(calls) == 15 + 12 + 24  # damaged: starts again
    evaluate(capsys, *words, "--seed", 1)  # other options do not resume from it
    assert len(calls) == 15 + 12 + 24 + 24


def test_published_classifiers_are_evaluated_without_training(tmp_path, capsys):
    """The layout for vit_base: one block and the mean patch token, with interleaved channels."""
    data = colored_classes(tmp_path / "data")
    torch.manual_seed(0)
    backbone = vit("vit_nano", patch_size=8, img_size=16).eval()
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    images = ImageFolder(data / "val")
    pixels = torch.stack([eval_transform(images.load(i), 16) for i in range(len(images))])
    tokens = backbone.features(pixels)[0].detach()
    x = torch.cat((tokens[:, 0].unsqueeze(-1), tokens[:, 1:].mean(1).unsqueeze(-1)), -1).reshape(len(pixels), -1)
    weight, bias = torch.randn(3, 2 * 96), torch.randn(3)
    expected = 100 * ((x @ weight.T + bias).argmax(1) == torch.tensor(images.labels)).double().mean().item()
    path = tmp_path / "linearweights.pth"
    torch.save({"epoch": 100, "state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}, path)
    words = ["linear", "--checkpoint", tmp_path / "backbone.pth", "--linear-weights", path, "--n-last-blocks", 1]
    words += ["--avgpool-patchtokens", "true", "--data"]
    found = evaluate(capsys, *words, data)
    assert found["top1"] == pytest.approx(expected) and 0 < expected < 100
    assert found["val"] == 15 and found["top5"] == 100
    assert evaluate(capsys, *words, data / "val") == found  # the training images are not needed
    shutil.rmtree(data / "train")
    assert evaluate(capsys, *words, data) == found
    shutil.rmtree(data / "val/red")
    error = error_of(capsys, *words, data)
    assert "has 3 classes and 192 features" in error and "has 2 class folders and vit_nano gives 192" in error
    assert "vit_nano gives 96" in error_of(capsys, *words[:-3], "--data", data)


def test_accuracies_of_many_probes():
    g = torch.Generator().manual_seed(0)
    probes = Probes(6, 8, [0.1, 1.0, 10.0], seed=0, device=torch.device("cpu"))
    x, labels = torch.randn(2500, 6, generator=g), torch.randint(0, 8, (2500,), generator=g)
    for rows in torch.arange(2500).split(100):
        probes.step(x[rows], labels[rows], 1.0)
    scores = probes.scores(x).detach()
    for i, values in enumerate(probes.accuracies(x, labels)):
        best = scores[:, i].topk(5).indices
        assert values["top1"] == pytest.approx(100 * (best[:, 0] == labels).double().mean().item())
        assert values["top5"] == pytest.approx(100 * (best == labels[:, None]).any(1).double().mean().item())


def test_bad_options_are_reported(words, capsys):
    for lr in (0, "nan", "inf"):
        assert "lrs must be above 0" in error_of(capsys, *words, "--lrs", 0.1, lr)
    assert "fewer than one batch of 99" in error_of(capsys, *words, "--reference", "--batch-size", 99)
    assert "epochs" in error_of(capsys, *words, "--epochs", 0)


def test_random_crops_depend_only_on_the_key(tmp_path):
    images = ImageFolder(colored_classes(tmp_path, train=4) / "train")
    (tmp_path / "train/blue/1.png").write_bytes(b"")

    def read(workers, start):
        loader = training_loader(images, 8, 5, workers, seed=1, start_step=start, total_steps=6)
        return [(pixels, labels, indices, bad) for pixels, labels, indices, bad in loader]

    whole, resumed = read(1, 0), read(2, 2)
    for a, b in zip(whole[2:], resumed, strict=True):
        assert all(x.equal(y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3] == b[3]
    assert sum(len(indices) for _, _, indices, _ in whole) == 30 - sum(len(bad) for *_, bad in whole)
    for _, labels, indices, bad in whole:
        assert labels.tolist() == [images.labels[i] for i in indices]
        assert all(name.endswith("blue/1.png") for name, _ in bad)


def test_distribution_of_random_crops():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1))).convert("RGB")
    crop = RandomCrop(32, 0, PixelScale())
    rows = np.stack([(crop(ramp, (0, i))[0, 16] * 0.229 + 0.485).numpy() * 255 for i in range(400)])
    slopes = rows[:, -1] - rows[:, 0]
    assert 0.4 < (slopes < 0).mean() < 0.6  # horizontal flips
    area = (np.abs(slopes) + np.abs(slopes) / 31) / 200
    assert area.min() > 0.1 and area.max() > 0.85 and rows.min() < 15 and rows.max() > 185
