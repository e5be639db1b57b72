import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from dino_train.cli import main
from dino_train.config.presets import EMBEDDED_DATA
from dino_train.data.folder import ImageFolder
from dino_train.evaluate import report
from dino_train.evaluate.report import PANELS, POINTS, checks, draw, principal_colors, spread, thin, tiles
from dino_train.models.weights import load_trained
from PIL import Image
from tiny_run import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("report")) / "run"


@pytest.fixture(scope="module")
def page(run):
    assert main(["evaluate", "report", "--run", str(run), "--device", "cpu"]) == 0
    return run / "report.html"


def a_row(step=10, loss=3.0, entropy=4.0, single=3.0):
    return {"step": step, "epoch": 0, "loss": loss, "teacher_entropy": entropy, "teacher_single_entropy": single}


def test_the_page_shows_the_run(run, page):
    text = page.read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    assert f"<b>{last['loss']:.3f}</b>" in text and f"step {last['step']:,}" in text
    assert f"<b>{[row['knn10'] for row in rows if 'knn10' in row][-1]:.1f} %</b>" in text
    assert text.count("<svg ") == len(PANELS) - 2  # DINO has no spread and no patches
    for name, value in json.loads((run / "config.json").read_text()).items():
        shown = name.replace("_", "_<wbr>")  # allowed line breaks in long names
        assert re.search(rf"<td>{shown}</td><td[^>]*>{re.escape(str(value))}</td>", text), name
    assert '<td class="set">vit_nano</td>' in text and "<td>lr</td><td>0.0005</td>" in text  # bold: not the default
    assert text.count('"cell"') == 2 * (1 + 1 + 3) + 2 * 2 + 2 * (1 + 5)  # two images; three heads; five neighbors
    assert "$" not in re.sub(r"<style>.*</style>", "", text, flags=re.DOTALL)
    # Nothing is loaded from other files: no link, no script, only embedded images.
    assert not re.findall(r"<(?:script|link|iframe|object)\b", text)
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r'src="([^"]*)"', text))
    assert len(re.findall(r'\bid="', text)) == len(set(re.findall(r'\bid="([^"]*)"', text)))


