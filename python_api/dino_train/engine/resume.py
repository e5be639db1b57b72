"""What a resumed run takes from the interrupted one: settings that may differ, and random states."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from dino_train.common import parallel
from dino_train.common.device import gpu_of
from dino_train.config.pretrain import PretrainConfig, absolute

logger = logging.getLogger(__name__)
# Settings that shapes of the checkpoint, or what they hold, depend on.
FIXED = (
    *("method", "arch", "patch_size", "channels", "global_crops_size", "out_dim", "head_hidden_dim"),
    *("head_bottleneck_dim", "use_bn_in_head", "norm_last_layer", "predictor", "queue_size", "optimizer"),
    *("queue_start_epoch", "registers", "patch_head", "patch_out_dim", "layer_scale"),
)
# Settings of the call and of the machine.
UNREPORTED = (
    *("resume", "allow_changes", "dry_run", "tracker", "config", "stats", "output_dir", "num_workers", "init_from"),
    "preset",
)


def require_fixed(saved: Mapping[str, Any], config: PretrainConfig) -> None:
    """Raise ValueError if a setting of FIXED is not that of the interrupted run."""
    for name in FIXED:
        if saved[name] != getattr(config, name):
            raise ValueError(
                f"the run in {config.output_dir} has {name} {saved[name]}, not "
                f"{getattr(config, name)}: pass the same settings to resume, or another --output-dir"
            )


def report_changes(saved: Mapping[str, Any], config: PretrainConfig, *, passed: bool) -> None:
    """Name the settings that are not those of the interrupted run, and refuse some of them.

    Args:
        saved: settings of the interrupted run.
        passed: it has done more steps than this one will.

    Raises:
        ValueError: other data, another learning rate or an end that is passed, without `allow_changes`.
    """
    changed = {}
    for name, value in config.plain().items():
        before = saved.get(name)
        if name == "data" and before:
            before = absolute(before)  # an older version's checkpoint has it as it was typed
        same = list(before) == list(value) if isinstance(value, tuple) and before else before == value
        if not same and name not in UNREPORTED:
            changed[name] = f"{name} {before} -> {value}"
    refused = [name for name in ("data", "lr", *["epochs"] * passed) if name in changed]
    if refused and not config.allow_changes:
        raise ValueError(
            f"the run in {config.output_dir} would continue with "
            f"{', '.join(changed[name] for name in refused)}: leave that out, or add --allow-changes"
        )
    if changed and parallel.rank() == 0:
        logger.warning("the run continues with %s", ", ".join(changed.values()))


def seed_rank(seed: int, step: int) -> None:
    """Give each rank its own random numbers for drop path; the weights are the same on all ranks."""
    torch.manual_seed(seed + 1_000_003 * parallel.rank() + step)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Random states of all ranks, one row per rank; every rank must call it."""
    states = {"torch": torch.get_rng_state()}
    if (gpu := gpu_of(device)) is not None:
        states["cuda"] = gpu.random_state()
    return {name: parallel.gather(state[None].to(device)).cpu() for name, state in states.items()}


def set_random_state(saved: Mapping[str, Any], device: torch.device, seed: int, step: int) -> None:
    """That of this rank in `random_states`; with another number of ranks `seed_rank`."""
    states, rank = torch.atleast_2d(saved["torch"]), parallel.rank()  # older checkpoints have only rank 0
    if len(states) != parallel.size():
        if rank == 0:
            logger.warning(
                "the interrupted run had %d processes and this one has %d: it continues, but will not be bitwise "
                "identical to a run without the interruption",
                len(states),
                parallel.size(),
            )
        seed_rank(seed, step)
        return
    torch.set_rng_state(states[rank].clone())  # torch 2.13 crashes on a row with a storage offset
    if (gpu := gpu_of(device)) is not None and len(saved.get("cuda", ())):  # absent in checkpoints of a CPU run
        gpu.set_random_state(saved["cuda"][rank].clone())
