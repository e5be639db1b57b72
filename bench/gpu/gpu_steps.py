"""Whole training steps of ours and of the peers, and a profile of one of ours."""

import statistics
import time
from typing import Any

import bench_step
import torch
from dino_train.common.process import peak_memory
from gpu_report import OURS, PLAIN
from gpu_run import Send
from step_peers import FROZEN_EPOCHS, STEPS_PER_EPOCH, Setting

NETS = {"ViT-S/16": "vit_small", "ViT-B/16": "vit_base"}
PROVIDERS = {PLAIN: "ours_plain", OURS: "ours", "reference": "reference", "stock": "stock"}
LOSSES, THAW, TIMED = 12, 5, 20  # compared steps; those with a frozen last layer; timed steps
FIRST_STEP = STEPS_PER_EPOCH * FROZEN_EPOCHS - THAW
TOY = {
    "arch": "vit_nano", "batch": 2, "local_crops": 2, "out_dim": 256, "hidden": 64, "patch": 8, "global_size": 32,
    "local_size": 16,
}  # fmt: skip


def setting(net: str, device: str, toy: bool) -> Setting:
    return Setting(device=device, **TOY) if toy else Setting(NETS[net], 64, device)  # type: ignore[arg-type]


def first_steps(name: str, setting: Setting, count: int = LOSSES) -> tuple[Any, list[list[torch.Tensor]], list[float]]:
    """A provider after its first steps, its batches (used in turn), and the losses."""
    learner = bench_step.build(name, setting, "bfloat16")
    batches = [[crop.to(setting.device) for crop in setting.crops(seed)] for seed in range(bench_step.BATCHES)]
    losses = []
    for step in range(count):
        result = learner.step(FIRST_STEP + step, batches[step % len(batches)])
        losses.append(float(getattr(result, "loss", result)))
        if step == 0 and setting.device == "cuda":  # compilers and convolution autotuning are done
            torch.cuda.reset_peak_memory_stats()
    return learner, batches, losses


def measure_step(send: Send, net: str, provider: str, device: str, toy: bool) -> None:
    cuda = device == "cuda"
    synchronize = torch.cuda.synchronize if cuda else int
    chosen = setting(net, device, toy)
    learner, batches, losses = first_steps(PROVIDERS[provider], chosen)
    captured = getattr(getattr(learner, "update", None), "replay", None) is not None
    row = {"losses": losses, "captured": captured, "ms": None, "all_step_ms": [], "images_per_s": None, "note": ""}
    times = []
    for step in range(LOSSES, LOSSES + (2 if toy else TIMED)):
        crops = batches[step % len(batches)]
        synchronize()
        started = time.perf_counter()
        learner.step(FIRST_STEP + step, crops)
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    row |= {"ms": statistics.median(times), "all_step_ms": times}
    row["images_per_s"] = 1e3 * chosen.batch / row["ms"]
    # Peak since the second step: a replayed graph allocates nothing, so timed steps would not show its memory.
    row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_memory()
    send({"steps": {net: {provider: row}}})


def profile(send: Send, device: str, toy: bool) -> None:
    """Kernels of two eager steps: number of launches, time and share of the total."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    cuda, steps = device == "cuda", 2
    learner, batches, _ = first_steps("ours_plain", setting("ViT-S/16", device, toy), THAW + 2)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        for step in range(THAW + 2, THAW + 2 + steps):
            learner.step(FIRST_STEP + step, batches[step % len(batches)])
        if cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    rows = [
        {"kernel": event.key, "count": event.count / steps, "us": us / steps}
        for event in profiler.key_averages()
        if event.device_type == kind and (us := event.self_device_time_total if cuda else event.self_cpu_time_total)
    ]
    if not rows:
        raise RuntimeError("the profiler saw no kernel: CUPTI is missing or not permitted")
    rows.sort(key=lambda row: -row["us"])
    send({"profile": {"rows": rows, "launches": sum(row["count"] for row in rows), "us": sum(r["us"] for r in rows)}})


def step_on_meta(net: str, toy: bool) -> None:
    """All launches of one of our steps, on meta tensors."""
    chosen = setting(net, "meta", toy)
    torch.nn.init.trunc_normal_ = lambda tensor, **_: tensor  # reads values
    learner = bench_step.learner(chosen, "bfloat16", cuda_graph=False)
    crops = [torch.empty_like(crop, device="meta") for crop in chosen.crops(0)]
    for step in (FIRST_STEP, FIRST_STEP + THAW):  # the last layer frozen, and trained
        learner.step(step, crops)
