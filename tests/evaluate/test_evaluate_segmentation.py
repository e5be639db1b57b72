import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from dino_train.cli import main
from dino_train.common import checkpoint
from dino_train.evaluate import davis
from dino_train.evaluate.metrics import intersection_over_union
from dino_train.evaluate.segmentation import (
    LinearHead,
    bank_of,
    interpolation,
    label_map,
    masked_split,
    patch_labels,
    read_mask,
    scores_of,
    train_head,
)
from dino_train.models.resnet import resnet_nano
from PIL import Image
from tiny_run import error_of, evaluate, tiny_checkpoint
from torch.nn import functional as F

COLORS = {0: (110, 110, 110), 3: (220, 40, 40), 7: (40, 200, 40)}  # class: color


def shape(seed, width=48, height=40):
    """Noise with a rectangle and a disk of one color each, and their mask, with a border of 255."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for name, regular in zip(rng.permutation([3, 7]), (True, False), strict=True):
        cy, cx, r = rng.integers(8, height - 8), rng.integers(8, width - 8), rng.integers(7, 12)
        distance = np.maximum(abs(y - cy), abs(x - cx)) if regular else np.hypot(y - cy, x - cx)
        mask[distance <= r + 1] = 255
        mask[distance <= r] = name
    colors = np.array([COLORS.get(int(name), (0, 0, 0)) for name in mask.flat]).reshape(*mask.shape, 3)
    return np.clip(rng.normal(colors, 15), 0, 255).astype(np.uint8), mask


def write(root, name, image, mask):
    for folder, pixels in (("images", image), ("masks", mask)):
        path = root / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    for i in range(24):
        write(root / ("train" if i < 16 else "val"), f"a/{i:02d}", *shape(i))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("weights"))


def words(weights, data, *more):
    return ["segmentation", "--checkpoint", weights, "--data", data, "--device", "cpu", *more]


def test_iou_by_hand():
    truth, found = np.array([0, 0, 0, 0, 1, 1, 1, 3]), np.array([0, 0, 1, 2, 1, 1, 0, 0])
    confusion = np.bincount(4 * truth + found, minlength=16).reshape(4, 4)
    assert confusion.tolist() == [[2, 1, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    ious = intersection_over_union(confusion)
    assert ious[:2].tolist() == [2 / 6, 2 / 4] and np.isnan(ious[2]) and ious[3] == 0
    scores = scores_of(confusion, [0, 3, 7, 9])
    assert scores["IoU"] == pytest.approx({"0": 100 / 3, "3": 50, "9": 0}, rel=1e-15)  # 7 is predicted, but never true
    assert scores["mIoU"] == pytest.approx((100 / 3 + 50) / 3, rel=1e-15) and scores["accuracy"] == 50


def test_iou_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, found = np.random.default_rng(0).integers(0, 6, (2, 1000))
    confusion = metrics.confusion_matrix(truth, found)
    expected = metrics.jaccard_score(truth, found, average=None)
    np.testing.assert_allclose(intersection_over_union(confusion), expected, rtol=1e-14)


def test_a_patch_has_the_most_frequent_class_of_its_pixels():
    mask = np.array([[0, 0, 1, 255], [2, 2, 1, 255], [2, 1, 255, 255]], np.uint8)
    # Rows 0, 1 and 1 of patches: the center of the middle row of pixels is on the border, and belongs to the second.
    assert patch_labels(mask, (2, 2), 3).tolist() == [0, 1, 2, 1]
    assert patch_labels(mask, (1, 4), 3).tolist() == [2, 0, 1, -1]
    assert patch_labels(mask, (3, 8), 3).reshape(3, 8)[0].tolist() == [-1, 0, -1, 0, -1, 1, -1, -1]


@pytest.mark.parametrize("n, pixels", [(4, 4), (3, 10), (7, 5), (1, 6)])
def test_interpolation_equals_bilinear_interpolation(n, pixels):
    scores = torch.rand(n, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores.permute(2, 0, 1)[None].double(), (pixels, 600), mode="bilinear")[0]
    down, across = interpolation(n, pixels, scores.device), interpolation(5, 600, scores.device)
    torch.testing.assert_close((down @ scores.permute(2, 0, 1) @ across.T).double(), expected, rtol=0, atol=1e-6)
    two = scores.permute(1, 0, 2)  # 600 rows: more than are classified at once
    assert (expected.argmax(0) == label_map(two, (600, pixels)).T).float().mean() > 0.999


def test_the_bank_is_bounded_and_always_the_same():
    features = [torch.randn(2, 3, 4), torch.randn(1, 5, 4)]
    labels = [torch.tensor([0, -1, 1, 0, 1, -1]), torch.tensor([1, 1, -1, 0, 0])]
    whole, whole_labels = bank_of(features, labels, 100)
    assert whole_labels.tolist() == [0, 1, 0, 1, 1, 1, 0, 0]
    torch.testing.assert_close(whole[4], F.normalize(features[1][0, 0], dim=0))
    some, some_labels = bank_of(features, labels, 3)
    assert some.shape == (3, 4) and len(some_labels) == 3 and some.equal(bank_of(features, labels, 3)[0])
    assert all((row == whole).all(1).any() for row in some)


def test_the_linear_head_equals_batch_norm_and_a_convolution():
    generator = torch.Generator().manual_seed(0)
    features = [3 + 2 * torch.randn(*size, 5, generator=generator) for size in ((4, 3), (2, 6))]
    head = LinearHead(features, 3)
    torch.nn.init.normal_(head.linear.weight, generator=generator)
    norm, convolution = torch.nn.BatchNorm2d(5, affine=False, momentum=None), torch.nn.Conv2d(5, 3, 1)
    norm(torch.cat([x.flatten(0, 1) for x in features]).T[None, ..., None])  # its statistics
    count = 24
    norm.running_var *= (count - 1) / count  # which batch norm keeps as those of a sample
    convolution.load_state_dict({"weight": head.linear.weight.data[..., None, None], "bias": head.linear.bias.data})
    expected = convolution(norm.eval()(features[0].permute(2, 0, 1)[None]))[0].permute(1, 2, 0)
    torch.testing.assert_close(head(features[0]), expected)


def test_training_equals_that_by_interpolate():
    """One update: the mean cross-entropy over the labelled pixels of a batch."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(3, 4, 5, generator=generator) for _ in range(2)]
    masks = [torch.randint(0, 4, (12, 16), generator=generator, dtype=torch.uint8).numpy() for _ in range(2)]
    for mask in masks:
        mask[mask == 3] = 255
    head, other = LinearHead(features, 3), LinearHead(features, 3)
    train_head(head, features, masks, epochs=1, batch_size=2, lr=0.01)
    logits = F.interpolate(other(torch.stack(features)).permute(0, 3, 1, 2), (12, 16), mode="bilinear")
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=1e-4)
    F.cross_entropy(logits, torch.from_numpy(np.stack(masks)).long(), ignore_index=255).backward()
    optimizer.step()
    torch.testing.assert_close(head.linear.weight, other.linear.weight, rtol=0, atol=1e-6)
    assert head.linear.weight.abs().max() > 0.009


