"""`dino-train compare`: methods trained on the same images for the same number of them, and for the same time."""

import json
import logging
import math
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dino_train.common.files import atomic
from dino_train.common.metrics import read_metrics
from dino_train.common.process import peak_memory, tune
from dino_train.config.options import require_least
from dino_train.config.presets import EMBEDDED_DATA, recipe
from dino_train.config.pretrain import PretrainConfig, default_workers
from dino_train.data.folder import ImageFolder, pretraining_split
from dino_train.engine.train import Interrupted, NonFiniteLoss, pretrain
from dino_train.evaluate import knn_accuracy
from dino_train.evaluate.baselines import Baselines, K
from dino_train.evaluate.protocol import require_labels
from dino_train.methods.flops import flops_per_image
from dino_train.models.vit import ARCHS
from dino_train.models.weights import Trained

# What `--methods` names: a method, and what is not its default.
VARIANTS: dict[str, dict[str, Any]] = {
    "dino": {"method": "dino"},
    "dino-sinkhorn": {"method": "dino", "centering": "sinkhorn"},
    "byol": {"method": "byol"},
    "mocov2": {"method": "moco"},
    "mocov3": {"method": "moco", "predictor": True, "queue_size": 0, "student_temp": 0.2},
    "swav": {"method": "swav"},
    "ibot": {"method": "ibot"},
}
RATES = (1 / 3, 1.0, 3.0)  # times a method's own learning rate, tried with --sweep
NOTE = (
    "On 1,000 test images a k-NN accuracy of 30 % has a standard error of 1.45 points, and another seed is worth 1 to "
    "2: differences below 3 to 4 points mean nothing. The table shows that methods train, not which is best."
)

Result = dict[str, Any]