def test_json_and_another_output_path(run, tmp_path, capsys):
    words = ["evaluate", "report", "--checkpoint", str(run), "--device", "cpu", "--json"]
    assert main([*words, "--output", str(tmp_path / "sub/page.html")]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["output"] == str(tmp_path / "sub/page.html") and values["step"] > 0 and values["warnings"] == []
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["page.html"]


def test_checks_for_a_collapse():
    log_k = math.log(64)
    well = [a_row() for _ in range(20)]
    assert [fine for fine, _ in checks(well, log_k)] == [True, True, True]
    uniform = well + [a_row(loss=log_k, entropy=log_k, single=log_k)] * 10
    assert [fine for fine, _ in checks(uniform, log_k)] == [True, False, True]
    assert "in 10 of the last 10 lines; it is 4.16 now and was 3.00 in the first" in checks(uniform, log_k)[1][1]
    assert [fine for fine, _ in checks(uniform[:-1], log_k)] == [True, True, True]  # only nine in a row
    constant = well + [a_row(entropy=1.0, single=1.0)] * 10
    assert [fine for fine, _ in checks(constant, log_k)] == [True, True, False]
    assert [fine for fine, _ in checks([*well, a_row(loss=math.nan)], log_k)] == [False, True, True]


def test_checks_for_a_collapse_of_patches():
    def row(loss=3.0, entropy=3.0, single=2.0):
        patches = {"patch_entropy": entropy, "patch_kl_to_uniform": math.log(32) - entropy, "patch_loss": 1.0}
        return {**a_row(loss=loss + 1), "class_loss": loss, **patches, "patch_single_entropy": single}

    log_k = math.log(64)
    for last, fine in (
        (row(), [True, True, True, True]),
        (row(loss=log_k), [True, True, False, True]),  # of class tokens
        (row(entropy=1.0, single=1.0), [True, False, True, True]),
        (row(entropy=math.log(32), single=math.log(32)), [True, False, True, True]),
    ):
        assert [well for well, _ in checks([row(), *[last] * 10], log_k)] == fine
    shown = "".join(tiles([{**row(), "images_per_second": 1.0}], {"epochs": 3, "out_dim": 64}))
    assert "Loss of class tokens</span><b>3.000<" in shown and "ln K = 4.16" in shown
    uniform = checks([row(), *[last] * 10], log_k)[1][1]
    assert uniform == "All patches get the same output in 0 of the last 10 lines, a uniform one in 10."


def test_a_long_curve_is_averaged():
    points = [(float(i), float(i % 2)) for i in range(10 * POINTS)]
    short = thin(points)
    assert len(short) == POINTS and short[0] == (4.5, 0.5) and {y for _, y in short} == {0.5}
    assert thin(points[:POINTS]) == points[:POINTS]
    rows = [a_row(step, loss=3 + step % 3) for step in range(50_000)]
    assert len(draw(PANELS[0], rows, 4.0)) < 60_000
    assert draw(PANELS[1], rows, 4.0) == ""  # no k-NN in these rows


def test_a_run_without_its_images_or_weights_still_has_its_curves(run, tmp_path, capsys, caplog):
    folder = tmp_path / "moved"
    folder.mkdir()
    for name in ("metrics.jsonl", "config.json"):
        shutil.copy(run / name, folder)
    assert main(["evaluate", "report", "--run", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert text.count("<svg ") == len(PANELS) - 2 and "No images: no checkpoint at" in text
    assert "no images: no checkpoint at" in caplog.text
    shutil.copy(run / "last.pt", folder)
    config = json.loads((run / "config.json").read_text()) | {"data": "/nowhere"}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", "report", "--run", str(folder)]) == 0
    assert "No images: no such folder, zip or tar file: /nowhere" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda f: (f / "metrics.jsonl").unlink(),
            "no metrics.jsonl in .*: expected the folder of a run of dino-train",
        ),
        (lambda f: (f / "config.json").unlink(), "no config.json in"),
        (lambda f: (f / "metrics.jsonl").write_text('{"step": 0, "knn10": 1}\n'), "has not logged a training step yet"),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n'),
            "lack epoch, images_per_sec",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: shutil.rmtree(f), r"no metrics.jsonl in \S*/run: expected"),
    ],
)
def test_an_invalid_run_is_reported(run, tmp_path, capsys, spoil, message):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "report.html").unlink(missing_ok=True)
    spoil(folder)
    assert main(["evaluate", "report", "--run", str(folder)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error, error
    assert not (folder / "report.html").exists()


def test_attention_is_of_the_image_not_of_its_thumbnail(run, monkeypatch):
    trained = load_trained(run)
    trained.image_size = 200
    seen = []
    original = report.attention_of
    monkeypatch.setattr(
        report, "attention_of", lambda b, view, size, scale: seen.append((view, size)) or original(b, view, size, scale)
    )
    images = ImageFolder(EMBEDDED_DATA).subset([0])
    images.view = lambda i: Image.new("RGB", (500, 450))
    (cells,) = report.attention_rows(trained, images)
    assert seen[0][0].size == (400, 400) and seen[0][1] == 400 and len(cells) == 2 + 3


def test_components_of_gradients_are_the_gradients():
    """Of features along three orthogonal directions, hidden among others; signs: the largest loading is positive."""
    n, side = 4, 20
    ramp = torch.linspace(-1, 1, side)
    of_image = torch.tensor([1.0, -1.0, -1.0, 1.0])
    zero = torch.zeros(n, side, side)
    gradients = [zero + ramp, zero + ramp[:, None], zero + of_image[:, None, None]]  # to the right, down, by image
    directions = torch.linalg.qr(torch.randn(6, 3, generator=torch.Generator().manual_seed(0))).Q.T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    strengths = (3.0, 2.0, 0.5)
    parts = zip(strengths, gradients, directions * largest.sign(), strict=True)
    maps = 7 + sum(strength * each[..., None] * direction for strength, each, direction in parts)
    colors = principal_colors(maps)
    assert colors.shape == (n, side, side, 3) and colors.dtype == np.uint8
    for channel, gradient in enumerate(gradients):
        low, high = np.percentile(gradient, (1, 99))
        expected = 255 * ((gradient.numpy() - low) / (high - low)).clip(0, 1)
        assert abs(colors[..., channel] - expected).max() <= 0.51
    assert (principal_colors(torch.ones(1, 2, 2, 3)) == 0).all()


def test_names_with_html_and_invalid_unicode(run, tmp_path):
    name = 'x"<b>\udcff'
    for i, (folder, color) in enumerate((name, c) for _ in range(10) for c in ("red", "blue")):
        path = tmp_path / "images" / (folder if i % 2 else "y") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), color).save(path)
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text()) | {"data": str(tmp_path / "images")}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", "report", "--run", str(folder), "--device", "cpu"]) == 0
    text = (folder / "report.html").read_text("utf-8")
    assert "x&quot;&lt;b&gt;?" in text and "<b>?" not in text


def test_spread():
    class Images(list):
        def subset(self, indices):
            return [self[i] for i in indices]

    assert spread(Images(range(10)), 4) == [0, 2, 5, 7] and spread(Images(range(3)), 4) == [0, 1, 2]


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width, height", [(1280, 800), (375, 812)])
def test_a_browser_shows_it(page, width, height):
    with Browser() as browser:
        browser.open(page, width, height)
        assert not browser.log  # errors, violations of the content policy, console
        assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")  # no horizontal overflow
        assert browser.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        boxes = browser.evaluate(
            "[...document.querySelectorAll('figure svg, .cell img, .tiles .card, .checks li, td')]"
            ".map(e => e.getBoundingClientRect()).map(b => [b.left, b.right, b.width, b.height])"
        )
        assert len(boxes) > 50
        for left, right, box_width, box_height in boxes:
            assert box_width >= 40 and box_height >= 15 and left >= 0 and right <= width
        assert browser.evaluate("[...document.querySelectorAll('.row')].every(e => e.scrollWidth <= e.clientWidth)")
        figures = browser.evaluate("[...document.querySelectorAll('figure')].map(e => e.getBoundingClientRect().left)")
        assert len(set(figures)) == (3 if width > 600 else 1)  # columns
        letters = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
        assert browser.evaluate(f"Math.min(...{letters})") > 9  # text of the curves is readable
