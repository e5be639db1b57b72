"""One HTML page about a run: curves, checks for collapse, images, options. It needs no other files and no internet."""

import base64
import io
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dino_train.common.files import atomic
from dino_train.common.metrics import METRICS, class_loss, collapse_signs, read_metrics
from dino_train.common.views import View, as_picture, center_crop, resize, size_of, whole_patches
from dino_train.config.pretrain import PretrainConfig, default_workers
from dino_train.data.decode import UnreadableImage
from dino_train.data.folder import ImageFolder, split
from dino_train.data.loader import BadImages, eval_loader
from dino_train.evaluate.attention import attention_of, heat, overlay, to_range
from dino_train.evaluate.features import extract
from dino_train.evaluate.knn import nearest
from dino_train.evaluate.protocol import Protocol, dense_size
from dino_train.models.plain_vit import ViT
from dino_train.models.weights import Trained

CELL = 120  # side of an image on the page, in pixels
PICTURES = 8  # number of held-out images on the page
NEIGHBORS = 5
GALLERY = 2048  # training images that are searched for neighbors
POINTS = 300  # maximum per curve; longer curves are averaged
LAST_LINES = 10  # of the log that are checked for a collapse, as in `CollapseWatch`
ENTROPIES = ("teacher_entropy", "teacher_single_entropy")
COLORS = ("#2563eb", "#d97706", "#059669")

Row = dict[str, Any]


class Panel(NamedTuple):
    """A figure: title, unit and metrics (name in metrics.jsonl, label)."""

    title: str
    unit: str
    series: Sequence[tuple[str, str]]
    level: str = ""  # label of a dashed line at ln K


PANELS = (
    Panel(
        "Loss",
        "nats",
        [("loss", "loss"), ("class_loss", "of class tokens"), ("patch_loss", "of hidden patches")],
        "ln K, uniform outputs",
    ),
    Panel("k-NN accuracy", "%", [("knn10", "k = 10"), ("knn20", "k = 20")]),
    Panel("View retrieval", "%, recall at 1", [("retrieval", "retrieval")]),
    Panel(
        "Teacher entropy",
        "nats",
        [("teacher_entropy", "of the mean output"), ("teacher_single_entropy", "of one image's output")],
        "ln K",
    ),
    Panel(
        "Teacher entropy of patches",
        "nats",
        [("patch_entropy", "of the mean output"), ("patch_single_entropy", "of one patch's output")],
    ),
    Panel("Spread of the outputs", "1 is the most", [("spread", "spread"), ("positive_cosine", "cosine of two views")]),
    Panel("Throughput", "images/s", [("images_per_second", "images/s")]),
    Panel("Learning rate", "", [("lr", "lr")]),
    Panel("Weight decay", "", [("weight_decay", "weight decay")]),
    Panel("Teacher momentum", "", [("momentum", "momentum")]),
    Panel("Teacher temperature", "", [("teacher_temp", "temperature")]),
)


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: if there are more, means of neighboring points."""
    n = math.ceil(len(points) / POINTS)
    if n <= 1:
        return points
    groups = [points[i : i + n] for i in range(0, len(points), n)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def draw(panel: Panel, rows: list[Row], log_k: float) -> str:
    """The panel as an SVG element; empty if no row has its metrics."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    curves = [(label, [(r["step"], r[name]) for r in rows if name in r]) for name, label in panel.series]
    if not any(points for _, points in curves):
        return ""
    # Text stays text, in the font of the page; the names of clip paths differ between the figures.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 9}
    with rc_context(style), io.StringIO() as file:
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        axis = figure.subplots()
        for (label, points), color in zip(curves, COLORS, strict=False):
            if points:
                axis.plot(*zip(*thin(points), strict=True), label=label, color=color, lw=1.6)
                if len(points) < 40:
                    axis.lines[-1].set_marker(".")
        if panel.level and any(ENTROPIES[0] in row for row in rows):
            level = panel.level + " of class tokens" * any("class_loss" in row for row in rows)
            axis.axhline(log_k, color="#6b7280", lw=1, ls="--", label=level)
        if len(axis.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_xlabel("step")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = file.getvalue()
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(panel.title)} over steps" ', 1)