def test_colored_shapes_are_found_by_an_untrained_network(shapes, weights, capsys):
    found = evaluate(capsys, *words(weights, shapes, "--image-size", 64, "--lr", 0.01))
    assert (found["train"], found["val"], found["image_size"], found["k"]) == (16, 8, 64, 20)
    assert found["classes"] == [0, 3, 7] and found["bank"] <= 16 * 8 * 10
    chance, knn, linear = (found[name] for name in ("chance", "knn", "linear"))
    assert chance["IoU"] == {"0": chance["accuracy"], "3": 0, "7": 0} and 20 < chance["mIoU"] < 25
    assert knn["mIoU"] > 85 and linear["mIoU"] > 85 and knn["IoU"].keys() == linear["IoU"].keys() == {"0", "3", "7"}
    assert all(value > 75 for method in (knn, linear) for value in method["IoU"].values())


def test_it_is_deterministic_and_the_bank_counts(shapes, weights, capsys):
    call = words(weights, shapes, "--epochs", 1, "--bank", 50)
    found = evaluate(capsys, *call)
    assert found == evaluate(capsys, *call) and found["bank"] == 50
    assert found["knn"] != evaluate(capsys, *call, "--nb-knn", 1)["knn"]
    low = evaluate(capsys, *call, "--precision", "bfloat16")
    assert low != found and low["knn"]["mIoU"] == pytest.approx(found["knn"]["mIoU"], abs=3)
    assert main(["evaluate", *map(str, call)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 images by 16, 3 classes; chance: class 0"
    assert lines[2].startswith(f"knn     mIoU {found['knn']['mIoU']:.2f} %")


def test_masks_with_a_palette_and_a_damaged_image(shapes, weights, tmp_path, capsys, caplog):
    shutil.copytree(shapes, tmp_path / "data")
    for path in (tmp_path / "data").rglob("masks/*/*.png"):
        mask = Image.open(path)
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        mask.save(path)
    call = words(weights, shapes, "--epochs", 1)
    assert evaluate(capsys, *call) == evaluate(capsys, *words(weights, tmp_path / "data", "--epochs", 1))
    (tmp_path / "data/val/images/a/20.png").write_bytes(b"junk")
    assert evaluate(capsys, *words(weights, tmp_path / "data", "--epochs", 1))["val"] == 7
    assert "1 of 8 images could not be read (held-out)" in caplog.text


@pytest.mark.parametrize(("bits", "classes"), [(1, 2), (2, 4), (4, 16), (8, 256)])
def test_gray_masks_of_fewer_bits_have_the_numbers_that_are_stored(tmp_path, bits, classes):
    """Pillow spreads 2 and 4 bits over 0 to 255."""
    mask = np.arange(32 * 32).reshape(32, 32) % classes
    packed = np.packbits((mask[..., None] >> np.arange(bits)[::-1]) & 1, axis=None).reshape(32, -1).astype(np.uint8)
    lines = b"".join(b"\0" + line.tobytes() for line in packed)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 32, 32, bits, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)
    if bits > 1:
        assert np.array_equal(davis.read_mask(tmp_path / "mask.png", 2017), np.where(mask == 255, 0, mask))


def test_images_of_16_bits(weights, tmp_path, capsys):
    """Are scaled by their own range, so that they are seen as those of 8 bits."""
    found = []
    for bits in (8, 16):
        for i in range(8):
            image, mask = shape(i)
            gray = np.where(mask == 3, 255, np.where(mask == 7, 0, image[..., 2])).astype(np.uint8)
            levels = gray if bits == 8 else gray.astype(np.uint16) * 8
            write(tmp_path / f"{bits}/{'train' if i < 6 else 'val'}", f"{i}", levels, mask)
        found.append(evaluate(capsys, *words(weights, tmp_path / str(bits), "--epochs", 1)))
    for method in ("knn", "linear"):
        assert found[0][method]["mIoU"] == pytest.approx(found[1][method]["mIoU"], abs=1)


@pytest.fixture
def few(tmp_path):
    for i in range(4):
        write(tmp_path / ("train" if i < 3 else "val"), f"{i}", *shape(i))
    return tmp_path


def test_the_split(few):
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (few / f"sorted/{kind}").mkdir(parents=True, exist_ok=True)
            shutil.copytree(few / part / kind, few / f"sorted/{kind}/{part}")
    for root, prefix in ((few, "train"), (few / "sorted", "sorted/masks/train")):
        train, val = masked_split(root)
        assert [len(part.images) for part in (train, val)] == [3, 1]
        assert train.mask(0).is_file() and prefix in str(train.mask(0)) and "val" in str(val.mask(0))
    for i in range(20):
        write(few / "one", f"{i:02d}", *shape(i))
    train, val = masked_split(few / "one")
    assert [len(part.images) for part in (train, val)] == [19, 1] and val.mask(0).is_file()


def masks(part, edit):
    """Spoils a data set: edits the first mask of a part."""

    def spoil(root):
        path = min((root / part / "masks").iterdir())
        Image.fromarray(edit(np.array(Image.open(path)))).save(path)

    return spoil


def every_mask(edit):
    def spoil(root):
        for path in root.rglob("masks/*.png"):
            Image.fromarray(edit(np.array(Image.open(path)))).save(path)

    return spoil


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda root: (root / "train/masks/1.png").unlink(),
            "train/masks/1.png: expected a PNG of the same name for",
        ),
        (lambda root: shutil.rmtree(root / "val/masks"), "; 1 of 1 images have none"),
        (lambda root: shutil.rmtree(root / "val"), "no such folder, zip or tar file: "),
        (lambda root: shutil.rmtree(root / "train"), "has neither train/images/ nor images/: expected train/images/, "),
        (lambda root: shutil.move(root / "train/images", root), "/images are too few to hold some out: expected 20"),
        (lambda root: (root / "val/masks/3.png").write_bytes(b"junk"), "masks/3.png cannot be read: "),
        (masks("val", lambda x: x[:-1]), "masks/3.png has 48x39 pixels, expected 48x40 like its image"),
        (masks("train", lambda x: np.stack([x, x, x], 2)), "0.png has mode RGB, expected one channel of 8 bits or a "),
        (masks("train", lambda x: x.astype(np.uint16)), "0.png has mode I;16, expected one channel of 8 bits"),
        (
            masks("val", lambda x: np.where(x == 7, 9, x).astype(np.uint8)),
            "masks/3.png has class 9, which no training mask has (1 such classes)",
        ),
        (
            every_mask(lambda x: np.uint8(255 * (x > 0))),
            "/masks is 0, besides 255, which is ignored: expected a number",
        ),
        (masks("val", lambda x: np.full_like(x, 255)), "every pixel of the held-out masks in "),
    ],
)
def test_what_is_wrong_with_the_data_is_one_line(few, weights, capsys, caplog, spoil, message):
    spoil(few)
    caplog.set_level("ERROR")
    assert message in error_of(capsys, *words(weights, few))


def test_invalid_options_and_a_resnet(few, weights, capsys):
    for option in ("image-size", "nb-knn", "bank", "epochs", "batch-size"):
        message = error_of(capsys, *words(weights, few, f"--{option}", 0))
        assert f"{option.replace('-', '_')} must be at least 1, got 0" in message
    assert "lr must be above 0, got -1.0" in error_of(capsys, *words(weights, few, "--lr", -1))
    checkpoint.save({"teacher": resnet_nano().state_dict(), "args": {"arch": "resnet_nano"}}, few / checkpoint.LAST)
    assert "resnet_nano has no tokens and no self-attention; choose" in error_of(capsys, *words(few, few))
