import json
import shutil

import numpy as np
import pytest
import torch
from dino_train.cli import main
from dino_train.evaluate.attention import keep_mass, load_mask
from dino_train.evaluate.metrics import jaccard
from PIL import Image
from tiny_run import tiny_run

WORDS = ["evaluate", "attention", "--checkpoint"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("attention"))


def noise(path, width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_keep_mass_by_hand():
    maps = torch.tensor([[[0.1, 0.5], [0.3, 0.1]], [[0.25, 0.25], [0.25, 0.25]]])
    assert keep_mass(maps, 0.45)[0].tolist() == [[False, True], [False, False]]
    assert keep_mass(maps, 0.6)[0].tolist() == [[False, True], [True, False]]  # 0.5 alone is not enough
    assert keep_mass(maps, 0.6)[1].sum() == 3
    assert keep_mass(maps * 7, 0.6).equal(keep_mass(maps, 0.6))
    assert keep_mass(maps, 1.0).all()


def test_jaccard_by_hand():
    a = np.array([[1, 1, 0], [0, 0, 0]], bool)
    b = np.array([[1, 0, 0], [1, 0, 0]], bool)
    assert jaccard(a, b) == 1 / 3 and jaccard(a, a) == 1 and jaccard(a, ~a) == 0


def test_jaccard_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        a, b = rng.random((2, 40, 50)) < share
        assert jaccard(a, b) == pytest.approx(metrics.jaccard_score(a.ravel(), b.ravel()))


def test_maps_have_the_size_of_the_image(run, tmp_path, capsys):
    noise(tmp_path / "wide.jpg", 90, 50)
    (tmp_path / "broken.png").write_bytes(b"junk")
    out = tmp_path / "maps"
    words = [*WORDS, str(run / "run/last.pt"), "--output-dir", str(out), "--json"]
    assert main([*words, "--data", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "protocol": "attention", "output": str(out), "images": 1, "maps": 12,
    }  # fmt: skip
    for name in ("head0", "head1", "head2", "mean"):
        colors, mask = (Image.open(out / f"wide_{name}{suffix}.png") for suffix in ("", "_mask"))
        assert colors.size == mask.size == Image.open(out / f"wide_{name}_overlay.png").size == (90, 50)
        assert np.asarray(colors).std() > 5
        assert 0.05 < np.asarray(mask).mean() < 0.61  # 0.6 of the mass is on at most this fraction of the patches
    assert (out / "sheet.png").exists()
    for bad, message in (
        (["--data", str(tmp_path / "nowhere.jpg")], "no such image, folder or video: "),
        (["--image-size", "0"], "image_size must be at least 1, got 0"),
        (["--threshold", "0"], "threshold must be in (0, 1], got 0"),
    ):
        assert main([*words, *bad]) == 1
        assert message in capsys.readouterr().err
    assert main([*words, "--data", str(tmp_path / "broken.png")]) == 1
    assert "none of the images could be read" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_images_from_an_archive(run, tmp_path, capsys, suffix):
    for i in range(2):
        noise(tmp_path / f"images/{i}.png", 20, 20, seed=i)
    shutil.make_archive(str(tmp_path / "archive"), suffix[1:], tmp_path / "images")
    words = [*WORDS, str(run / "run"), "--output-dir", str(tmp_path / "maps"), "--json"]
    assert main([*words, "--data", str(tmp_path / f"archive{suffix}")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    assert (tmp_path / "maps/1_mean.png").exists()


def test_images_with_equal_names_get_separate_maps(run, tmp_path):
    a, b = noise(tmp_path / "a/x.png", 20, 20), noise(tmp_path / "b/x.png", 20, 20)
    words = [*WORDS, str(run / "run"), "--output-dir", str(tmp_path / "maps")]
    assert main([*words, "--image", str(a), str(b)]) == 0
    assert len(list((tmp_path / "maps").glob("*_mean.png"))) == 2


def test_the_images_of_the_run_are_the_default(run):
    assert main([*WORDS, str(run / "run")]) == 0
    assert (run / "run/attention/sheet.png").exists()


def test_masks_give_the_overlap_of_the_written_masks(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    truth = {}
    for i in range(3):
        noise(tmp_path / f"images/{i}.png", 40, 24, seed=i)
        if i < 2:  # one image has no mask
            truth[i] = rng.random((24, 40)) < 0.4
            (tmp_path / "masks").mkdir(exist_ok=True)
            Image.fromarray(np.uint8(255 * truth[i])).save(tmp_path / f"masks/{i}.png")
    words = [*WORDS, str(run / "run"), "--data", str(tmp_path / "images"), "--image-size", "32", "--threshold", "0.5"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main([*words, "--masks", str(tmp_path / "masks"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = []
    for i, mask in truth.items():
        drawn = [
            np.asarray(Image.open(tmp_path / f"out/{i}_{n}_mask.png")) for n in ("head0", "head1", "head2", "mean")
        ]
        scores.append([100 * (d & mask).sum() / (d | mask).sum() for d in drawn])
    scores = np.array(scores)
    assert found["images"] == 2
    assert found["jaccard_best_head"] == pytest.approx(scores[:, :3].max(axis=1).mean())
    assert found["jaccard_mean_map"] == pytest.approx(scores[:, 3].mean())
    assert found["jaccard_heads"] == pytest.approx(scores[:, :3].mean(axis=0).tolist())


def test_the_border_of_a_voc_mask_is_ignored(tmp_path):
    picture = Image.fromarray(np.uint8([[0, 15, 255], [0, 0, 3]])).convert("P")
    picture.putdata([0, 15, 255, 0, 0, 3])
    picture.save(tmp_path / "voc.png")
    foreground, counts = load_mask(tmp_path / "voc.png", (3, 2))
    assert counts.tolist() == [[True, True, False], [True, True, True]]
    assert (foreground & counts).tolist() == [[False, True, False], [False, False, True]]


def test_a_palette_of_0_and_255_alone_has_no_border(tmp_path):
    picture = Image.fromarray(np.uint8([[0, 255]])).convert("P")
    picture.putdata([0, 255])
    picture.save(tmp_path / "mask.png")
    foreground, counts = load_mask(tmp_path / "mask.png", (2, 1))
    assert counts.all() and foreground.tolist() == [[False, True]]


def test_images_of_one_name_and_thin_strips(run, tmp_path, capsys, caplog):
    for name in ("a/x.png", "a/x_2.png", "b/x.png"):
        noise(tmp_path / name, 20, 20)
    noise(tmp_path / "b/strip.png", 200, 2)
    words = [*WORDS, str(run / "run"), "--data", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*words, "--output-dir", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 3 and found["maps"] == len([*(tmp_path / "out").rglob("*.png")]) - 1
    assert "strip.png is skipped: 200 x 2 pixels are too long and narrow" in caplog.text


def test_invalid_masks_are_reported(run, tmp_path, capsys):
    image, mask = noise(tmp_path / "images/a.png", 20, 10), tmp_path / "masks/a.png"
    words = [*WORDS, str(run / "run"), "--data", str(image), "--masks", str(mask.parent)]
    assert main(words) == 1
    assert "no folder" in capsys.readouterr().err
    noise(mask, 20, 10)
    assert main(words) == 1
    assert "a.png has mode RGB, expected one channel" in capsys.readouterr().err
    Image.new("L", (10, 20)).save(mask)
    assert main(words) == 1
    assert "a.png has 10x20 pixels, expected 20x10 like its image" in capsys.readouterr().err
    mask.rename(mask.with_name("b.png"))
    assert main(words) == 1
    assert "expected <name of the image>.png" in capsys.readouterr().err
    mask.write_bytes(b"junk")
    assert main(words) == 1
    assert "cannot be read" in capsys.readouterr().err


def frames_of(run, source, out, capsys, *more):
    assert main([*WORDS, str(run / "run"), "--data", str(source), "--output-dir", str(out), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_frames_without_ffmpeg(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for i in range(3):
        noise(tmp_path / f"clip/{i:03d}.png", 24, 16, seed=i)
    found = frames_of(run, tmp_path / "clip", tmp_path / "out", capsys, "--fps", "5")
    assert found["frames"] == 3 and found["video"] is None
    drawn = [np.asarray(Image.open(tmp_path / f"out/frames/{i:06d}.png")) for i in range(3)]
    assert drawn[0].shape == (16, 24, 3) and not np.array_equal(drawn[0], drawn[1])
    words = ["--data", str(tmp_path / "out/frames"), "--output-dir", str(tmp_path / "out"), "--fps", "5"]
    assert main([*WORDS, str(run / "run"), *words]) == 1
    assert "would overwrite their frames" in capsys.readouterr().err
    (tmp_path / "a.mp4").write_bytes(b"")
    assert main([*WORDS, str(run / "run"), "--data", str(tmp_path / "a.mp4")]) == 1
    assert "install it, or pass a folder with the frames" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_video_input_and_output(run, tmp_path, capsys):
    for i in range(10):
        noise(tmp_path / f"clip/{i:03d}.png", 64, 48, seed=i)
    first = frames_of(run, tmp_path / "clip", tmp_path / "out", capsys, "--fps", "5")
    assert first["video"] == str(tmp_path / "out/attention.mp4")
    again = frames_of(run, first["video"], tmp_path / "again", capsys, "--fps", "5")
    assert again["frames"] == 10
    assert Image.open(tmp_path / "again/frames/000009.png").size == (64, 48)
    (tmp_path / "broken.mp4").write_bytes(b"junk")
    assert main([*WORDS, str(run / "run"), "--data", str(tmp_path / "broken.mp4")]) == 1
    assert "broken.mp4 cannot be read as a video" in capsys.readouterr().err
