import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dino_train.cli import main
from dino_train.common.views import eval_transform
from dino_train.config.pretrain import PretrainConfig
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import BadImages
from dino_train.evaluate import features, knn
from dino_train.evaluate.features import Features, extract, weights_digest
from dino_train.evaluate.knn import extract_features, knn_accuracy, knn_top, nearest, recall_at_1, view_retrieval, vote
from dino_train.evaluate.metrics import accuracy, label_ranks
from dino_train.models.resnet import resnet50
from dino_train.models.vit import vit
from dino_train.models.weights import load_trained
from PIL import Image
from tiny_run import colored_classes, error_of, evaluate, tiny_checkpoint
from torch import nn


def unit(*rows):
    return nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_votes_by_hand():
    train = unit([1, 0], [0.8, 0.6], [0, 1])
    labels = torch.tensor([0, 1, 1])
    similarity, rows = nearest(train, unit([1, 0]), 2)
    torch.testing.assert_close(similarity, torch.tensor([[1.0, 0.8]]))
    assert rows.tolist() == [[0, 1]]
    expected = torch.tensor([[np.exp(1 / 0.07), np.exp(0.8 / 0.07), 0.0]], dtype=torch.float32)
    torch.testing.assert_close(vote(similarity, labels[rows], classes=3), expected)
    similarity, rows = nearest(train, unit([0, 1]), 3)
    expected = torch.tensor([[1.0, np.exp(0.6 / 0.07) + np.exp(1 / 0.07)]], dtype=torch.float32)
    torch.testing.assert_close(vote(similarity, labels[rows], classes=2), expected)


def test_blockwise_knn_equals_a_plain_loop(monkeypatch):
    monkeypatch.setattr(knn, "TRAIN_BLOCK", 23)  # the last block is smaller than k
    monkeypatch.setattr(knn, "QUERY_BLOCK", 17)
    g = torch.Generator().manual_seed(0)
    train = nn.functional.normalize(torch.randn(95, 5, generator=g), dim=1)
    test = nn.functional.normalize(torch.randn(70, 5, generator=g), dim=1)
    labels, test_labels = torch.randint(0, 9, (95,), generator=g), torch.randint(0, 9, (70,), generator=g)
    found = knn_top(train, labels, test, test_labels, ks=(7, 30, 1000), classes=9)
    for k in (7, 30, 1000):
        ranked = []
        for row, label in zip(test.double(), test_labels, strict=True):
            similarity = (train.double() @ row).numpy()
            votes = np.zeros(9)
            for i in np.argsort(-similarity)[:k]:
                votes[labels[i]] += np.exp(similarity[i] / 0.07)
            ranked.append(np.sum(votes >= votes[label]) - 1)  # classes without votes are never predicted
        assert found[k]["top1"] == pytest.approx(100 * np.mean(np.array(ranked) < 1))
        assert found[k]["top5"] == pytest.approx(100 * np.mean(np.array(ranked) < 5))


def test_knn_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    g = torch.Generator().manual_seed(0)
    labels, test_labels = torch.randint(0, 9, (300,), generator=g), torch.randint(0, 9, (200,), generator=g)
    centers = torch.randn(9, 16, generator=g)
    train = nn.functional.normalize(centers[labels] + 1.5 * torch.randn(300, 16, generator=g), dim=1)
    test = nn.functional.normalize(centers[test_labels] + 1.5 * torch.randn(200, 16, generator=g), dim=1)
    found = knn_top(train, labels, test, test_labels, ks=(5, 40), classes=9)
    for k in (5, 40):
        # For vectors of norm 1, the squared distance is 2 - 2 cosine.
        weighted = neighbors.KNeighborsClassifier(k, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07))
        expected = 100 * weighted.fit(train.numpy(), labels.numpy()).score(test.numpy(), test_labels.numpy())
        assert found[k]["top1"] == pytest.approx(expected) and 40 < expected < 95


def test_recall_by_hand():
    a = unit([1, 0], [0, 1], [-1, 0], [1, 1])
    assert recall_at_1(a, a) == 100
    assert recall_at_1(a, a[[1, 0, 2, 3]]) == 50


