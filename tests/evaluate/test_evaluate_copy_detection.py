import numpy as np
import pytest
import torch
from dino_train.common.views import to_tensor
from dino_train.evaluate.copy_detection import Whitening, block_precisions, class_and_gem
from dino_train.evaluate.features import Features
from dino_train.models.vit import vit
from dino_train.models.weights import load_trained
from PIL import Image
from tiny_run import error_of, evaluate, tiny_checkpoint
from torch.nn import functional as F

STRONG = ("200001.jpg", "200002.jpg", "200201.jpg", "200301.jpg")


@pytest.fixture
def copydays(tmp_path):
    """Four originals and their copies, in the folder layout of Copydays."""
    rng = np.random.default_rng(0)
    root = tmp_path / "copydays"
    originals = {}
    for i in range(4):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        originals[f"{2000 + i}00.jpg"] = small.resize((80, 60), Image.Resampling.BICUBIC)
    for folder in ("original", "strong", "jpegqual/3", "jpegqual/75", "crops/50"):
        (root / folder).mkdir(parents=True)
    for name, image in originals.items():
        image.save(root / "original" / name, quality=95)
        image.save(root / "jpegqual/3" / name, quality=3)
        image.save(root / "jpegqual/75" / name, quality=75)
        image.crop((10, 10, 70, 50)).save(root / "crops/50" / name, quality=95)
    for name in STRONG:
        noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
        Image.blend(originals[name[:4] + "00.jpg"], noise, 0.8).save(root / "strong" / name, quality=95)
    return root


def direct_features(backbone, path):
    with torch.no_grad():
        pixels = to_tensor(Image.open(path).resize((16, 16), Image.Resampling.BICUBIC))[None]
        tokens = backbone.features(pixels)[0][0].double()
        gem = (tokens[1:].clamp(min=1e-6) ** 4).mean(0) ** 0.25
        return torch.cat((tokens[0], gem))


def test_command_equals_a_plain_loop(copydays, tmp_path, capsys):
    run = tiny_checkpoint(tmp_path / "run")
    words = ["copy-detection", "--checkpoint", run, "--data", copydays, "--image-size", 16]
    found = evaluate(capsys, *words)
    assert found["originals"] == 4 and found["queries"] == 16
    backbone = load_trained(run).backbone
    names = sorted(path.name for path in (copydays / "original").iterdir())
    database = F.normalize(torch.stack([direct_features(backbone, copydays / "original" / n) for n in names]), dim=1)
    for block in ("strong", "jpegqual/3", "jpegqual/75", "crops/50"):
        values = []
        for path in sorted((copydays / block).iterdir()):
            similarity = database @ F.normalize(direct_features(backbone, path), dim=0)
            place = similarity.argsort(descending=True).tolist().index(names.index(path.name[:4] + "00.jpg"))
            values.append(((place == 0) + 1 / (place + 1)) / 2)
        assert found["mAP"][block] == pytest.approx(np.mean(values)), block
    assert list(found["mAP"]) == ["crops/50", "jpegqual/3", "jpegqual/75", "strong"]
    assert found["mAP"]["jpegqual/75"] == 1


def test_distractors_and_whitening(copydays, tmp_path, capsys):
    words = ["copy-detection", "--checkpoint", tiny_checkpoint(tmp_path / "run"), "--data", copydays]
    words += ["--image-size", 16]
    plain = evaluate(capsys, *words)["mAP"]
    copies = tmp_path / "copies"  # the strong copies: each is ranked before its original
    copies.mkdir()
    for path in (copydays / "strong").iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    found = evaluate(capsys, *words, "--distractors", copies)
    assert found["distractors"] == 4 and found["mAP"]["strong"] <= 0.25 < plain["strong"]
    found = evaluate(capsys, *words, "--whitening", copydays / "original")
    assert found["whitened"] and all(0 < value <= 1 for value in found["mAP"].values())


def test_precisions_by_hand():
    axes = torch.eye(3)
    database = Features(axes, torch.zeros(3), ["original/2000.jpg", "original/2001.jpg", "2000_other.jpg"], [])
    queries = Features(
        torch.tensor([[1.0, 0.5, 0], [0.9, 0.8, 0], [0.2, 0.1, 0.5]]),
        torch.zeros(3),
        ["a/2000.jpg", "a/2001.jpg", "b/2001.jpg"],
        [],
    )
    # Retrieved at rank 1, 2 (area (0 + 1/2) / 2) and 3 ((0 + 1/3) / 2).
    expected = {"a": (1 + 1 / 4) / 2, "b": 1 / 6}
    assert block_precisions(database, queries) == pytest.approx(expected)


def test_only_the_first_twenty_results_are_evaluated():
    paths = [f"more/{i}.jpg" for i in range(20)] + ["original/2000.jpg"]
    values = torch.linspace(1, 0.1, 21)[:, None]
    database = Features(values, torch.zeros(21), paths, [])
    query = Features(torch.ones(1, 1), torch.zeros(1), ["a/2000.jpg"], [])
    assert block_precisions(database, query) == {"a": 0.0}


def test_whitening_gives_unit_variances():
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(5000, 6, generator=g) @ torch.randn(6, 6, generator=g)
    white = Whitening(mixed - mixed.mean(0))(mixed)
    torch.testing.assert_close(white.T.cov(correction=0), torch.eye(6), rtol=0, atol=1e-3)
    flat = mixed.clone()
    flat[:, 3] = flat[:, 2]  # a direction without variance is not amplified
    assert Whitening(flat - flat.mean(0))(flat).abs().max() < 30


def test_whitened_products_are_mahalanobis_products():
    """Computed with a linear solve instead of a rotation: x, y -> (x - mean)' (second moment)^-1 (y - mean)."""
    g = torch.Generator().manual_seed(0)
    learned = torch.randn(200, 6, generator=g) @ torch.randn(6, 6, generator=g) + 3
    x = torch.randn(5, 6, generator=g)
    white = Whitening(learned)(x).double()
    away, moment = x.double() - learned.double().mean(0), learned.double().T @ learned.double() / 200
    torch.testing.assert_close(white @ white.T, away @ torch.linalg.solve(moment, away.T), rtol=1e-4, atol=1e-4)


def test_class_and_gem():
    torch.manual_seed(0)
    backbone = vit("vit_nano", patch_size=8, img_size=16).eval()
    pixels = torch.randn(3, 3, 16, 24)
    found = class_and_gem(backbone, pixels)
    tokens = backbone.features(pixels)[0].detach()
    torch.testing.assert_close(found[:, :96], tokens[:, 0])
    torch.testing.assert_close(found[:, 96:], (tokens[:, 1:].clamp(min=1e-6) ** 4).mean(1) ** 0.25)


def test_wrong_folders_are_reported(copydays, tmp_path, capsys):
    words = ["copy-detection", "--checkpoint", tiny_checkpoint(tmp_path / "run"), "--data", copydays]
    (copydays / "original/200000.jpg").rename(copydays / "original/300000.jpg")
    assert "crops/50/200000.jpg has no original: expected original/2000*.jpg" in error_of(capsys, *words)
    assert "image_size must be at least 1, got 0" in error_of(capsys, *words, "--image-size", 0)
    (copydays / "original").rename(copydays / "originals")
    expected = "expected Copydays' original/ and at least one of strong/"
    assert f"holds crops/, jpegqual/, originals/, strong/: {expected}" in error_of(capsys, *words)
    words[-1] = copydays / "strong"
    assert f"holds no two folders of images: {expected}" in error_of(capsys, *words)
