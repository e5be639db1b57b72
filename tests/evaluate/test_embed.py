"""Features of any images for other programs, and their neighbors."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from dino_train.cli import main
from dino_train.common.views import eval_transform
from dino_train.evaluate import embed, features
from dino_train.evaluate.embed import without_self
from dino_train.evaluate.features import Features
from dino_train.models.weights import load_trained
from PIL import Image
from tiny_run import make_images, tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint; a pool of 20 images in no class folders, one of which cannot be read; and 2 in class folders."""
    tiny_checkpoint(tmp_path)
    (tmp_path / "pool").mkdir()
    for path in make_images(tmp_path / "made", n=20).rglob("*.png"):
        path.rename(tmp_path / "pool" / path.name)
    (tmp_path / "pool/007.png").write_bytes(b"no image")
    make_images(tmp_path / "classes", n=2)
    return tmp_path


def umask():
    now = os.umask(0o077)
    os.umask(now)
    return now


def run(folder, *words, data="pool"):
    command = [
        "embed",
        "--checkpoint",
        folder,
        "--data",
        folder / data,
        "--num-workers",
        "1",
        "--device",
        "cpu",
        *words,
    ]
    return main([str(word) for word in command])


def expected(folder, paths):
    backbone = load_trained(folder).backbone
    with torch.no_grad():
        return torch.cat([backbone(eval_transform(Image.open(folder / path), 16)[None]) for path in paths])


