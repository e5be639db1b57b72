import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dino_train.cli import main
from dino_train.evaluate import video_segmentation
from dino_train.evaluate.davis import contour_accuracy, read_mask, region_similarity, score, validation_videos
from dino_train.evaluate.video_segmentation import (
    Propagation,
    evaluate_videos,
    frame_features,
    labels_of,
    propagate,
    segment,
    working_size,
)
from dino_train.models.vit import vit
from PIL import Image


def masks(*boxes, size=(100, 100)):
    """One mask for each (top, bottom, left, right), None for an empty mask: bool [N, H, W]."""
    result = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, box in zip(result, boxes, strict=True):
        if box:
            top, bottom, left, right = box
            mask[top:bottom, left:right] = True
    return result


# --- metrics, by hand ----------------------------------------------------------------------------


def test_jaccard_by_hand():
    truth = masks((0, 2, 0, 4), (0, 2, 0, 4), None, None, (5, 7, 5, 7))
    guess = masks((0, 2, 2, 6), (0, 2, 0, 4), None, (0, 1, 0, 1), None)
    assert region_similarity(truth, guess).tolist() == [4 / 12, 1, 1, 0, 0]


def test_jaccard_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, guess = torch.rand(2, 4, 13, 17, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = [metrics.jaccard_score(a.flatten(), b.flatten()) for a, b in zip(truth, guess, strict=True)]
    assert region_similarity(truth, guess).tolist() == pytest.approx(expected)


SQUARE = (20, 40, 20, 40)  # its boundary: a ring of 21 x 21 pixels from (19, 19), 80 of them. Tolerance: 2 pixels


@pytest.mark.parametrize(
    "truth, guess, expected",
    [
        (SQUARE, SQUARE, 1),
        (SQUARE, (20, 40, 22, 42), 1),  # all within the tolerance
        # Of 80 pixels, 20 on each horizontal side are matched, and 2 + 2 at the ends of one vertical side.
        (SQUARE, (20, 40, 23, 43), 44 / 80),
        (SQUARE, None, 0),
        (None, SQUARE, 0),
        (None, None, 1),
        ((0, 100, 0, 100), (0, 100, 0, 100), 1),  # the edge of the frame is no boundary
        ((0, 100, 0, 100), SQUARE, 0),
        ((0, 100, 0, 50), (0, 100, 0, 52), 1),
        ((0, 100, 0, 50), (0, 100, 0, 53), 0),
        # Rings of 2 x 2 pixels: only the nearest two match, at distance 1.4; the next are at 2.24, outside the disk.
        ((50, 51, 50, 51), (52, 53, 52, 53), 1 / 4),
    ],
)
def test_contour_accuracy_by_hand(truth, guess, expected):
    assert contour_accuracy(masks(truth), masks(guess)).item() == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_are_not_swapped():
    """Two separate squares, one is found: recall is 1/2, precision 1, F 2/3."""
    two = masks(SQUARE) | masks((60, 80, 60, 80))
    assert contour_accuracy(two, masks(SQUARE)).item() == pytest.approx(2 / 3)
    assert contour_accuracy(masks(SQUARE), two).item() == pytest.approx(2 / 3)
    torch.testing.assert_close(region_similarity(two, masks(SQUARE)), torch.tensor([0.5], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(480, 854), (37, 53)])
def test_contour_accuracy_equals_a_plain_loop(shape):
    """Expected values from the distances between all pairs of boundary pixels, on random blobs."""
    rng = np.random.default_rng(0)
    blobs = F.interpolate(torch.from_numpy(rng.random((2, 1, 7, 9))), shape, mode="bicubic")[:, 0] > 0.6
    height, width = shape
    radius = math.ceil(0.008 * math.sqrt(height**2 + width**2))
    points = []
    for mask in blobs.numpy():
        edge = np.zeros(shape, bool)
        for dy, dx in ((0, 1), (1, 0), (1, 1)):
            rows, columns = np.minimum(np.arange(height) + dy, height - 1), np.minimum(np.arange(width) + dx, width - 1)
            edge |= mask != mask[np.ix_(rows, columns)]
        points.append(torch.from_numpy(np.argwhere(edge)).double())
    distance = torch.cdist(*points)
    recall, precision = ((distance.amin(d) <= radius).double().mean() for d in (1, 0))
    expected = 2 * precision * recall / (precision + recall)
    assert 0 < expected < 1
    torch.testing.assert_close(contour_accuracy(blobs[:1], blobs[1:])[0], expected)


# --- propagation ---------------------------------------------------------------------------------


def by_loops(query, sources, labels, topk, radius):
    h, w, _ = query.shape
    result = torch.zeros_like(labels[0])
    for i in range(h):
        for j in range(w):
            found = []
            for source, label in zip(sources, labels, strict=True):
                for p in range(h):
                    for q in range(w):
                        if not radius or max(abs(p - i), abs(q - j)) <= radius:
                            found.append((float(query[i, j] @ source[p, q]), label[p, q]))
            found.sort(key=lambda pair: -pair[0])
            least = found[min(topk, len(found)) - 1][0]
            chosen = [(math.exp(cosine / 0.1), label) for cosine, label in found if cosine >= least]
            total = sum(weight for weight, _ in chosen)
            result[i, j] = sum(weight / total * label for weight, label in chosen)
    return result


@pytest.mark.parametrize(
    "h, w, n, topk, radius", [(14, 17, 2, 5, 3), (5, 26, 3, 5, 12), (13, 7, 2, 3, 0), (4, 4, 1, 9, 1)]
)
def test_propagation_equals_plain_loops(h, w, n, topk, radius):
    g = torch.Generator().manual_seed(0)
    query, *sources = F.normalize(torch.randn(n + 1, h, w, 6, generator=g, dtype=torch.float64), dim=-1)
    labels = list(torch.rand(n, h, w, 3, generator=g, dtype=torch.float64).softmax(-1))
    expected = by_loops(query, sources, labels, topk, radius)
    out = propagate(query, sources, labels, topk=topk, radius=radius)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.sum(-1), torch.ones(h, w, dtype=torch.float64))
    single = propagate(
        query.float(), [s.float() for s in sources], [x.float() for x in labels], topk=topk, radius=radius
    )
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_patches_tied_with_the_last_one_are_included():
    """The same feature everywhere: all patches are tied, and a label is the mean over all patches within the radius."""
    query = torch.zeros(1, 7, 2)
    query[..., 0] = 1
    labels = torch.arange(7.0).view(1, 7, 1)
    out = propagate(query, [query], [labels], topk=2, radius=1)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5, 1, 2, 3, 4, 5, 5.5]))


