"""`dino-train pretrain`: the training loop with data, checkpoints, signals, evaluation and logging."""

import hashlib
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, TypeGuard

import torch

from dino_train.common import checkpoint, parallel
from dino_train.common.device import gpu_of, pick_device
from dino_train.common.files import atomic, locked
from dino_train.common.metrics import Metrics, read_metrics
from dino_train.common.process import use_huge_pages
from dino_train.common.scale import ranges_of
from dino_train.config.pretrain import PretrainConfig
from dino_train.data.folder import ImageFolder
from dino_train.data.loader import Bad, BadImages, CropLoader, require_batch
from dino_train.data.stream import ShardStream, is_shards
from dino_train.engine.estimate import estimate, require_memory, step_seconds, warn_of_shortage
from dino_train.engine.images import find_images
from dino_train.engine.init_from import init_from
from dino_train.engine.learner import Learner, StepResult
from dino_train.engine.log import RunLog, duration
from dino_train.engine.resume import random_states, report_changes, require_fixed, seed_rank, set_random_state
from dino_train.engine.tracker import Tracker
from dino_train.engine.watch import CollapseWatch, Progress, plot_curves
from dino_train.evaluate import knn_accuracy, view_retrieval
from dino_train.evaluate.knn import RETRIEVAL_IMAGES

logger = logging.getLogger(__name__)
# Settings that each process may have of its own.
OWN = ("allow_changes", "config", "stats", "data", "output_dir", "num_workers", "init_from", "preset")
FEW_STEPS = 500  # the demo's 744 teach something


class Interrupted(Exception):
    """The run received a signal to stop and has written a checkpoint."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; that step has not updated anything."""