def test_all_formats_hold_the_features_of_all_readable_images(folder, capsys):
    from pyarrow import parquet

    paths = [f"{i:03d}.png" for i in range(20) if i != 7]
    for suffix in ("safetensors", "npz", "parquet", "csv"):
        assert run(folder, "--out", folder / f"out.{suffix}", "--json") == 0
        assert json.loads(capsys.readouterr().out) == {
            "images": 19,
            "unreadable": 1,
            "features": 96,
            "written": [str(folder / f"out.{suffix}")],
        }
    saved = Features.load(folder / "out.safetensors")
    assert (folder / "out.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()
    truth = expected(folder, [f"pool/{path}" for path in paths])
    torch.testing.assert_close(saved.values, truth, rtol=1e-4, atol=1e-5)
    arrays = np.load(folder / "out.npz")
    table = parquet.read_table(folder / "out.parquet").to_pydict()
    head, *lines = csv.reader((folder / "out.csv").read_text().splitlines())
    assert head[:3] == ["path", "class", "feature0"] and {line[1] for line in lines} == {""}
    assert np.array_equal(np.array([line[2:] for line in lines], np.float32), saved.values.numpy())
    for names in (saved.paths, arrays["paths"].tolist(), table["path"], [line[0] for line in lines]):
        assert names == paths
    assert np.array_equal(arrays["values"], saved.values) and arrays["classes"].shape == (0,)
    assert np.array_equal(np.array(table["features"], np.float32), saved.values.numpy())
    assert set(table["class"]) == {None} and set(arrays["labels"]) == {-1}
    suffixes = ["csv", "npz", "parquet", "safetensors"]
    assert sorted(path.name for path in folder.glob("out*")) == [f"out.{suffix}" for suffix in suffixes]


def test_class_folders_are_kept(folder):
    from pyarrow import parquet

    for suffix in ("parquet", "npz"):
        assert run(folder, "--out", folder / f"out.{suffix}", data="classes") == 0
    table, arrays = parquet.read_table(folder / "out.parquet").to_pydict(), np.load(folder / "out.npz")
    assert table["path"] == ["class0/000.png", "class1/001.png"] and table["class"] == ["class0", "class1"]
    assert arrays["labels"].tolist() == [0, 1] and arrays["classes"].tolist() == ["class0", "class1"]


def test_names_that_are_not_utf8_are_escaped_in_parquet(folder):
    from pyarrow import parquet

    odd = os.fsdecode(b"\xff")
    (folder / "classes/class1").rename(folder / f"classes/{odd}")
    assert run(folder, "--out", folder / "out.parquet", data="classes") == 0
    table = parquet.read_table(folder / "out.parquet").to_pydict()
    assert table["path"] == ["class0/000.png", "\\udcff/001.png"] and table["class"] == ["class0", "\\udcff"]


def test_an_interrupted_call_is_continued(folder, monkeypatch):
    assert run(folder, "--out", folder / "whole.safetensors") == 0
    monkeypatch.setattr(embed, "CHUNK", 8)
    extract, sizes = features.extract, []

    def failing(*arguments):
        sizes.append(arguments[3])
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return extract(*arguments)

    monkeypatch.setattr(features, "extract", failing)
    assert run(folder, "--out", folder / "out.safetensors") == 130
    assert not (folder / "out.safetensors").exists() and (folder / "out.safetensors.partial").is_dir()
    assert run(folder, "--out", folder / "out.safetensors") == 0
    assert sizes == [8, 8, 8, 4]
    whole, parts = (Features.load(folder / f"{name}.safetensors") for name in ("whole", "out"))
    torch.testing.assert_close(whole.values, parts.values)  # of other batches
    assert whole.paths == parts.paths
    assert not (folder / "out.safetensors.partial").exists()


def test_neighbors_are_the_most_similar_others(folder):
    (folder / "pool/011.png").write_bytes((folder / "pool/003.png").read_bytes())
    assert run(folder, "--out", folder / "out.npz", "--neighbors", "3") == 0
    arrays = np.load(folder / "out.npz")
    values = arrays["values"].astype(np.float64)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    cosines = values @ values.T
    np.fill_diagonal(cosines, -2)
    rows = list(csv.DictReader((folder / "out-neighbors.csv").open()))
    assert len(rows) == 3 * 19
    for i, path in enumerate(arrays["paths"]):
        mine = rows[3 * i : 3 * i + 3]
        assert [row["image"] for row in mine] == [path] * 3 and [row["rank"] for row in mine] == ["1", "2", "3"]
        best = np.sort(cosines[i])[::-1][:3]
        assert [float(row["cosine"]) for row in mine] == pytest.approx(best, abs=1e-4)
        assert path not in [row["neighbor"] for row in mine]
    equal = {row["image"]: row["neighbor"] for row in rows if float(row["cosine"]) > 0.99999 and row["rank"] == "1"}
    assert equal["003.png"] == "011.png" and equal["011.png"] == "003.png"
    sheet = np.asarray(Image.open(folder / "out-neighbors.png"))
    assert sheet.shape == (12 * 100, 4 * 100 + 12, 3)
    first = np.asarray(Image.open(folder / "pool/000.png").resize((96, 96), Image.Resampling.BICUBIC, (2, 0, 22, 20)))
    assert np.array_equal(sheet[:96, :96], first)


def test_chunks_of_unreadable_images_are_left_out(folder, monkeypatch, capsys):
    monkeypatch.setattr(embed, "CHUNK", 7)
    for i in range(7):
        (folder / f"pool/{i:03d}.png").write_bytes(b"no image")
    assert run(folder, "--out", folder / "out.npz") == 0
    assert np.load(folder / "out.npz")["paths"].tolist() == [f"{i:03d}.png" for i in range(8, 20)]
    for path in (folder / "pool").iterdir():
        path.write_bytes(b"no image")
    assert run(folder, "--out", folder / "none.npz") == 1
    assert f"none of 20 images in {folder / 'pool'} could be read" in capsys.readouterr().err


def test_of_equal_images_each_is_left_out_of_its_own_neighbors():
    rows = torch.tensor([[1, 0, 2], [1, 0, 2], [1, 0, 3], [3, 2, 1]])  # image 2 is not among its three nearest
    similarity = torch.arange(12.0).view(4, 3)
    kept, others = without_self(similarity, rows)
    assert others.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert kept.tolist() == [[0, 2], [4, 5], [6, 7], [10, 11]]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out", "x.txt"], "out must end in .safetensors, .npz, .csv, .parquet, got x.txt"),
        (["--neighbors", "19"], "neighbors must be less than the number of images, 19, got 19"),
        (["--neighbors", "-1"], "neighbors must be at least 0, got -1"),
        (["--out", "x.parquet"], "needs pyarrow: pip install pyarrow"),
    ],
)
def test_errors_are_one_line(folder, capsys, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    assert run(folder, *words) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(folder.glob("x*")) and not (folder / "features.safetensors").exists()