def test_sizes_equal_the_reference():
    assert working_size(854, 480, 480, 16) == (832, 480)
    assert working_size(854, 480, 480, 8) == (832, 480)
    assert working_size(480, 854, 480, 8) == (480, 832)
    assert working_size(1920, 1080, 480, 8) == (832, 480)
    assert working_size(910, 480, 480, 16) == (896, 480)
    assert working_size(100, 60, 50, 14) == (70, 42)  # the patch size does not divide 64: multiples of it
    with pytest.raises(ValueError, match="at least one patch, 16, got 8"):
        working_size(854, 480, 8, 16)


def test_labels_of_pixels_by_hand():
    """Each map is scaled to [0, 1] before the argmax: a weak object wins where it is strongest."""
    soft = torch.tensor([[[0.9, 0.1, 0.0], [0.7, 0.3, 0.0]]])  # the third label is absent and must not win
    assert labels_of(soft, 4, (8, 4)).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 4
    assert labels_of(soft, 4, (4, 2)).tolist() == [[0, 0, 1, 1]] * 2
    nothing = torch.zeros(2, 2, 2)
    nothing[..., 0] = 1  # only background, a constant map
    assert not labels_of(nothing, 4, (8, 8)).any()


# --- end to end ----------------------------------------------------------------------------------

