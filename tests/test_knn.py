import numpy as np
import pytest
import torch
from dino_train.augment import MultiCrop
from dino_train.data import BadImages, ImageFolder
from dino_train.evaluate import knn
from dino_train.evaluate.knn import extract_features, knn_accuracy, knn_top, nearest, recall_at_1, view_retrieval, vote
from PIL import Image
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


def test_knn_by_blocks_against_a_loop(monkeypatch):
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
            ranked.append(np.sum(votes >= votes[label]) - 1)  # classes without a vote are never right
        assert found[k]["top1"] == pytest.approx(100 * np.mean(np.array(ranked) < 1))
        assert found[k]["top5"] == pytest.approx(100 * np.mean(np.array(ranked) < 5))


def test_recall_by_hand():
    a = unit([1, 0], [0, 1], [-1, 0], [1, 1])
    assert recall_at_1(a, a) == 100
    assert recall_at_1(a, a[[1, 0, 2, 3]]) == 50


class MeanColor(nn.Module):
    """A backbone whose features are known: the mean color of the image, undone normalization."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.229, 0.224, 0.225]).view(1, 3))
        self.shift = nn.Parameter(torch.tensor([0.485, 0.456, 0.406]).view(1, 3))

    def forward(self, images):
        assert not self.training
        return images.mean(dim=(2, 3)) * self.scale + self.shift


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 5)):
        for name, color in {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}.items():
            for i in range(count):
                pixels = np.clip(rng.normal(color, 20, (40, 50, 3)), 0, 255).astype(np.uint8)
                path = tmp_path / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
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


def test_knn_without_labels_says_what_it_needs(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    images = ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="put each class's images in a folder of its own"):
        knn_accuracy(MeanColor(), images, images, 8)


def test_view_retrieval_is_perfect_for_constant_colors_and_chance_for_one_color(tmp_path):
    crops = MultiCrop(local_crops_number=0, global_crops_size=16)
    colors = np.random.default_rng(1).integers(0, 256, (40, 3))
    for folder, pick in (("many", lambda i: colors[i]), ("one", lambda i: colors[0])):
        (tmp_path / folder).mkdir()
        for i in range(40):
            Image.new("RGB", (20, 20), tuple(int(c) for c in pick(i))).save(tmp_path / folder / f"{i:02d}.png")

    many, one = (ImageFolder(tmp_path / name) for name in ("many", "one"))
    recalls = [view_retrieval(MeanColor(), many, BadImages(40, 0), crops, seed=seed) for seed in (0, 0)]
    assert recalls[0] == recalls[1] >= 20  # color jitter moves colors, chance is 2.5
    assert view_retrieval(MeanColor(), one, BadImages(40, 0), crops, seed=0) <= 15
