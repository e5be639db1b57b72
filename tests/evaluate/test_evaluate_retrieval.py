import os
import pickle

import numpy as np
import pytest
import torch
from dino_train.common.views import to_tensor
from dino_train.evaluate.metrics import average_precision, mean_average_precision
from dino_train.evaluate.retrieval import load_ground_truth, multi_scale, shrink
from dino_train.models.weights import load_trained
from PIL import Image
from tiny_run import error_of, evaluate, tiny_checkpoint
from torch.nn import functional as F

PLACES = ("all_souls", "bodleian", "radcliffe")


def test_average_precision_by_hand():
    assert average_precision([0, 1], 2) == 1
    assert average_precision([1], 1) == pytest.approx((0 + 1 / 2) / 2)
    assert average_precision([0, 2], 2) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert average_precision([0], 2) == 0.5  # the other was not retrieved
    assert average_precision([], 3) == 0


def test_average_precision_equals_the_trapezoidal_area_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for n in (5, 50, 300):
        right, scores = rng.random(n) < 0.2, rng.permutation(n)
        right[0] = True
        precision, recall, _ = metrics.precision_recall_curve(right, scores, drop_intermediate=False)
        places = np.flatnonzero(right[np.argsort(-scores)])
        assert average_precision(places, right.sum()) == pytest.approx(metrics.auc(recall, precision))


def test_mean_average_precision_by_hand():
    ranks = np.array([[3, 0, 1, 2, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]])
    positives = [np.array([0, 2]), np.array([0]), np.array([], int)]
    passed = [np.array([3]), np.array([4, 2]), np.array([0])]
    # First query: 3 is ignored, so ranks 0 and 2. Second: 3, 1, 0, so rank 2. The third has no positive.
    found = mean_average_precision(ranks, positives, passed, (1, 5))
    second = (0 + 1 / 3) / 2
    assert found["mAP"] == pytest.approx(100 * (0.7916666667 + second) / 2)
    assert found["mP@1"] == pytest.approx(50)
    assert found["mP@5"] == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)  # both at the rank of their last positive, 3
    assert mean_average_precision(ranks[2:], positives[2:], passed[2:], (1,)) == {}
    both = mean_average_precision(ranks[:1], positives[:1], [np.array([0, 2, 3])], (1,))
    assert both["mAP"] == pytest.approx(79.16666667)  # an image annotated as both is a positive


@pytest.fixture
def oxford(tmp_path):
    """Twelve database images of three places and one query per place, in the layout of the revisited data."""
    rng = np.random.default_rng(0)
    root = tmp_path / "revisited/roxford5k"
    (root / "jpg").mkdir(parents=True)
    images, queries, gnd = [], [], []
    for number, place in enumerate(PLACES):
        base = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
        rows = list(range(4 * number, 4 * number + 4))
        for i in range(5):
            noisy = np.clip(base + rng.normal(0, 25 * (i + 1), base.shape), 0, 255).astype(np.uint8)
            size = (64, 48) if i % 2 else (40, 50)
            name = f"{place}_{i:06d}"
            Image.fromarray(noisy).resize(size, Image.Resampling.BICUBIC).save(root / f"jpg/{name}.jpg", quality=95)
            (queries if i == 0 else images).append(name)
        box = [1.0, 2.0, 30.0, 40.0]
        gnd.append({"bbx": box, "easy": np.array(rows[:2]), "hard": np.array(rows[2:3]), "junk": np.array(rows[3:])})
    gnd[2]["hard"] = np.array([], dtype=np.float64)  # what an empty list becomes
    with open(root / "gnd_roxford5k.pkl", "wb") as file:
        pickle.dump({"imlist": images, "qimlist": queries, "gnd": gnd}, file, protocol=2)
    return root.parent, images, queries, gnd


def brute_force(features, query_features, gnd, level):
    """mAP from its definition: precision before and at each positive, junk removed one by one."""
    values = []
    for query, entry in zip(query_features, gnd, strict=True):
        right = {"easy": ["easy"], "medium": ["easy", "hard"], "hard": ["hard"]}[level]
        right = {int(row) for name in right for row in entry[name]}
        junk = {int(row) for name in ("easy", "hard", "junk") for row in entry[name]} - right
        order = [i for i in np.argsort(-(features @ query).numpy()) if i not in junk]
        area, hits = 0.0, 0
        for place, row in enumerate(order):
            if row in right:
                before = hits / place if place else 1.0
                hits += 1
                area += (before + hits / (place + 1)) / 2
        if right:
            values.append(area / len(right))
    return 100 * np.mean(values)