SIZE = (128, 96)
COLORS = ((230, 60, 40), (40, 90, 240))


def make_davis(root, videos=("one", "two"), frames=6, year=2017):
    """Two squares that move over noise by 8 pixels per frame, and their labels."""
    for v, name in enumerate(videos):
        rng = np.random.default_rng(v)
        background = rng.integers(90, 160, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
        for folder in ("JPEGImages", "Annotations"):
            (root / folder / "480p" / name).mkdir(parents=True)
        for t in range(frames):
            pixels, labels = background.copy(), np.zeros(SIZE[::-1], np.uint8)
            for k, (top, left) in enumerate(((8, 8 + 8 * t), (56, 80 - 8 * t))):
                pixels[top : top + 32, left : left + 32] = COLORS[k]
                labels[top : top + 32, left : left + 32] = k + 1
            Image.fromarray(pixels).save(root / f"JPEGImages/480p/{name}/{t:05d}.jpg", quality=95)
            save_labels(labels if year == 2017 else (labels > 0) * 255, root / f"Annotations/480p/{name}/{t:05d}.png")
    if year == 2017:
        text = "".join(f"{name}\n" for name in videos)
    else:
        text = "".join(
            f"/JPEGImages/480p/{n}/{t:05d}.jpg /Annotations/480p/{n}/{t:05d}.png\n" for n in videos for t in (0, 1)
        )
    path = root / ("ImageSets/2017/val.txt" if year == 2017 else "ImageSets/480p/val.txt")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return root


def save_labels(labels, path):
    image = Image.fromarray(labels.astype(np.uint8))
    if labels.max() < 255:
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    return make_davis(tmp_path_factory.mktemp("davis"))


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return vit("vit_nano", patch_size=8, img_size=32).eval()


OPTIONS = Propagation(image_size=96)


def test_moving_squares_are_tracked(davis, backbone, tmp_path):
    result = evaluate_videos(backbone, davis, tmp_path, OPTIONS)
    assert result["J"] > 90 and result["F"] > 90, result
    assert result["J&F"] == pytest.approx((result["J"] + result["F"]) / 2)
    assert list(result["videos"]) == ["one", "two"] and len(result["videos"]["one"]["J"]) == 2
    shortcut = []  # result if the first labels were kept for all frames
    for video in validation_videos(davis, 2017):
        still = tmp_path / "still" / video.name
        still.mkdir(parents=True)
        for path in video.annotations:
            shutil.copy(video.annotations[0], still / path.name)
        shortcut.append(score(video, still, 2017, torch.device("cpu"))[0])
        for path in video.annotations:  # labels and colors as the DAVIS tools read them
            with Image.open(tmp_path / video.name / path.name) as image:
                assert (
                    image.mode == "P"
                    and image.size == SIZE
                    and image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
                )
        assert (read_mask(tmp_path / video.name / "00000.png", 2017) == read_mask(video.annotations[0], 2017)).all()
    assert 100 * torch.cat(shortcut).mean() < 60


def test_the_score_is_the_mean_without_first_and_last_frame(davis, tmp_path):
    video = validation_videos(davis, 2017)[0]
    for t, path in enumerate(video.annotations):
        labels = read_mask(path, 2017)
        if t in (0, 2, 5):
            labels[labels == 2] = 0  # the second object is missed in one of the four scored frames
        save_labels(labels, tmp_path / path.name)
    regions, contours = score(video, tmp_path, 2017, torch.device("cpu"))
    assert regions.tolist() == [1, 0.75] and contours.tolist() == [1, 0.75]


def test_the_sources_are_the_first_frame_and_the_last_few(davis, backbone, monkeypatch):
    video = validation_videos(davis, 2017)[0]
    features = [frame_features(backbone, Image.open(path), SIZE) for path in video.frames]
    seen, outputs = [], []

    def record(query, sources, labels, **options):
        assert options == {"topk": 4, "radius": 5} and torch.equal(query, features[len(seen) + 1])
        seen.append([next(i for i, f in enumerate(features) if torch.equal(f, source)) for source in sources])
        for i, label in zip(seen[-1][1:], labels[1:], strict=True):
            assert label is outputs[i - 1]  # soft labels are propagated, not pixel labels
        outputs.append(propagate(query, sources, labels, **options))
        return outputs[-1]

    monkeypatch.setattr(video_segmentation, "propagate", record)
    options = Propagation(image_size=96, n_last_frames=2, topk=4, radius=5)
    with torch.no_grad():
        assert len(list(segment(backbone, video, options))) == 6
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]