def checks(rows: list[Row], log_k: float) -> list[tuple[bool, str]]:
    """(passed, description) of each check of the last lines of the log."""
    last, newest = rows[-LAST_LINES:], rows[-1]
    signs = [collapse_signs(row, log_k) for row in last]
    constant = sum(sign["constant"] for sign in signs)
    finite = sum(math.isfinite(row["loss"]) for row in rows)
    same = f"All images get the same output in {constant} of the last {len(last)} lines; "
    found = [(finite == len(rows), f"The loss is finite in {finite} of {len(rows)} lines of the log.")]
    if "spread" in newest:
        return [*found, (constant < len(last), f"{same}the spread of the outputs is {newest['spread']:.2f}.")]
    uniform = sum(sign["uniform"] for sign in signs)
    mean, single = (newest[name] for name in ENTROPIES)
    if "patch_entropy" in newest:
        collapsed = [sum(sign.get(f"{kind} patches", False) for sign in signs) for kind in ("constant", "uniform")]
        text = "All patches get the same output in {} of the last {} lines, a uniform one in {}."
        found.append((max(collapsed) < len(last), text.format(collapsed[0], len(last), collapsed[1])))
    return [
        *found,
        (
            uniform < len(last),
            f"The loss{' of class tokens' * ('class_loss' in newest)} is at ln K = {log_k:.2f} (uniform outputs) in "
            f"{uniform} of the last {len(last)} lines; "
            f"it is {class_loss(newest):.2f} now and was {class_loss(rows[0]):.2f} in the first line.",
        ),
        (
            constant < len(last),
            f"{same}the entropy of the mean output is {mean:.2f}, of one image's output {single:.2f} on average: the "
            f"outputs have {mean - single:.2f} nats of information about the image.",
        ),
    ]


