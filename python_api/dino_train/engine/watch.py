"""Output of a run for the user: progress, warnings of a collapse, curves."""

import logging
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from dino_train.common.metrics import collapse_signs, read_metrics
from dino_train.engine.log import duration

logger = logging.getLogger(__name__)
SILENT_SECONDS = 2.0


class Progress:
    """A progress bar on a terminal, otherwise a line every `interval` steps, and sooner where steps are long; no output
    if `quiet`. `record` gets every line in any case."""

    record: Callable[[str], None] = staticmethod(lambda text: None)

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet, self.bar = quiet, None

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says what is being done inside this context, if it takes seconds."""
        timer = threading.Timer(SILENT_SECONDS, self.say, [f"{what} ..."])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def begin(self, first: int, total: int, epochs: int, batch: int, interval: int) -> None:
        """Of steps first .. total - 1."""
        self.first, self.total, self.epochs, self.batch, self.interval = first, total, epochs, batch, interval
        self.start = self._shown = time.monotonic()
        self.rate, self.seconds = 0.0, 0.0
        self._last = (first, self.start)
        if sys.stderr.isatty() and not self.quiet:
            with suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True)

    def due(self, done: int) -> bool:
        """Call after step number `done`: advances the bar, and returns whether to call `update`."""
        if self.bar:
            self.bar.update(done - self.bar.n)
        return done % self.interval == 0 or done == self.total

    def update(self, done: int, epoch: int, loss: float, lr: float) -> None:
        """Write a line, and set `rate` and `seconds`: images per second and time since the last line."""
        now = self._shown = time.monotonic()
        step, then = self._last
        self.seconds = max(now - then, 1e-9)
        self.rate = (done - step) * self.batch / self.seconds
        self._last = (done, now)
        text = f"epoch {epoch + 1}/{self.epochs}  loss {loss:.4f}  lr {lr:.2e}  {self.rate:.1f} images/s"
        line = f"step {done}/{self.total}  {text}  ETA {self._remaining(done)}"
        if self.bar:
            self.bar.set_description(text)
            self.record(line)
        else:
            self.say(line)

    def between(self, done: int) -> None:
        """Call after a step that is not `due`: writes a line after a long first step, and where a minute passed."""
        now, limit = time.monotonic(), SILENT_SECONDS if done == self.first + 1 else 60
        if now - self._shown > limit:
            self._shown, seconds = now, (now - self.start) / (done - self.first)
            self.say(f"step {done}/{self.total}  {seconds:.1f} s a step  ETA {self._remaining(done)}")

    def _remaining(self, done: int) -> str:
        return duration((time.monotonic() - self.start) / (done - self.first) * (self.total - done))

    def say(self, text: str) -> None:
        """Print a line without breaking the bar. Where nobody reads it, or a disk is full, the run goes on silently."""
        self.record(text)
        try:
            if self.bar:
                self.bar.write(text)
            elif not self.quiet:
                print(text, flush=True)
        except OSError as error:
            self.quiet, self.bar = True, None
            logger.warning("progress cannot be written (%s); training continues", error.strerror)
            with suppress(OSError):  # else what the buffer holds fails once more at the end of the process
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def skip(self, seconds: float) -> None:
        """Exclude the last `seconds` (of an evaluation) from the images per second and the ETA."""
        self.start += seconds
        self._shown += seconds
        self._last = (self._last[0], self._last[1] + seconds)

    def close(self) -> None:
        if self.bar:
            self.bar.close()


class CollapseWatch:
    """Warns if the output does not depend on the image in `patience` consecutive log lines.

    Uniform: the loss stays at ln K. Constant: the entropy of the mean output is that of a single output, or the spread
    of the outputs is near 0, so all images get the same output. Both likewise of patches, where a method has outputs of
    them. Early in a run, during the learning rate warm-up, both are normal.
    """

    def __init__(self, outputs: int, quiet_steps: int, patience: int = 10) -> None:
        self.log_k, self.quiet_steps, self.patience = math.log(outputs), quiet_steps, patience
        self.counts = Counter[str]()
        self.warned: dict[str, str] = {}  # the first of each kind

    def update(self, step: int, row: Mapping[str, float]) -> None:
        """row: a line of metrics.jsonl."""
        if step < self.quiet_steps:
            return
        for kind, seen in collapse_signs(row, self.log_k).items():
            self.counts[kind] = self.counts[kind] + 1 if seen else 0
            if self.counts[kind] == self.patience and kind not in self.warned:
                self.warned[kind] = self._text(kind, step, row)
                logger.warning("%s", self.warned[kind])

    def _text(self, kind: str, step: int, row: Mapping[str, float]) -> str:
        if kind == "uniform patches":
            return (
                f"step {step}: the teacher's outputs at patches are uniform and nothing is learned from them. "
                "Try a lower --teacher-temp or another --lr"
            )
        if kind == "uniform":
            return (
                f"step {step}: the loss stays at ln K = {self.log_k:.2f}, the outputs are uniform and nothing is "
                "learned. Try a lower --teacher-temp, another --lr or, for DINO, a longer --warmup-teacher-temp-epochs"
            )
        of = "patch" if kind == "constant patches" else "teacher"
        if "spread" in row:
            found = f"spread {row['spread']:.3f}, 1 is the most"
        else:
            entropy = row[f"{of}_entropy"]
            found = f"entropy {entropy:.2f} of {entropy + row[f'{of}_kl_to_uniform']:.2f}"
        return (
            f"step {step}: every {'patch' if of == 'patch' else 'image'} gets the same output ({found}): the run is "
            "collapsing. "
            "Try a lower --lr, a smaller --out-dim or, with a teacher, a higher --momentum-teacher, and look at the "
            "images: pictures that are nearly black or all alike give this too"
        )


def plot_curves(folder: Path) -> Path | str:
    """Plot loss, k-NN, view retrieval and teacher entropy of a run to curves.png; its path, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "not drawn, matplotlib is not installed"

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    panels = (
        ("loss", ("loss",), "nats"),
        ("k-NN and view retrieval", ("knn10", "knn20", "retrieval"), "%"),
        ("teacher entropy", ("teacher_entropy", "teacher_single_entropy"), "nats")
        if any("teacher_entropy" in row for row in rows)
        else ("spread of the outputs", ("spread",), "1 is the most"),
    )
    for axis, (title, names, unit) in zip(axes, panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else None)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    path = folder / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