@dataclass(kw_only=True)
class Compare:
    """Train methods on the same images and compare their features by k-NN and a linear probe.

    Equal images: each method sees as many. Equal time: each trains as long as the first. Called again after an
    interruption, it goes on. The table is compare.md, compare.json and compare.png in the output folder.
    """

    data: str = str(EMBEDDED_DATA)
    """Folder, .zip or .tar with class folders, as of pretrain and evaluate."""
    methods: tuple[str, ...] = ("dino", "byol", "mocov2", "mocov3", "swav")
    """Methods, each with the values of --preset demo: dino, dino-sinkhorn, byol, mocov2, mocov3, swav, ibot."""
    arch: Literal[ARCHS] = "vit_nano"  # type: ignore[valid-type]
    """Backbone."""
    budget_images: int = 48000
    """Images that a method sees, counted again in each epoch."""
    seeds: int = 3
    """Runs of each method and budget."""
    sweep: bool = False
    """Try a third of, once and three times each method's learning rate with seed 0, and take the best by k-NN on a
    fifth of the training images."""
    equal_time: bool = True
    """Also compare at equal time."""
    output_dir: Path = Path("runs/compare")
    """Folder for the runs and the table."""
    num_workers: int = field(default_factory=default_workers)
    """Threads that read images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one."""

    def run(self) -> None:
        require_least(self, budget_images=1, seeds=1, num_workers=1)
        if unknown := [name for name in self.methods if name not in VARIANTS] or not self.methods:
            raise ValueError(f"methods must be among {', '.join(VARIANTS)}, got {unknown or 'none'}")
        images, self.train, self.val = pretraining_split(self.data)
        self.count = len(images)
        require_labels({"training": self.train, "held-out": self.val})
        self._require_same()
        epochs = math.ceil(self.budget_images / self.count)
        for name in self.methods:  # what cannot be trained is refused before the first run
            self._config(name, self._folder(name, epochs, 1.0, 0), epochs, 1.0, 0)
        results: dict[str, list[Result]] = {}
        rows: dict[str, Result] = {}
        for name in self.methods:
            factor, cost = self._swept(name, epochs) if self.sweep else (1.0, 0.0)
            results[name] = [self._result(name, epochs, factor, seed) for seed in range(self.seeds)]
            rows[name] = self._row(results[name], factor) | {"sweep_seconds": cost}
        if self.equal_time:
            seconds = statistics.median(result["seconds"] for result in results[self.methods[0]])
            for name in self.methods:
                per_epoch = statistics.median(result["seconds"] for result in results[name]) / epochs
                longer = max(1, round(seconds / per_epoch))
                factor = rows[name]["rate"]
                runs = [self._result(name, longer, factor, seed) for seed in range(self.seeds)]
                rows[name]["time"] = self._row(runs, factor)
        first = self._folder(self.methods[0], epochs, rows[self.methods[0]]["rate"], 0)
        baselines = _once(self.output_dir / f"baselines-{self.seeds}-seeds.json", lambda: self._baselines(first))
        table = {"baselines": baselines, "methods": rows, "note": NOTE}
        _write(self.output_dir / "compare.json", json.dumps(table, indent=2) + "\n")
        _write(self.output_dir / "compare.md", text := "\n".join(markdown(table, epochs, len(self.val))) + "\n")
        plot(table, self.output_dir / "compare.png")
        print(text)

    def _require_same(self) -> None:
        """What the folder holds is of the same images and backbone."""
        asked = {"data": str(Path(self.data).resolve()), "arch": self.arch}
        found = _once(self.output_dir / "settings.json", lambda: asked)
        if found != asked:
            raise ValueError(
                f"{self.output_dir} holds a comparison of {found['arch']} on {found['data']}, not of {self.arch} on "
                f"{asked['data']}: choose another --output-dir"
            )

    def _config(self, name: str, folder: Path, epochs: int, factor: float, seed: int) -> PretrainConfig:
        variant = VARIANTS[name]
        settings = {**recipe(variant["method"], "demo", self.arch), **variant, "arch": self.arch, "data": self.data}
        settings |= {"epochs": epochs, "seed": seed, "output_dir": folder, "device": self.device, "knn_freq": 0}
        config = PretrainConfig(**settings, num_workers=self.num_workers, resume=(folder / "last.pt").exists())
        return replace(config, lr=factor * config.lr)

    def _swept(self, name: str, epochs: int) -> tuple[float, float]:
        """The best factor of the learning rate by k-NN on images that were trained on without labels, and the seconds
        that it took to find."""
        tried = {factor: self._outcome(name, epochs, factor, 0) for factor in RATES}
        trained = [factor for factor in RATES if "diverged" not in tried[factor]]
        if not trained:
            raise ValueError(f"{name} has diverged with each learning rate: {tried[RATES[0]]['diverged']}")
        best = max(trained, key=lambda factor: self._validation(self._folder(name, epochs, factor, 0)))
        return best, sum(result["seconds"] for factor, result in tried.items() if factor != best)

    def _result(self, name: str, epochs: int, factor: float, seed: int) -> Result:
        result = self._outcome(name, epochs, factor, seed)
        if "diverged" in result:
            raise ValueError(f"{name} with seed {seed}: {result['diverged']}; --sweep tries lower rates")
        return result

    def _outcome(self, name: str, epochs: int, factor: float, seed: int) -> Result:
        """Of one run, from its file where it is done; of one whose loss became infinite "diverged" and its seconds."""
        folder = self._folder(name, epochs, factor, seed)
        return _once(folder / "result.json", lambda: self._trained(name, folder, epochs, factor, seed))

    def _validation(self, folder: Path) -> float:
        """k-NN accuracy of a run on a fifth of its training images."""

        def judge() -> float:
            trained = self._evaluation(folder).load()
            fifth = [i for i in range(len(self.train)) if i % 5 == 0]
            rest = [i for i in range(len(self.train)) if i % 5]
            seen, size = self.train.scaled(trained.scale), trained.image_size
            parts = seen.subset(rest), seen.subset(fifth)
            accuracies = knn_accuracy(trained.backbone, *parts, size, ks=[K], num_workers=self.num_workers)
            return accuracies[f"knn{K}"]

        return _once(folder / "validation.json", judge)

    def _folder(self, name: str, epochs: int, factor: float, seed: int) -> Path:
        return self.output_dir / name / f"{epochs}-epochs-rate-{factor:.2g}-seed-{seed}"

    def _trained(self, name: str, folder: Path, epochs: int, factor: float, seed: int) -> Result:
        config = self._config(name, folder, epochs, factor, seed)
        print(f"{name}, {epochs} epochs, learning rate x {factor:.2g}, seed {seed}", flush=True)
        end = folder / "end.json"
        if not end.exists():  # of a run that was trained before, the peak would be that of reading it
            process = multiprocessing.get_context("spawn").Process(target=_train, args=(config, end))
            process.start()
            process.join()
            if process.exitcode:
                raise ValueError(f"{name} with seed {seed} has failed, see above; the same command goes on from there")
        values = json.loads(end.read_text())
        if "diverged" in values:
            return values
        evaluation = self._evaluation(folder)
        trained = evaluation.load()
        result = evaluation.of_backbone(trained, trained.backbone, *self._parts(trained))
        logged = [row for row in read_metrics(folder) if "images_per_second" in row]
        rate = statistics.median(row["images_per_second"] for row in logged)
        flops = flops_per_image(config)
        result |= {"images_per_second": rate, "seconds": epochs * self.count / rate}
        result |= {"gflop_per_image": flops / 1e9, "tflops": flops * rate / 1e12}
        return result | values

    def _row(self, results: list[Result], factor: float) -> Result:
        """Means and deviations over the seeds; the median of what is a speed."""
        row = {"rate": factor, "crops": results[0]["crops"], "epochs": results[0]["epochs"], **_over_seeds(results)}
        for name in ("images_per_second", "gflop_per_image", "tflops", "peak_mib"):
            row[name] = statistics.median(result[name] for result in results)
        return row

    def _baselines(self, folder: Path) -> dict[str, Result]:
        """Of the pixels, and of random weights with each seed, with the preprocessing of a run."""
        evaluations = [self._evaluation(folder, seed) for seed in range(self.seeds)]
        trained = evaluations[0].load()
        random = [
            evaluation.of_backbone(trained, evaluation.untrained(trained), *self._parts(trained))
            for evaluation in evaluations
        ]
        rows: dict[str, Result] = {"raw pixels": evaluations[0].of_pixels(trained, *self._parts(trained))}
        rows["random weights"] = _over_seeds(random)
        return rows

    def _parts(self, trained: Trained) -> tuple[ImageFolder, ImageFolder]:
        """The images to train on and those held out, as the backbone has seen them."""
        return self.train.scaled(trained.scale), self.val.scaled(trained.scale)

    def _evaluation(self, folder: Path, seed: int = 0) -> Baselines:
        return Baselines(
            checkpoint=folder, data=Path(self.data), device=self.device, num_workers=self.num_workers, seed=seed
        )


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text)


