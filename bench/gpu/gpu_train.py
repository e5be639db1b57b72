"""A real run of the trainer on generated images: stopped in the middle of an epoch by a signal, and resumed."""

import math
import os
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from gpu_run import Send
from PIL import Image

EPOCHS, STOP = 3, 60  # epochs of 24 steps; the signal is sent after this step
TOY = {
    "arch": "vit_nano", "patch_size": 8, "out_dim": 256, "head_hidden_dim": 64, "global_crops_size": 32,
    "local_crops_size": 16, "local_crops_number": 2, "batch_size_per_gpu": 4,
}  # fmt: skip


def make_images(folder: Path, count: int) -> None:
    """JPEGs of 500 x 375 pixels in two class folders: smooth colors with some noise, of similar file size as photos."""

    def make(i: int) -> None:
        rng = np.random.default_rng(i)
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(smooth, np.int16) + rng.integers(-12, 13, (375, 500, 1), np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "ab"[i % 2] / f"{i}.jpg", quality=90)

    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(make, range(count)))


def stop_at(step: int, metrics: Path) -> None:
    """Send SIGTERM to this process when its metrics have reached the step."""
    while not metrics.exists() or f'{{"step": {step},' not in metrics.read_text():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def run(send: Send, part: str, folder: str, device: str, toy: bool) -> None:
    """part: "start", which is stopped by the signal, or "resume"."""
    from dino_train.common.metrics import read_metrics
    from dino_train.common.process import tune
    from dino_train.config.pretrain import PretrainConfig
    from dino_train.engine.train import Interrupted, pretrain

    tune()
    resume, size = part == "resume", TOY if toy else {"arch": "vit_small", "precision": "bfloat16"}
    batch = size.get("batch_size_per_gpu", 64)
    images, output = Path(folder) / "images", Path(folder) / "run"
    stop, log_interval = (14, 2) if toy else (STOP, 6)
    steps = 10 if toy else 24  # per epoch
    began = time.monotonic()
    if not resume:
        make_images(images, steps * batch * 20 // 19 + 1)  # 1 in 20 is held out
    made = time.monotonic()
    config = PretrainConfig(
        data=str(images), output_dir=output, resume=resume, device=device, epochs=EPOCHS, log_interval=log_interval,
        knn_freq=EPOCHS, saveckp_freq=0, **size,
    )  # fmt: skip
    if not resume:
        Thread(target=stop_at, args=(stop, output / "metrics.jsonl"), daemon=True).start()
    try:
        pretrain(config)
        if not resume:
            raise RuntimeError(f"the run was complete, but it should have been stopped after step {stop}")
    except Interrupted:
        pass
    first = stop if resume else -1
    rows = [row for row in read_metrics(output) if row["step"] > first]
    send({"training": {part: summary(rows, steps * EPOCHS if resume else stop, made - began, time.monotonic() - made)}})


def summary(rows: list[dict[str, Any]], last: int, making: float, running: float) -> dict[str, Any]:
    """Summary of rows of metrics.jsonl. The first row is no valid rate: it includes compilation and graph capture."""
    steps = [row for row in rows if "loss" in row]
    if not steps or max(row["step"] for row in steps) < last:
        raise RuntimeError(f"the run ended at step {max((row['step'] for row in steps), default=0)} of {last}")
    if not all(math.isfinite(row["loss"]) for row in steps):
        raise RuntimeError(f"non-finite losses: {[row['loss'] for row in steps]}")
    timed = steps[1:] or steps
    return {
        "steps": steps[-1]["step"],
        "loss": steps[-1]["loss"],
        "images_per_s": statistics.median(row["images_per_second"] for row in timed),
        "fastest_images_per_s": max(row["images_per_second"] for row in timed),
        "data_wait": statistics.median(row["data_wait"] for row in timed),
        "evaluations": [{k: v for k, v in row.items() if k in ("step", "retrieval", "knn10")} for row in rows
                        if "retrieval" in row],
        "making_images_s": making,
        "seconds": running,
    }  # fmt: skip
