import numpy as np
import pytest
import torch
from dino_train.data import ImageFolder
from dino_train.evaluate.images import RandomCrop, training_loader
from dino_train.evaluate.linear import Probes, block_features
from dino_train.model import vit
from PIL import Image
from tiny_run import colored_classes, error_of, evaluate, tiny_checkpoint
from torch import nn


@pytest.fixture
def words(tmp_path):
    data = colored_classes(tmp_path / "data")
    return ["linear", "--checkpoint", tiny_checkpoint(tmp_path / "run"), "--data", data, "--batch-size", "8"]


def test_probes_train_as_layers_of_their_own_under_sgd():
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


def test_block_features_are_class_tokens_of_the_last_blocks_and_mean_patches():
    torch.manual_seed(0)
    backbone = vit("vit_nano", patch_size=8, img_size=16).eval()
    pixels = torch.randn(2, 3, 16, 16)
    tokens = backbone.features(pixels, 2)
    expected = torch.cat((tokens[0][:, 0], tokens[1][:, 0], tokens[1][:, 1:].mean(1)), 1)
    torch.testing.assert_close(block_features(backbone, 2, True, pixels), expected)
    torch.testing.assert_close(block_features(backbone, 1, False, pixels), backbone(pixels))
    assert block_features(backbone, 4, False, pixels).shape == (2, 3 * 96)  # it has three


def test_command_finds_colors_and_reports_every_rate(words, capsys):
    found = evaluate(capsys, *words, "--epochs", 20, "--lrs", 1e-6, 0.1, 1e9)
    assert [rate["lr"] for rate in found["rates"]] == [1e-6, 0.1, 1e9]
    assert found["best"]["lr"] == 0.1 and found["best"]["top1"] > 90 and found["best"]["top5"] == 100
    assert found["rates"][0]["top1"] < found["best"]["top1"]
    assert evaluate(capsys, *words, "--epochs", 20, "--lrs", 1e-6, 0.1, 1e9) == found  # from the cache, bit for bit


def test_one_rate_gives_the_same_alone_as_in_a_grid(words, capsys):
    grid = evaluate(capsys, *words, "--epochs", 5)["rates"]
    assert len(grid) == 16
    alone = evaluate(capsys, *words, "--epochs", 5, "--lrs", grid[10]["lr"])
    assert alone["rates"] == [grid[10]]


def test_the_references_protocol_has_one_rate_and_random_crops(words, capsys):
    found = evaluate(capsys, *words, "--epochs", 3, "--reference")
    assert [rate["lr"] for rate in found["rates"]] == [0.001]
    found = evaluate(capsys, *words, "--epochs", 15, "--reference", "--lrs", 0.3)
    assert found["best"]["top1"] > 80


def test_bad_settings_are_named(words, capsys):
    assert "lrs must be above 0" in error_of(capsys, *words, "--lrs", 0)
    assert "epochs" in error_of(capsys, *words, "--epochs", 0)


def test_random_crops_depend_on_the_key_alone(tmp_path):
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


def test_random_crops_cover_what_they_should():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1))).convert("RGB")
    crop = RandomCrop(32, seed=0)
    rows = np.stack([(crop(ramp, (0, i))[0, 16] * 0.229 + 0.485).numpy() * 255 for i in range(400)])
    slopes = rows[:, -1] - rows[:, 0]
    assert 0.4 < (slopes < 0).mean() < 0.6  # mirrored
    area = (np.abs(slopes) + np.abs(slopes) / 31) / 200
    assert area.min() > 0.1 and area.max() > 0.85 and rows.min() < 15 and rows.max() > 185
