"""Counts the launches of a training step on a GPU, with meta tensors: python tests/helpers/launches.py

Every aten op that writes memory counts as one launch, or as two if torch zeroes memory first. An op of dino_kernels
runs its CUDA function, whose Triton kernels are counted instead of launched. cuBLAS may need additional launches (for
split-K sums).
"""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import dino_train
import torch
from dino_train.common import device
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.learner import Learner
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import dino_kernels

# Neither a view nor a launch: they only allocate or read metadata.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
FREE |= {"_reshape_alias", "_unsafe_view", "is_same_size", "promote_types"}
TWO = {"slice_backward", "select_backward", "index_add", "repeat_interleave"}


PACKAGES = [Path(package.__file__).parent for package in (dino_kernels, dino_train)]


class Launches(TorchDispatchMode):
    """counts: launches by (calling file and line of the project, op or kernel)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def count(self, name: str, times: int = 1) -> None:
        self.counts[_asker(), name] += times

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dino_kernels":
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
            with self:
                return torch.library.get_kernel(func, "CUDA").call_boxed(keys, *args, **(kwargs or {}))
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func is torch.ops.aten.baddbmm.dtype_out:  # on meta tensors, torch interprets out_dtype as beta
            result = (kwargs or {})["out"]
        else:
            result = func(*args, **(kwargs or {}))
        on_host = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        if not (on_host or func.is_view or name in FREE):
            self.count(f"aten::{name}", 1 + (name in TWO))
        return result


def _asker() -> str:
    frame = sys._getframe()
    while frame is not None:
        for package in PACKAGES:
            if frame.f_code.co_filename.startswith(f"{package}/"):
                return f"{frame.f_code.co_filename.removeprefix(f'{package.parent}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "-"


@contextlib.contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Count the launches inside this context; tensors must be on the meta device."""
    launches = Launches()

    def count(self, *_, **__):
        launches.count(f"triton::{self.fn.__name__}")

    def nothing(*_, **__):
        return contextlib.nullcontext()

    with (
        mock.patch.object(JITFunction, "run", count),
        mock.patch.object(InterpretedFunction, "run", count),
        mock.patch.object(torch.cuda, "device", nothing),
        mock.patch.object(torch, "autocast", nothing),
        launches,
    ):
        yield launches.counts


def of_a_step(arch: str = "vit_small", **options) -> Counter[tuple[str, str]]:
    """Launches of a bfloat16 step at the reference sizes; not the first, which also uploads tables of addresses."""
    meta = torch.device("meta")
    config = PretrainConfig(
        arch=arch, precision="bfloat16", freeze_last_layer=0, num_workers=1, cuda_graph=False, **options
    )
    sizes = [config.global_crops_size] * 2 + [config.local_crops_size] * config.local_crops_number
    crops = [torch.empty(config.batch_size_per_gpu, 3, size, size, device=meta) for size in sizes]
    as_gpu = mock.patch.dict(device._GPUS, {"meta": lambda _: mock.Mock()})
    with as_gpu, mock.patch("dino_kernels._core.device.GPU_TYPES", {"meta"}):
        learner = Learner(config, 10, meta)
        with counted():
            learner.step(0, crops)
        with counted() as counts:
            learner.step(1, crops)
    return counts


def main() -> None:
    counts = of_a_step()
    by_name: Counter[str] = Counter()
    by_file: Counter[str] = Counter()
    for (where, name), count in counts.items():
        by_name[name] += count
        by_file[where.split(":")[0]] += count
    for table in (by_name, by_file, counts):
        for key, count in table.most_common():
            print(f"{count:5d}  {key if isinstance(key, str) else '  '.join(key)}")
        print(f"{table.total():5d}  in all\n")


if __name__ == "__main__":
    main()