class MeanColor(nn.Module):
    """A backbone with known features: the mean color of the image before normalization."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.229, 0.224, 0.225]).view(1, 3))
        self.shift = nn.Parameter(torch.tensor([0.485, 0.456, 0.406]).view(1, 3))

    def forward(self, images):
        assert not self.training
        return images.mean(dim=(2, 3)) * self.scale + self.shift


@pytest.fixture
def folders(tmp_path):
    colored_classes(tmp_path)
    return ImageFolder(tmp_path / "train"), ImageFolder(tmp_path / "val")


def test_features_and_knn_of_a_known_backbone(folders, tmp_path):
    train, val = folders
    (tmp_path / "val/red/0.png").write_bytes(b"")
    backbone = MeanColor().train()
    bad = BadImages(15, 0)
    features, labels = extract_features(backbone, val, bad, 16, batch_size=4)
    assert backbone.training and bad.count == 1
    assert features.shape == (14, 3) and labels.tolist() == [0] * 5 + [1] * 5 + [2] * 4
    red = nn.functional.normalize(torch.tensor([[200.0, 30, 30]]), dim=1)
    torch.testing.assert_close(features[10:], red.expand(4, 3), rtol=0, atol=0.02)
    assert knn_accuracy(backbone, train, val, 16, ks=(5,)) == {"knn5": 100.0}


def test_knn_without_labels_is_an_error(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    images = ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="a folder for each of two classes or more.*a.png is in none"):
        knn_accuracy(MeanColor(), images, images, 8)


def test_view_retrieval_is_perfect_for_constant_colors_and_chance_for_one_color(tmp_path):
    crops = PretrainConfig(global_crops_size=16).crop_kinds[:2]
    colors = np.random.default_rng(1).integers(0, 256, (40, 3))
    for folder, pick in (("many", lambda i: colors[i]), ("one", lambda i: colors[0])):
        (tmp_path / folder).mkdir()
        for i in range(40):
            Image.new("RGB", (20, 20), tuple(int(c) for c in pick(i))).save(tmp_path / folder / f"{i:02d}.png")

    many, one = (ImageFolder(tmp_path / name) for name in ("many", "one"))
    recalls = [view_retrieval(MeanColor(), many, BadImages(40, 0), crops, seed=seed) for seed in (0, 0)]
    assert recalls[0] == recalls[1] >= (20, 40)  # color jitter moves colors, chance is 2.5
    assert view_retrieval(MeanColor(), one, BadImages(40, 0), crops, seed=0)[0] <= 15


def test_accuracy_by_hand():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1]])
    ranks = label_ranks(scores, torch.tensor([0, 0, 5]))
    assert ranks.tolist() == [1, 6, 1] and accuracy(ranks) == {"top1": 200 / 3, "top5": 200 / 3}
    ranks = label_ranks(scores, torch.tensor([4, 5, 0]))
    assert ranks.tolist() == [5, 1, 6] and accuracy(ranks) == {"top1": 100 / 3, "top5": 200 / 3}
    assert label_ranks(scores * torch.nan, torch.tensor([0, 0, 0])).tolist() == [6, 6, 6]


def test_accuracy_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(500, 40, generator=g), torch.randint(0, 40, (500,), generator=g)
    for k in (1, 5):
        expected = metrics.top_k_accuracy_score(labels.numpy(), scores.numpy(), k=k, labels=range(40))
        assert accuracy(label_ranks(scores, labels))[f"top{k}"] == pytest.approx(100 * expected)


@pytest.fixture
def setting(tmp_path):
    return tiny_checkpoint(tmp_path / "run"), colored_classes(tmp_path / "data")


def test_command_equals_the_accuracy_during_pretraining(setting, capsys):
    run, data = setting
    found = evaluate(capsys, "knn", "--checkpoint", run, "--data", data, "--nb-knn", 3, 20, 500)
    train, val = ImageFolder(data / "train"), ImageFolder(data / "val")
    assert found["train"] == 36 and found["val"] == 15
    expected = knn_accuracy(load_trained(run).backbone, train, val, 16, ks=(3, 20, 500))
    assert {k: found[k]["top1"] for k in expected} == pytest.approx(expected)
    assert found["knn3"]["top1"] > 60 and found["knn500"]["top5"] == 100


def test_a_second_call_uses_the_cached_features_unless_something_changed(setting, capsys, monkeypatch):
    run, data = setting
    words = ["knn", "--checkpoint", run, "--data", data]
    extracted = []

    def counting(*arguments):
        extracted.append(arguments[-1])
        return extract(*arguments)

    monkeypatch.setattr(features, "extract", counting)
    first = evaluate(capsys, *words)
    assert extracted == ["training", "held-out"] and len(list((run / "features").iterdir())) == 2
    assert evaluate(capsys, *words) == first and len(extracted) == 2
    evaluate(capsys, *words, "--image-size", 24)
    assert len(extracted) == 4
    Image.new("RGB", (9, 9)).save(data / "val/red/0.png")
    evaluate(capsys, *words)
    assert extracted[4:] == ["held-out"]
    tiny_checkpoint(run, seed=1)
    evaluate(capsys, *words)
    assert len(extracted) == 7
    for path in (run / "features").iterdir():  # a truncated file is written again
        path.write_bytes(path.read_bytes()[:100])
    evaluate(capsys, *words)
    assert len(extracted) == 9 and not list((run / "features").glob("*.tmp"))


def test_unreadable_images_are_reported_also_with_cached_features(setting, capsys, caplog):
    run, data = setting
    (data / "train/red/3.png").write_bytes(b"")
    words = ["knn", "--checkpoint", run, "--data", data, "--nb-knn", 36]
    first = evaluate(capsys, *words)
    assert "skipped unreadable image train/red/3.png: empty file" in caplog.text
    caplog.clear()
    assert evaluate(capsys, *words) == first and first["train"] == 35
    assert "skipped unreadable image train/red/3.png: empty file" in caplog.text
    assert "1 of 36 images could not be read (training)" in caplog.text
    assert "there are only 35 training images: larger k use all of them" in caplog.text


def test_images_that_can_be_read_again_are_not_left_out(setting, capsys, monkeypatch):
    run, data = setting
    words = ["knn", "--checkpoint", run, "--data", data, "--nb-knn", 35]
    read = Path.read_bytes

    def refused(path):
        if path.name == "3.png" and path.parent.name == "red" and "train" in path.parts:
            raise PermissionError(13, "Permission denied")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        assert evaluate(capsys, *words)["train"] == evaluate(capsys, *words)["train"] == 35
    assert evaluate(capsys, *words)["train"] == 36


def test_the_number_of_heads_is_part_of_what_features_are_cached_by():
    six, twelve = vit("vit_small", img_size=32), vit("vit_small_12heads", img_size=32)
    twelve.load_state_dict(six.state_dict())
    assert weights_digest(six) != weights_digest(twelve)


def test_the_images_of_the_run_are_the_default(setting, capsys, caplog):
    run, data = setting
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save(state | {"args": state["args"] | {"data": str(data)}}, run / "last.pt")
    assert evaluate(capsys, "knn", "--checkpoint", run)["train"] == 36
    assert f"images: {data} (--data takes others)" in caplog.text


def test_progress_bars_have_a_total(setting, capsys, monkeypatch, tmp_path):
    run, data = setting
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def bars(*words):
        assert main(["evaluate", *map(str, words), "--checkpoint", str(run), "--data", str(data)]) == 0
        return set(re.findall(r"\r([a-z-]+): .*?\d+/(\d+) \[", capsys.readouterr().err))

    assert bars("knn") == {("training", "36"), ("held-out", "15"), ("neighbors", "1")}
    words = ["--epochs", 2, "--batch-size", 9]
    assert bars("linear", *words) == {("training", "36"), ("held-out", "15"), ("linear", "2")}
    assert bars("linear", "--reference", *words) == {("linear", "8")}
    assert bars("finetune", *words, "--output-dir", tmp_path / "out") == {("finetune", "8"), ("held-out", "15")}
    assert bars("attention", "--output-dir", tmp_path / "maps") == {("attention", "51")}


def test_bfloat16_features_are_close_and_cached_separately(setting, capsys, tmp_path):
    run, data = setting
    words = ["knn", "--checkpoint", run, "--data", data, "--dump-features"]
    evaluate(capsys, *words, tmp_path / "exact")
    evaluate(capsys, *words, tmp_path / "low", "--precision", "bfloat16")
    assert len(list((run / "features").iterdir())) == 4
    exact, low = (Features.load(tmp_path / name / "val.safetensors").values for name in ("exact", "low"))
    assert not torch.equal(exact, low)
    assert torch.cosine_similarity(exact, low).min() > 0.9995
    resnet = tmp_path / "resnet.pth"
    torch.save(resnet50().state_dict(), resnet)
    words = ["knn", "--checkpoint", resnet, "--data", data, "--precision", "bfloat16"]
    assert main(["evaluate", *map(str, words)]) == 1
    assert "precision bfloat16 is for ViTs that can be trained, resnet50 takes float32 only" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_only_a_warning(setting, capsys):
    run, data = setting
    (run / "features").write_text("a file in the way")
    assert evaluate(capsys, "knn", "--checkpoint", run, "--data", data)["val"] == 15


def test_dumped_features_equal_those_of_the_images_and_can_be_loaded(setting, capsys, tmp_path):
    run, data = setting
    (data / "val/red/3.png").write_bytes(b"")
    dump = tmp_path / "dump"
    first = evaluate(capsys, "knn", "--checkpoint", run, "--data", data, "--dump-features", dump)
    val = Features.load(dump / "val.safetensors")
    assert val.classes == ["blue", "green", "red"] and len(val.paths) == 14 and "red/3.png" not in val.paths
    backbone = load_trained(run).backbone
    for path, value, label in zip(val.paths, val.values, val.labels, strict=True):
        image = eval_transform(Image.open(data / "val" / path), 16)
        torch.testing.assert_close(value, backbone(image[None])[0].detach(), rtol=1e-3, atol=1e-4)
        assert val.classes[label] == path.partition("/")[0]
    assert evaluate(capsys, "knn", "--load-features", dump) == first
    val.labels[0] = 3
    val.save(dump / "val.safetensors")
    assert "are not labelled features of one backbone" in error_of(capsys, "knn", "--load-features", dump)
    assert "no features at" in error_of(capsys, "knn", "--load-features", tmp_path)
    (dump / "val.safetensors").write_bytes(b"junk")
    assert "damaged or not a safetensors file" in error_of(capsys, "knn", "--load-features", dump)


def test_errors_in_the_data_are_reported(setting, capsys, tmp_path):
    run, data = setting
    words = ["knn", "--checkpoint", run, "--data"]
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(30):
        Image.new("RGB", (9, 9)).save(flat / f"{i}.png")
    assert "a folder for each of two classes or more, train/<class>/ and val/<class>/; " in (
        error := error_of(capsys, *words, flat)
    )
    assert "0.png is in none" in error
    assert "no such folder" in error_of(capsys, *words, tmp_path / "nowhere")
    few = colored_classes(tmp_path / "few", train=4, val=0) / "train"
    assert "no held-out image" in error_of(capsys, *words, few)
    assert "has train/ but no val/: expected both" in error_of(capsys, *words, few.parent)
    few.rename(few.with_name("val"))
    assert "has val/ but no train/: expected both" in error_of(capsys, *words, few.parent)
    one = colored_classes(tmp_path / "one", classes=("red",))
    assert "two classes or more, train/<class>/ and val/<class>/; there is only one" in error_of(capsys, *words, one)
    odd = colored_classes(tmp_path / "odd")
    (odd / "val/red").rename(odd / "val/rouge")
    assert "has val/rouge/ but no image in train/rouge/ (1 such classes)" in error_of(capsys, *words, odd)
    shutil.make_archive(str(tmp_path / "few"), "tar", few.parents[1], "few/val")
    assert "few.tar has val/ but no train/: expected both" in error_of(capsys, *words, tmp_path / "few.tar")
    assert "batch_size and image_size must be at least 1" in error_of(capsys, *words, data, "--image-size", 0)
    assert "pass either --checkpoint" in error_of(capsys, "knn")
    assert "nb_knn must be" in error_of(capsys, *words, data, "--nb-knn", 0)
    for path in (data / "val").rglob("*.png"):
        path.write_bytes(b"")
    assert "none of 15 images" in " ".join(run_lines(capsys, *words, data))


def run_lines(capsys, *words):
    assert main(["evaluate", *map(str, words), "--num-workers", "1"]) == 1
    return capsys.readouterr().err.splitlines()