def _once(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, or what is made now and written there."""
    if not path.exists():
        _write(path, json.dumps(make()))
    return json.loads(path.read_text())


def _over_seeds(results: list[Result]) -> Result:
    """Mean and deviation of both accuracies."""
    row: Result = {}
    for name in ("knn10", "linear"):
        values = [result[name] for result in results]
        row |= {name: statistics.mean(values), f"{name}_sd": statistics.stdev(values) if len(values) > 1 else 0.0}
    return row


def _train(config: PretrainConfig, end: Path) -> None:
    """In a process of its own, whose peak memory is the run's; writes that, or how it diverged, to `end`. If its parent
    dies it stops, with a checkpoint."""
    tune()  # a new process has the environment of its parent, but not its allocator's settings
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    began = time.monotonic()
    try:
        pretrain(config)
    except NonFiniteLoss as error:
        _write(end, json.dumps({"diverged": str(error), "seconds": time.monotonic() - began}))
        return
    except (ValueError, OSError, Interrupted) as error:
        sys.exit(f"dino-train: error: {error}")
    crops = f"2 + {config.local_crops_number}"
    _write(end, json.dumps({"peak_mib": peak_memory(), "crops": crops, "epochs": config.epochs}))


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def markdown(table: dict[str, Any], epochs: int, val: int) -> Iterator[str]:
    """The table as lines of Markdown."""
    yield f"Top-1 in % of {val} held-out images, mean and deviation over the seeds. Equal images: {epochs} epochs."
    yield ""
    yield "| method | budget | epochs | crops | k-NN | linear | images/s | GFLOP/image | TFLOP/s | peak MiB | lr |"
    yield "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|"
    for name, row in table["baselines"].items():
        yield f"| {name} | - | - | - | {_spread(row, 'knn10')} | {_spread(row, 'linear')} | - | - | - | - | - |"
    for name, of_method in table["methods"].items():
        for budget, row in (("images", of_method), ("time", of_method.get("time"))):
            if row:
                yield (
                    f"| {name} | {budget} | {row['epochs']} | {row['crops']} | {_spread(row, 'knn10')} | "
                    f"{_spread(row, 'linear')} | {row['images_per_second']:.0f} | {row['gflop_per_image']:.3g} | "
                    f"{row['tflops']:.3f} | {row['peak_mib']:.0f} | x {row['rate']:.2g} |"
                )
    yield ""
    if swept := sum(row["sweep_seconds"] for row in table["methods"].values()):
        yield f"The other learning rates of the sweep took {swept:.0f} s of training."
        yield ""
    yield table["note"]


def _spread(row: Result, name: str) -> str:
    return f"{row[name]:.1f} ± {row[f'{name}_sd']:.1f}" if f"{name}_sd" in row else f"{row[name]:.1f}"


def plot(table: dict[str, Any], path: Path) -> None:
    """k-NN and linear accuracy of each method at equal images, with the baselines as lines."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logging.warning("%s is not drawn, matplotlib is not installed", path)
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    names, rows = list(table["methods"]), list(table["methods"].values())
    for axis, (metric, title) in zip(
        figure.subplots(1, 2), (("knn10", "k-NN, k = 10"), ("linear", "linear probe")), strict=True
    ):
        axis.bar(names, [row[metric] for row in rows], yerr=[row[f"{metric}_sd"] for row in rows], color="#9bbbe0")
        for (name, row), style in zip(table["baselines"].items(), ("--", ":"), strict=True):
            axis.axhline(row[metric], color="#444444", lw=1, ls=style, label=name)
        axis.set(title=title, ylabel="top-1, %")
        axis.tick_params(axis="x", rotation=20)
        axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