@pytest.mark.parametrize("multi", [False, True])
def test_command_equals_a_plain_loop(oxford, tmp_path, capsys, multi):
    data, images, queries, gnd = oxford
    run = tiny_checkpoint(tmp_path / "run")
    more = ["--multiscale"] if multi else []
    found = evaluate(capsys, "retrieval", "--checkpoint", run, "--data", data, "--image-size", 48, *more)
    assert found["images"] == 12 and found["queries"] == 3
    backbone = load_trained(run).backbone

    def features(names):
        rows = []
        for name in names:
            image = Image.open(data / f"roxford5k/jpg/{name}.jpg")
            image.thumbnail((48, 48), Image.Resampling.LANCZOS)
            pixels = to_tensor(image)[None]
            assert max(pixels.shape[2:]) == 48
            with torch.no_grad():
                if multi:
                    scaled = [F.interpolate(pixels, scale_factor=s, mode="bilinear") for s in (2**-0.5, 0.5)]
                    rows.append(sum(backbone(x)[0] for x in (pixels, *scaled)))
                else:
                    rows.append(backbone(pixels)[0])
        return F.normalize(torch.stack(rows).double(), dim=1)

    database, query = features(images), features(queries)
    for level in ("easy", "medium", "hard"):
        assert found[level]["mAP"] == pytest.approx(brute_force(database, query, gnd, level), abs=0.01)
        assert set(found[level]) == {"mAP", "mP@1", "mP@5", "mP@10"}
    folder = evaluate(capsys, "retrieval", "--checkpoint", run, "--data", data / "roxford5k", "--image-size", 48, *more)
    assert folder == found


def test_small_images_and_one_scale():
    torch.manual_seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8))
    assert shrink(40, image).equal(to_tensor(image)) and shrink(10, image).shape == (3, 6, 10)
    assert shrink(1, image).shape == (3, 1, 1) and image.size == (20, 12)
    seen = []

    class Backbone(torch.nn.Module):
        patch_size = 8

        def forward(self, pixels):
            seen.append(tuple(pixels.shape[2:]))
            return pixels.mean((2, 3))

    multi_scale(Backbone(), to_tensor(image)[None])
    assert seen == [(12, 20), (8, 14)]  # at half size it is smaller than a patch


@pytest.mark.parametrize("protocol", range(6))
def test_ground_truth_of_any_pickle_protocol(oxford, tmp_path, protocol):
    data, images, queries, gnd = oxford
    with open(tmp_path / "gnd.pkl", "wb") as file:
        pickle.dump({"imlist": images, "qimlist": queries, "gnd": gnd}, file, protocol=protocol)
    truth = load_ground_truth(tmp_path / "gnd.pkl")
    assert truth.images == images and truth.queries == queries
    assert truth.rows[1]["easy"].tolist() == [4, 5] and truth.rows[2]["hard"].tolist() == []


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_wrong_or_harmful_ground_truth_is_rejected(oxford, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, images, queries, gnd = oxford
    run = tiny_checkpoint(tmp_path / "run")
    words = ["retrieval", "--checkpoint", run, "--data", data]
    path = data / "roxford5k/gnd_roxford5k.pkl"

    def write(value):
        path.write_bytes(pickle.dumps(value))

    write({"imlist": images, "qimlist": queries, "gnd": Evil()})
    assert "not loaded for safety (it asks for posix.system)" in error_of(capsys, *words)
    write({"imlist": images, "qimlist": queries, "gnd": eval})
    assert "it asks for builtins.eval" in error_of(capsys, *words)
    assert not (tmp_path / "evil").exists()
    path.write_bytes(b"junk")
    assert "damaged" in error_of(capsys, *words)
    write([1, 2])
    assert 'expected a dict with "imlist"' in error_of(capsys, *words)
    write({"imlist": images, "qimlist": queries, "gnd": [{"ok": [1]}] * 3})
    assert "KeyError('easy')" in error_of(capsys, *words)
    write({"imlist": images, "qimlist": queries, "gnd": gnd[:2]})
    assert "3 queries and 2 annotations" in error_of(capsys, *words)
    write({"imlist": images[:4], "qimlist": queries, "gnd": gnd})
    assert "rows beyond its 4 images" in error_of(capsys, *words)
    write({"imlist": [*images, "lost"], "qimlist": queries, "gnd": gnd})
    assert "1 of 13 images of the database are not in" in error_of(capsys, *words)
    assert "image_size must be at least 1, got 0" in error_of(capsys, *words, "--image-size", 0)
    path.unlink()
    assert "expected the revisited data's <dataset>/gnd_roxford5k.pkl" in error_of(capsys, *words)


def test_an_unreadable_image_is_reported(oxford, tmp_path, capsys):
    from dino_train.cli import main

    data, images, *_ = oxford
    (data / f"roxford5k/jpg/{images[3]}.jpg").write_bytes(b"junk")
    run = tiny_checkpoint(tmp_path / "run")
    assert main(["evaluate", "retrieval", "--checkpoint", str(run), "--data", str(data), "--num-workers", "1"]) == 1
    assert f"{images[3]}.jpg in" in capsys.readouterr().err.splitlines()[-1]