def test_a_second_run_completes_the_first(davis, backbone, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = evaluate_videos(backbone, davis, out, OPTIONS)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    asked = []
    original = video_segmentation.segment
    monkeypatch.setattr(video_segmentation, "segment", lambda b, v, *o: asked.append(v.name) or original(b, v, *o))
    assert evaluate_videos(backbone, davis, out, OPTIONS) == before and not asked
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (out / "two/00003.png").unlink()
    (out / "two.part").mkdir()  # as after a kill in the middle of a video
    (out / "two.part/00000.png").write_bytes(b"cut")
    assert evaluate_videos(backbone, davis, out, OPTIONS) == before and asked == ["two"]
    assert sorted(path.name for path in out.iterdir()) == ["one", "settings.json", "two"]
    with pytest.raises(ValueError, match="other weights, data or options: choose another --output-dir"):
        evaluate_videos(backbone, davis, out, Propagation(image_size=96, topk=4))
    other = vit("vit_nano", patch_size=8, img_size=32).eval()
    with pytest.raises(ValueError, match="other weights"):
        evaluate_videos(other, davis, out, OPTIONS)


@pytest.mark.parametrize("folder", ["JPEGImages", "Annotations"])
def test_a_folder_with_other_files_is_not_changed(backbone, tmp_path, folder):
    """Frames are not overwritten, and annotations are not taken for results."""
    root = make_davis(tmp_path, videos=("one",), frames=4)
    before = sorted(root.rglob("*"))
    with pytest.raises(ValueError, match="480p holds files but no segmentations of ours: choose another --output-dir"):
        evaluate_videos(backbone, root, root / folder / "480p", OPTIONS)
    assert sorted(root.rglob("*")) == before


@pytest.mark.gpu
def test_a_gpu_gives_the_same_result(davis, backbone, tmp_path):
    expected = evaluate_videos(backbone, davis, tmp_path / "cpu", OPTIONS)
    result = evaluate_videos(copy.deepcopy(backbone).cuda(), davis, tmp_path / "cuda", OPTIONS)
    assert result["J"] == pytest.approx(expected["J"], abs=1) and result["F"] == pytest.approx(expected["F"], abs=1)


def test_2016_has_one_object(backbone, tmp_path):
    root = make_davis(tmp_path / "davis", videos=("one",), frames=4, year=2016)
    for name, mode in (("00000", "RGB"), ("00001", "RGBA")):  # some of its files are RGB
        path = root / f"Annotations/480p/one/{name}.png"
        Image.open(path).convert(mode).save(path)
    result = evaluate_videos(backbone, root, tmp_path / "out", Propagation(year=2016, image_size=96))
    assert len(result["videos"]["one"]["J"]) == 1 and result["J"] > 90


def test_a_failing_video_leaves_no_files(backbone, tmp_path):
    root = make_davis(tmp_path / "davis", videos=("one",), frames=4)
    Image.new("RGB", (64, 64)).save(root / "JPEGImages/480p/one/00002.jpg")
    with pytest.raises(ValueError, match=r"00002.jpg has 64 x 64 pixels, the first frame 128 x 96"):
        evaluate_videos(backbone, root, tmp_path / "out", OPTIONS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]
    with pytest.raises(ValueError, match="00002.jpg has 64 x 64"):  # other options may use the folder
        evaluate_videos(backbone, root, tmp_path / "out", Propagation(image_size=96, topk=4))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda root: shutil.rmtree(root / "ImageSets"),
            r"no .*2017/val.txt: expected a DAVIS 2017 folder with ImageSets/",
        ),
        (
            lambda root: (root / "ImageSets/2017/val.txt").write_text("\n"),
            "val.txt is empty: expected one video name per line",
        ),
        (
            lambda root: (root / "ImageSets/2017/val.txt").write_text("three\n"),
            "480p/three has 0 frames: expected at least 3",
        ),
        (
            lambda root: (root / "Annotations/480p/one/00003.png").unlink(),
            "no .*Annotations/480p/one/00003.png: expected an annotation for each frame of one, got 4 frames and 3",
        ),
        (
            lambda root: (root / "JPEGImages/480p/one/00003.jpg").unlink(),
            "no .*JPEGImages/480p/one/00003.jpg: expected an annotation for each frame of one, got 3 frames and 4",
        ),
        (
            lambda root: save_labels(np.ones((90, 120)), root / "Annotations/480p/one/00000.png"),
            "00000.png has 120 x 90 pixels, expected 128 x 96 like the first frame",
        ),
        (
            lambda root: save_labels(np.ones((90, 120)), root / "Annotations/480p/one/00002.png"),
            "00002.png has 120 x 90 pixels, expected 128 x 96 like the first frame",
        ),
        (
            lambda root: Image.new("RGB", SIZE).save(root / "Annotations/480p/one/00000.png"),
            "colors of mode RGB, expected an indexed PNG",
        ),
        (lambda root: (root / "Annotations/480p/one/00000.png").write_bytes(b"x"), "00000.png cannot be read"),
        (lambda root: (root / "JPEGImages/480p/one/00001.jpg").write_bytes(b"x"), "00001.jpg: not an image"),
        (
            lambda root: save_labels(np.zeros(SIZE[::-1]), root / "Annotations/480p/one/00000.png"),
            "00000.png has 0 labels, the largest 0: expected 1 to the number of objects",
        ),
        (
            lambda root: save_labels(255 * np.eye(*SIZE[::-1]), root / "Annotations/480p/one/00000.png"),
            r"00000.png has 0 labels, .* \(year 2016 takes black and white masks\)",
        ),
        (
            lambda root: save_labels(3 * np.eye(*SIZE[::-1]), root / "Annotations/480p/one/00000.png"),
            "00000.png has 1 labels, the largest 3: expected 1 to the number of objects",
        ),
    ],
)
def test_bad_data_is_reported(backbone, tmp_path, spoil, message):
    root = make_davis(tmp_path / "davis", videos=("one",), frames=4)
    spoil(root)
    with pytest.raises(ValueError, match=message):
        evaluate_videos(backbone, root, tmp_path / "out", OPTIONS)


def test_bad_options_are_reported():
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        Propagation(topk=0)


def test_the_command(davis, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(vit("vit_nano", patch_size=8).state_dict(), tmp_path / "backbone.pth")
    words = ["evaluate", "video-segmentation", "--checkpoint", str(tmp_path / "backbone.pth"), "--arch", "vit_nano"]
    words += ["--patch-size", "8", "--data", str(davis), "--image-size", "96", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["J&F"] > 90 and values["output"] == str(tmp_path / "davis2017")
    assert len(list((tmp_path / "davis2017").rglob("*.png"))) == 12
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"DAVIS 2017: J&F {values['J&F']:.2f} %" in text and text.startswith("one: J ")
    assert main([*words, "--size-mask-neighborhood", "-1"]) == 1
    assert "radius must be at least 0, got -1" in capsys.readouterr().err