def pretrain(config: PretrainConfig, *, on_metrics: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Run complete DINO pretraining (main_dino.py:131-300); returns the final checkpoint's path.

    Args:
        config: settings of the run.
        on_metrics: called in the first process with each row of metrics.jsonl: a dict with the number of steps done,
            "step", and what was measured. What it raises ends the run; `resume` then goes on from the last checkpoint.

    Raises:
        DataError, CheckpointError, ValueError: with a message for the user.
        NonFiniteLoss: the loss became NaN or infinite; the last good checkpoint is kept.
        Interrupted: SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C, after a checkpoint was written.
    """
    run = Run(config, on_metrics)
    run.begin()
    try:
        with run.held, run.catch_signals():
            run.train()
    except Interrupted:  # all ranks stop at the same step
        parallel.leave()
        raise
    parallel.leave()
    return config.output_dir / checkpoint.LAST


def dry_run(config: PretrainConfig) -> None:
    """Print what `pretrain` would train on and need, and about how long it would take.

    Raises:
        DataError, ValueError: as pretrain, also if the memory cannot suffice.
    """
    run = Run(config)
    run.describe()
    if parallel.rank() == 0:
        seconds = step_seconds(config, run.device)
        run.progress.say(
            f"very roughly {float(f'{seconds:.2g}'):g} s a step and {duration(seconds * run.total_steps)} in all, "
            "without reading images and evaluations\ndry run: nothing was trained or written"
        )
    parallel.leave()


class Run:
    """The pretraining run of one process."""

    def __init__(self, config: PretrainConfig, on_metrics: Callable[[dict[str, Any]], object] | None = None) -> None:
        self.config, self.step = config, 0
        self.device = parallel.join(pick_device(config.device))
        self.listeners = [on_metrics] if on_metrics else []
        self.gpu = gpu_of(self.device)
        self.progress = Progress(quiet=parallel.rank() > 0)
        self._require_same(
            {
                **{name: value for name, value in config.plain().items() if name not in OWN},
                "data": config.data if is_shards(config.data) else "a folder or archive",  # a copy may be elsewhere
                "whether output_dir holds a checkpoint": checkpoint.exists(config.output_dir),
            }
        )
        torch.manual_seed(config.seed)
        with self.progress.doing(f"finding the images of {config.data}"):
            self.config, (self.train_images, self.labelled, self.held_out) = find_images(config)
        names = (self.train_images.names, self.held_out.names if self.held_out else [])
        self._require_same({f"the names of the {len(self.train_images)} images in {config.data}": names})
        config = self.config
        self.tracker = Tracker(config) if config.tracker != "none" and parallel.rank() == 0 else None
        self.batch_size = config.batch_size_per_gpu * parallel.size()
        require_batch(len(self.train_images), self.batch_size)
        self.steps_per_epoch = len(self.train_images) // self.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        with self.progress.doing("making the networks"):
            self.learner = Learner(config, self.steps_per_epoch, self.device)
        self.needed = estimate(self.learner)
        require_memory(self.needed, self.learner)
        self.bad = BadImages(len(self.train_images), self.batch_size, config.max_unreadable)
        self.bad_held_out = BadImages(len(self.held_out or ()), 0)
        self.stop_signal, self.stops_at_once = 0, False
        self.saved = -1  # the step of last.pt
        self.held = ExitStack()  # the log and, of the first rank, the folder's lock
        self.log: RunLog | None = None
        self.begun_from = ""
        self.config_is_written = False
        self.waited = 0.0  # seconds spent waiting for crops since the last log line
        self.unread: list[tuple[int, torch.Tensor]] = []  # (step, loss) of steps whose loss is not yet read

    def _require_same(self, values: dict[str, Any]) -> None:
        """Of all ranks: otherwise they would wait for one another, or train on other images than they should."""
        if names := parallel.differing(values, self.device):
            parallel.leave()
            raise ValueError(
                f"the processes differ in {', '.join(names)}: start them with the same settings and images"
            )

    # --- checkpoints -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Take the folder, and the state of the run that it holds."""
        try:
            if self.config.resume and checkpoint.exists(self.config.output_dir):
                with self.progress.doing("reading the checkpoint"):
                    self.step = self.saved = self._resume()
            else:
                self.step = self._start_new()
        except BaseException:
            self.held.__exit__(*sys.exc_info())
            raise
        self._tune_memory()
        self.last_saved = time.monotonic()

    def _tune_memory(self) -> None:
        if self.gpu is None:
            use_huge_pages()

    def _take(self, folder: Path) -> None:
        if parallel.rank() == 0:
            self.held.enter_context(locked(folder / "lock", folder))
        self.log = self.held.enter_context(RunLog(folder, parallel.rank()))

    def _start_new(self) -> int:
        folder = self.config.output_dir
        checkpoint.require_none(folder)
        if self.config.resume:
            logger.warning("no checkpoint in %s yet: starting from the beginning", folder)
        if self.config.init_from is not None:
            self.begun_from = f"\nstarts from {init_from(self.learner, self.config.init_from)}"
        if parallel.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        self._take(folder)
        if parallel.rank() == 0:
            checkpoint.require_none(folder)  # again: a run may have ended since
            self._write_config()
        else:
            seed_rank(self.config.seed, 0)
        parallel.barrier()
        return 0

    def _write_config(self) -> None:
        try:
            with atomic(self.config.output_dir / "config.json") as temporary:
                temporary.write_text(json.dumps(self.config.plain(), indent=2) + "\n")
            self.config_is_written = True
        except OSError as error:
            raise checkpoint.CheckpointError(f"cannot write {error.filename or 'config.json'}: {error}") from error

    def _resume(self) -> int:
        folder = self.config.output_dir
        self._take(folder)
        state, path = checkpoint.load_newest(folder)
        saved = state.get("args")
        if not isinstance(saved, dict) or not {"step", "sampler", "rng"} <= state.keys():
            raise checkpoint.CheckpointError(f"{path} was not written by dino-train and cannot be resumed from")
        saved = {**PretrainConfig().plain(), **saved}  # an older version's checkpoint lacks settings
        require_fixed(saved, self.config)
        again = state["sampler"] != self._sampler_state
        step = state["epoch"] * self.steps_per_epoch if again else state["step"]
        report_changes(saved, self.config, passed=step > self.total_steps)
        self.learner.load_state_dict(state)
        if again:
            logger.warning(
                "the images, batch size or seed differ from the interrupted run's: epoch %d starts again",
                state["epoch"] + 1,
            )
        last = path.with_name(checkpoint.LAST)
        most, least = parallel.largest([step, -step], self.device)  # waits for all ranks
        if most != -least:
            raise checkpoint.CheckpointError(
                f"the processes read different checkpoints from {folder}: start them again"
            )
        # The damaged last.pt is moved away; otherwise the next save would rename it over the good previous.pt.
        if path != last and parallel.rank() == 0:
            if last.exists():
                last.replace(last.with_name("last.damaged.pt"))
            path.replace(last)
        set_random_state(state["rng"], self.device, self.config.seed, step)
        threads, before = self._threads(), state.get("threads")  # which older versions did not save
        if None not in (before, threads) and before != threads and parallel.rank() == 0:
            logger.warning(
                "the interrupted run had %d threads and this one has %d: results will differ in rounding, unless it is "
                "started with OMP_NUM_THREADS=%d",
                before,
                threads,
                before,
            )
        return step

    def _threads(self) -> int | None:
        """On which the rounding depends; a GPU's does not."""
        return torch.get_num_threads() if self.gpu is None else None

    @cached_property
    def _sampler_state(self) -> dict[str, Any]:
        """All that determines the order of the images, apart from the step."""
        names = hashlib.sha256("\n".join(self.train_images.names).encode("utf-8", "surrogateescape"))
        return {
            "seed": self.config.seed,
            "batch_size": self.batch_size,
            "images": len(self.train_images),
            "names": names.hexdigest(),
        }

    def save(self) -> None:
        """Write last.pt: the keys of the reference (main_dino.py:276-284) and the state for an exact resume."""
        self.last_saved = time.monotonic()  # on all ranks, also after a failure: they decide together about the next
        self._check_losses()
        if not torch.stack(torch._foreach_norm(list(self.learner.student.parameters()))).isfinite().all():
            raise NonFiniteLoss(
                f"the weights are not finite after step {self.step}; they are not saved. {self._advice()}"
            )
        states = random_states(self.device)
        if parallel.rank():
            return
        state = {
            **self.learner.state_dict(),
            "evaluate": self.learner.method.evaluated,
            "epoch": self.step // self.steps_per_epoch,
            "args": self.config.plain(),
            "step": self.step,
            "threads": self._threads(),
            "sampler": self._sampler_state,
            "rng": states,
        }
        folder = self.config.output_dir
        epoch, within = divmod(self.step, self.steps_per_epoch)
        if self.config.saveckp_freq and not within and epoch and epoch % self.config.saveckp_freq == 0:
            checkpoint.save(state, folder / f"checkpoint{epoch:04d}.pt")  # first: a resumed run does not repeat it
            if self.config.keep_last:
                for path in checkpoint.numbered(folder)[: -self.config.keep_last]:
                    path.unlink(missing_ok=True)
        checkpoint.save(state, folder / checkpoint.LAST, previous=folder / checkpoint.PREVIOUS)
        self.saved = self.step
        if not self.config_is_written:  # of a resumed run not before: its settings are then those of the checkpoint
            self._write_config()

    def try_save(self) -> None:
        """Save during training: a full disk must not end the run, since space may become free later."""
        try:
            self.save()
        except checkpoint.CheckpointError as error:
            logger.warning("%s; training continues", error)

    # --- the loop --------------------------------------------------------------------------------

    def catch_signals(self) -> "_Signals":
        return _Signals(self)

    def train(self) -> None:
        config = self.config
        first = parallel.rank() == 0
        if self.log is not None and first:
            self.progress.record = self.log.line
        if self.tracker:
            self.tracker.begin()
            self.listeners.append(self.tracker.log)
        self.metrics = Metrics(config.output_dir if first else None, self.step, self.listeners if first else [])
        self.watch = CollapseWatch(
            config.out_dim, max(200, min(config.warmup_epochs, config.epochs // 2) * self.steps_per_epoch)
        )
        self.progress.begin(self.step, self.total_steps, config.epochs, self.batch_size, config.log_interval)
        try:
            self.describe()
            if self.step % self.steps_per_epoch == 0 and not self._evaluated():
                self.evaluate()
            self._steps()
            self._summarize()
        finally:
            self.progress.close()
            self.metrics.close()
            if self.tracker:
                self.tracker.close()

    def _steps(self) -> None:
        config = self.config
        loader = CropLoader(
            self.train_images,
            config.crop_kinds,
            batch_size=self.batch_size,
            seed=config.seed,
            start_step=self.step,
            total_steps=self.total_steps,
            num_workers=config.num_workers,
            rank=parallel.rank(),
            ranks=parallel.size(),
            dtype=self.learner.dtype,
            device=self.device,
            scale=config.scale,
            scaled_decode=config.scaled_decode,
            masks=config.mask_kind,
        )
        with closing(iter(loader)) as batches:  # stops its threads, also after an exception
            self._train_on(batches)

    def _train_on(self, batches: Iterator[tuple[list[torch.Tensor], Bad]]) -> None:
        first = self.step
        while self.step < self.total_steps:
            with self.progress.doing("the first step") if self.step == first else nullcontext():
                began = time.monotonic()
                crops, bad = next(batches)
                self.waited += time.monotonic() - began
                self.bad.add(bad)
                result = self.learner.step(self.step, crops)
            self.unread.append((self.step, result.loss_tensor))
            self.step += 1
            self._log(result)
            stopping, save_due = self._requests()
            if self.step % self.steps_per_epoch == 0:
                # Before the evaluation, which can take long. A failed save is an error only at the end of the run.
                self.save() if self.step == self.total_steps else self.try_save()
                if not stopping:
                    self.evaluate()
            elif save_due:
                self.try_save()
            if stopping and self.step < self.total_steps:
                self.save()
                raise self._interrupted(stopping)

    def _interrupted(self, signum: int) -> Interrupted:
        folder = quote(str(self.config.output_dir))
        return Interrupted(
            signum,
            f"stopped at step {self.step} of {self.total_steps}; --resume continues: "
            f"dino-train pretrain --output-dir {folder} --resume",
        )

    def _requests(self) -> tuple[int, int]:
        """The stop signal (0 if none) and whether a checkpoint is due, on any rank: all ranks must do the same.

        Ranks on GPUs communicate only in steps that synchronize anyway. Steps on a CPU are slow, and torchrun kills a
        rank that is still running 30 seconds after a signal, so these communicate in every step.
        """
        due = time.monotonic() - self.last_saved >= 60 * self.config.save_minutes
        quiet = self.step % self.config.log_interval and self.step % self.steps_per_epoch
        if parallel.size() > 1 and self.gpu is not None and quiet:
            return 0, 0
        signum, save_due = parallel.largest([self.stop_signal, due], self.device)
        return signum, save_due

    def _advice(self) -> str:
        last = self.config.output_dir / checkpoint.LAST
        written = f"{last} was written before this" if last.exists() else "No checkpoint was written before this"
        return f"Try a lower --lr, a smaller --clip-grad or --precision float32. {written}"

    def _evaluated(self) -> bool:
        rows = read_metrics(self.config.output_dir)
        done = any(row["step"] == self.step and ("retrieval" in row or "knn10" in row) for row in rows)
        return bool(parallel.largest([done], self.device)[0])

    def _check_losses(self) -> None:
        """Copy the losses from the device and check them. A step with a non-finite loss has not updated anything."""
        values = torch.stack([loss for _, loss in self.unread]).tolist() if self.unread else []
        for (step, _), value in zip(self.unread, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(f"{self.learner.nonfinite_message(step, value)}. {self._advice()}")
        self.unread.clear()

    def _log(self, result: StepResult) -> None:
        if not self.progress.due(self.step):
            self.progress.between(self.step)
            return
        self._check_losses()
        epoch = (self.step - 1) // self.steps_per_epoch
        self.progress.update(self.step, epoch, result.loss, result.lr)
        row = {"loss": result.loss, **result.health()}
        self.metrics.write(
            self.step,
            epoch=epoch,
            lr=result.lr,
            weight_decay=result.weight_decay,
            momentum=result.momentum,
            teacher_temp=result.teacher_temp,
            **row,
            images_per_second=self.progress.rate,
            data_wait=self.waited / self.progress.seconds,
        )
        self.waited = 0.0
        self.watch.update(self.step, row)

    def evaluate(self) -> None:
        """Evaluate the backbone that the method evaluates: view retrieval after every epoch, k-NN every `knn_freq`. A
        signal stops a run of one process here at once."""
        try:
            self.stops_at_once = parallel.size() == 1
            if self.stops_at_once and self.stop_signal:
                raise KeyboardInterrupt
            self._evaluate()
        except KeyboardInterrupt:
            self.stops_at_once = False
            if not self.stop_signal:  # not of `_Signals`
                raise
            if self.saved != self.step:
                self.save()
            raise self._interrupted(self.stop_signal) from None
        finally:
            self.stops_at_once = False

    def _evaluate(self) -> None:
        config, method = self.config, self.learner.method
        backbone = getattr(method, method.evaluated).backbone
        epoch, began = self.step // self.steps_per_epoch, time.monotonic()
        row: dict[str, float] = {}
        said = []
        held_out, workers = self.held_out, config.num_workers
        if held_out is not None and len(held_out) > 1:
            with self.progress.doing(f"view retrieval of at most {RETRIEVAL_IMAGES} images"):
                found, count = view_retrieval(
                    backbone,
                    held_out,
                    self.bad_held_out,
                    config.crop_kinds[:2],
                    seed=config.seed,
                    num_workers=workers,
                )
            row |= {"retrieval": found, "retrieval_images": count}
            said.append(f"retrieval {found:.1f} % of {count} images (chance {100 / count:.1f} %)")
        due = config.knn_freq and (epoch % config.knn_freq == 0 or epoch == config.epochs)
        if due and _labelled(self.labelled) and _labelled(held_out):
            with self.progress.doing(f"k-NN of {len(held_out)} images among {len(self.labelled)}"):
                values = knn_accuracy(
                    backbone,
                    self.labelled,
                    held_out,
                    config.global_crops_size,
                    bad=(self.bad, self.bad_held_out),
                    num_workers=workers,
                )
            count, classes = len(held_out) - self.bad_held_out.count, len(self.labelled.classes)
            row |= {**values, "knn_images": count}
            said.append(
                "  ".join(f"{name} {value:.1f} %" for name, value in values.items())
                + f" of {count} images (chance {100 / classes:.1f} %)"
            )
        if row:
            self.metrics.write(self.step, **row)
            self.progress.say(f"after {epoch} epochs: " + "  ".join(said))
        self.progress.skip(time.monotonic() - began)

    def describe(self) -> None:
        """Say what is trained on what, and what it needs."""
        config = self.config
        parameters = sum(p.numel() for p in self.learner.student.parameters()) / 1e6
        held_out = len(self.held_out or ())
        classes = f", {len(self.labelled.classes)} class folders" if _labelled(self.labelled) else ""
        if isinstance(self.train_images, ImageFolder) and parallel.rank() == 0:
            self.train_images.log_notes()
        self.progress.say(
            f"{len(self.train_images)} images to train on, {held_out} held out{classes} ({config.data})\n"
            f"{config.method}: {config.arch}, {parameters:.1f} M parameters with head, {config.out_dim} outputs, "
            f"{str(self.learner.dtype).removeprefix('torch.')} on {self.gpu.describe() if self.gpu else 'the CPU'}\n"
            f"{config.epochs} epochs of {self.steps_per_epoch} steps of {self.batch_size} images, "
            f"2 + {config.local_crops_number} crops, from step {self.step}; output in {config.output_dir}"
            f"{self.begun_from}{self._values()}\n{self.needed}"
        )
        if self.total_steps < FEW_STEPS and config.init_from is None:
            self.progress.say(
                f"note: {self.total_steps} steps in all are few, and the features will be much like those of random "
                f"weights: raise --epochs to {-(-FEW_STEPS // self.steps_per_epoch)} or more, or use published weights "
                "(pretrain --init-from, or embed without training)"
            )
        if parallel.rank() == 0:
            warn_of_shortage(self.needed, self.learner)

    def _values(self) -> str:
        """What values of the images are black and white, where that is not 8-bit RGB."""
        scale = self.config.scale
        if scale.is_8_bit_rgb:
            return ""
        return f"\nvalues of {scale.channels} channels scaled from {ranges_of(scale)}"

    def _summarize(self) -> None:
        say, folder = self.progress.say, self.config.output_dir
        for name, bad in (("training", self.bad), ("held-out", self.bad_held_out)):
            if bad.count:
                say(f"{bad.count} of {bad.n_images} {name} images could not be read")
        for text in self.watch.warned.values():
            say(text)
        if parallel.rank() == 0:
            try:
                say(f"curves: {plot_curves(folder)}")
            except OSError as error:
                logger.warning("the curves cannot be drawn (%s)", error)
        if found := [(row["knn10"], row) for row in read_metrics(folder) if "knn10" in row]:
            best, row = max(found, key=lambda pair: pair[0])
            chance = f", chance {100 / len(self.labelled.classes):.1f} %" if _labelled(self.labelled) else ""
            say(
                f"best k-NN (k = 10): {best:.1f} % after {row['step'] // self.steps_per_epoch} epochs "
                f"({row['knn_images']} images{chance})"
            )
        say(f"done: {folder / checkpoint.LAST}\nnext: dino-train evaluate report --run {quote(str(folder))}")


def _labelled(images: ImageFolder | ShardStream | None) -> TypeGuard[ImageFolder]:
    return isinstance(images, ImageFolder) and images.labels is not None and len(images) > 0


class _Signals:
    """Inside this context SIGTERM, SIGHUP, SIGUSR1 (a scheduler's notice) or Ctrl-C stops the run after the current
    step, or amid an evaluation; a second Ctrl-C kills it.

    Under torchrun, further signals do not kill: it may forward a signal that a scheduler has also sent to the ranks,
    and after the first rank has ended it signals the others, which are about to end.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.torchrun = torch.distributed.is_torchelastic_launched()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores it
                self.before[signum] = signal.signal(signum, self._ask)

    def _ask(self, signum: int, frame: object) -> None:
        self.run.stop_signal = signum
        if signum == signal.SIGINT and not self.torchrun:
            signal.signal(signum, self.before[signum])
        if self.run.stops_at_once:
            raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, signal.SIG_IGN if self.torchrun and kind is Interrupted else handler)