def data_uri(image: Image.Image) -> str:
    with io.BytesIO() as file:
        image.save(file, format="JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def cell(image: Image.Image, *lines: str, kind: str = "") -> str:
    """An image with lines of text below it; lines that are too long are cut off."""
    text = "".join(f'<div class="{kind}" title="{escape(line)}">{escape(line)}</div>' for line in lines)
    return f'<div class="cell"><img src="{data_uri(image)}" alt="{escape(" ".join(lines))}">{text}</div>'


def squared(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


def squared_view(view: View, side: int) -> View:
    if isinstance(view, Image.Image):
        return squared(view, side)
    short = min(size_of(view))
    return resize(center_crop(view, short, short), (side, side))


def grid(rows: Iterator[list[str]]) -> str:
    return "".join(f'<div class="row">{"".join(cells)}</div>' for cells in rows)


def spread(images: ImageFolder, count: int) -> ImageFolder:
    """At most `count` of the images, evenly spread."""
    count = min(count, len(images))
    return images.subset([i * len(images) // count for i in range(count)])


def class_of(images: ImageFolder, i: int) -> str:
    return images.classes[images.labels[i]] if images.labels else ""


def squares(images: ImageFolder, size: int) -> Iterator[tuple[View, str]]:
    """The readable images as squares of `size` pixels, with the names of their classes."""
    for i in range(len(images)):
        try:
            yield squared_view(images.view(i), size), class_of(images, i) or "image"
        except UnreadableImage as error:
            logging.warning("skipped %s", error)


def attention_rows(trained: Trained, images: ImageFolder) -> Iterator[list[str]]:
    """A row for each readable image: the image, an overlay of its mean attention map, and each map."""
    assert isinstance(trained.backbone, ViT)
    size = dense_size(trained)
    for view, name in squares(images, size):
        maps = attention_of(trained.backbone, view, size, images.scale)
        small = squared(as_picture(view), CELL)
        mean = cell(overlay(small, to_range(maps.mean(0))), "mean")
        heads = [cell(heat(m, small.size), f"head {h + 1}") for h, m in enumerate(to_range(maps))]
        yield [cell(small, name), mean, *heads]


def principal_colors(maps: Tensor) -> np.ndarray:
    """The first three principal components of features as red, green and blue.

    The components are those of all maps together; of each, the loading with the largest magnitude is positive. A
    color's 0 and 255 are the 1st and the 99th percentile of its component.

    Args:
        maps: [n, h, w, C], C of at least 3.

    Returns:
        uint8 [n, h, w, 3].
    """
    x = maps.double() - maps.double().mean((0, 1, 2))
    _, vectors = torch.linalg.eigh(torch.einsum("nhwc,nhwd->cd", x, x))  # ascending
    axes = vectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = (x @ axes).numpy()
    low, high = np.percentile(values, (1, 99), axis=(0, 1, 2))
    return np.rint(255 * ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)).astype(np.uint8)


@torch.no_grad()
def component_rows(trained: Trained, images: ImageFolder) -> Iterator[list[str]]:
    """A row for each readable image: the image, and the principal components of its patches' features as colors."""
    backbone, size = trained.backbone, dense_size(trained)
    assert isinstance(backbone, ViT)
    shown, maps = [], []
    for view, name in squares(images, size):
        pixels = whole_patches(view, size, backbone.patch_size, images.scale)
        tokens = backbone.features(pixels[None].to(backbone.cls_token.device))[-1][0, 1:].float().cpu()
        maps.append(tokens.unflatten(0, (pixels.shape[1] // backbone.patch_size, -1)))
        shown.append(cell(squared(as_picture(view), CELL), name))
    for image, colors in zip(shown, principal_colors(torch.stack(maps)), strict=True):
        side = len(colors) * math.ceil(CELL / len(colors))  # every patch is equally many pixels
        yield [image, cell(Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST), "components")]


def neighbor_rows(trained: Trained, queries: ImageFolder, gallery: ImageFolder) -> Iterator[list[str]]:
    """A row for each readable query: the query and the training images with the most similar features (cosine)."""
    found = []
    for images, title in ((queries, ""), (gallery, "neighbors")):
        loader = eval_loader(images, trained.image_size, 64, default_workers())
        found.append(extract(trained.backbone, trained.backbone, loader, len(images), BadImages(len(images), 0), title))
    (own, _, own_indices), (others, _, indices) = found
    if not len(own) or not len(others):
        raise ValueError("none of the images could be read")
    k = min(NEIGHBORS, len(others))
    similarity, rows = nearest(F.normalize(others, dim=1), F.normalize(own, dim=1), k)
    for query, values, neighbors in zip(own_indices.tolist(), similarity.tolist(), indices[rows].tolist(), strict=True):
        name = class_of(queries, query)
        cells = [cell(squared(queries.load(query), CELL), name or "query")]
        for value, i in zip(values, neighbors, strict=True):
            other = class_of(gallery, i)
            lines = (other, f"{value:.3f}") if other else (f"{value:.3f}",)
            cells.append(cell(squared(gallery.load(i), CELL), *lines, kind="same" if name and name == other else ""))
        yield cells


def pictures(report: "Report", config: Row) -> dict[str, str]:
    """The sheets of images and the caption of the neighbors; if weights or images are not available, the reason."""
    try:
        trained = report.load()
        train, held_out = (part.scaled(trained.scale) for part in split(Path(config["data"])))
        if not len(held_out):
            raise ValueError(f"no image of {config['data']} is held out")
        queries, gallery = spread(held_out, PICTURES), spread(train, GALLERY)
        neighbors = grid(neighbor_rows(trained, queries, gallery))
        attention = components = f"{trained.arch} has no patches and no self-attention."
        if isinstance(trained.backbone, ViT):
            attention, components = (grid(rows(trained, queries)) for rows in (attention_rows, component_rows))
    except (ValueError, OSError) as error:
        logging.warning("no images: %s", error)
        return dict.fromkeys(("attention", "components", "neighbors"), f"No images: {escape(str(error))}") | {
            "gallery": ""
        }
    about = (
        f"Held-out images and the {NEIGHBORS} training images, of {len(gallery)}, with the most similar features "
        "(cosine)." + (" Green: of the same class; no label was used in training." if train.labels else "")
    )
    return {"attention": attention, "components": components, "neighbors": neighbors, "gallery": about}


def tile(title: str, value: str, note: str) -> str:
    return f'<div class="card"><span class="soft">{title}</span><b>{value}</b><span class="soft">{note}</span></div>'


def tiles(rows: list[Row], config: Row) -> Iterator[str]:
    """The most important numbers."""
    logged = [row for row in rows if "loss" in row]
    yield tile("Epoch", f"{logged[-1]['epoch'] + 1} of {config['epochs']}", f"step {logged[-1]['step']:,}")
    title = "Loss of class tokens" if "class_loss" in logged[-1] else "Loss"
    yield tile(title, f"{class_loss(logged[-1]):.3f}", f"ln K = {math.log(config['out_dim']):.2f}")
    for name, title in (("knn10", "k-NN, k = 10"), ("knn20", "k-NN, k = 20"), ("retrieval", "View retrieval")):
        values = [row[name] for row in rows if name in row]
        if values:
            yield tile(title, f"{values[-1]:.1f} %", f"from {values[0]:.1f}, best {max(values):.1f}")
    rates = sorted(row["images_per_second"] for row in logged)
    yield tile("Images per second", f"{rates[len(rates) // 2]:,.0f}", "median")


def settings(config: Row) -> str:
    """Rows of a table: each option, marked if it is not the default."""
    defaults = default_settings()
    marked = ((name, value, "" if value == defaults.get(name) else ' class="set"') for name, value in config.items())
    return "".join(
        f"<tr><td>{escape(name).replace('_', '_<wbr>')}</td><td{mark}>{escape(str(value))}</td></tr>"
        for name, value, mark in marked
    )


def default_settings() -> Row:
    return json.loads(json.dumps(PretrainConfig().plain()))  # tuples become lists, as in config.json


def read_run(folder: Path) -> tuple[list[Row], Row]:
    """The rows of a run's metrics.jsonl and its config.json.

    Raises:
        ValueError: one of them is missing or damaged, or no training step is logged yet.
    """
    for name in (METRICS, "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"no {name} in {folder}: expected the folder of a run of dino-train pretrain")
    rows = read_metrics(folder)
    logged = [row for row in rows if "loss" in row]
    if not logged:
        raise ValueError(f"{folder / METRICS} has no line with a loss: the run has not logged a training step yet")
    health = {"spread"} if "spread" in logged[0] else {*ENTROPIES}
    wanted = {"step", "epoch", "images_per_second"} | health
    if missing := {name for row in logged for name in wanted - row.keys()}:
        raise ValueError(
            f"lines of {folder / METRICS} lack {', '.join(sorted(missing))}: expected what dino-train writes"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: {error}") from error
    return rows, default_settings() | config


def write_page(path: Path, page: str) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # file names may be invalid Unicode


def verdict(well: bool, text: str) -> str:
    kind, word = ("good", "OK") if well else ("bad", "Warn")
    return f'<li class="{kind}"><strong>{word}</strong>{escape(text)}</li>'


def figures(rows: list[Row], log_k: float) -> Iterator[str]:
    for panel in PANELS:
        if svg := draw(panel, rows, log_k):
            caption = f"<figcaption>{panel.title} <span>{panel.unit}</span></figcaption>"
            yield f'<figure class="card">{caption}{svg}</figure>'


@dataclass(kw_only=True)
class Report(Protocol):
    """One HTML page about a run: curves, checks for collapse, attention, features, neighbors, options."""

    checkpoint: Path
    """A run's folder, with metrics.jsonl and config.json."""
    output: Path | None = None
    """Output file. Default: report.html in the run's folder."""

    def run(self) -> None:
        folder = self.checkpoint.parent if self.checkpoint.is_file() else self.checkpoint
        rows, config = read_run(folder)
        logged = [row for row in rows if "loss" in row]
        log_k = math.log(config["out_dim"])
        verdicts = checks(logged, log_k)
        sheets = pictures(self, config)
        averaged = math.ceil(len(logged) / POINTS)
        page = Template(Path(__file__).with_suffix(".html").read_text("utf-8")).substitute(
            title=escape(str(folder if folder.name else folder.resolve())),
            about=escape(
                f"{config['arch']}, K = {config['out_dim']}, {config['batch_size_per_gpu']} images a step and process, "
                f"2 + {config['local_crops_number']} crops, {config['precision']}; data {config['data']}"
            ),
            tiles="".join(tiles(rows, config)),
            checks="".join(verdict(*each) for each in verdicts),
            averaged=f" Each point of a long curve is a mean of {averaged} lines of the log." if averaged > 1 else "",
            curves="".join(figures(rows, log_k)),
            **sheets,
            configuration=settings(config),
        )
        path = self.output or folder / "report.html"
        write_page(path, page)
        warnings = [text for well, text in verdicts if not well]
        self.report(
            {"protocol": "report", "output": str(path), "step": rows[-1]["step"], "warnings": warnings},
            "\n".join([f"{path}, {len(page) / 1e6:.1f} MB", *(f"warning: {text}" for text in warnings)]),
        )
