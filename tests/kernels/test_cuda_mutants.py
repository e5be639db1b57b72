"""CUDA C++ kernels broken on purpose, a fault each: the emulator notices, with what the ops' tests run."""

import re
import subprocess

import pytest
import test_adamw_ema
import test_attention
import test_dino_loss
import test_ema_update
import torch
from cuda_emulated import NVCC, ROOT, emulated, needs_nvcc, use_cuda
from ptx import launch

import dino_kernels
from dino_kernels._core import backends

pytestmark = [needs_nvcc, pytest.mark.ptx]
MUTANTS = {
    "copy used before it has arrived": (
        "dino_loss",
        "wait_for_copies<kSlots - 1>();",
        "wait_for_copies<kSlots>();",
        "cp.async has not been waited for",
    ),
    "barrier of a sum left out": (
        "dino_loss",
        "if (lane == 0) shared[threadIdx.x / 32] = mine;\n    __syncthreads();",
        "if (lane == 0) shared[threadIdx.x / 32] = mine;",
        "race between threads of a CTA|shared memory that nobody wrote",
    ),
    "losses read without a fence": (
        "dino_loss",
        "__threadfence();\n        last =",
        "last =",
        "race between CTAs",
    ),
    "targets not written to the end of a row": (
        "dino_loss",
        "k < min(begin + kTargetColumns, outputs)",
        "k + 8 < min(begin + kTargetColumns, outputs)",
        "memory that nobody wrote",
    ),
    "rows copied beyond the last sequence": (
        "attention_short",
        "if (row < length) {\n            copy_async",
        "if (row < padded) {\n            copy_async",
        "out of bounds",
    ),
    "barrier before dQ left out": (
        "attention_short",
        "was last read before this one.\n        __syncthreads();",
        "was last read before this one.\n",
        "race between threads of a CTA|shared memory that nobody wrote",
    ),
    "16 bytes from any address": ("ema_update", "int whole = aligned ?", "int whole = true ?", "misaligned"),
    "norms of one block only": (
        "adamw_ema",
        "a.partials[segments.blocks_before + blockIdx.x] = sum;",
        "a.partials[0] = sum;",
        "race between CTAs|memory that nobody wrote",
    ),
}


def run(op: str) -> None:
    if op == "dino_loss":
        test_dino_loss.run(dino_kernels.dino_loss, *test_dino_loss.inputs(2, 4, 20000, torch.bfloat16))
    elif op == "attention":
        qkv, bounds = test_attention.inputs([70, 70], 2, 64, torch.bfloat16)
        test_attention.run(dino_kernels.attention, qkv, bounds, groups=[(2, 70)])
    elif op == "ema_update":
        targets, sources = test_ema_update.lists(shapes=[(5000,)])
        dino_kernels.ema_update_([targets[0][1:]], [sources[0][1:]], 0.9)
    else:
        dino_kernels.adamw_ema_step_(**test_adamw_ema.state("cpu", [5000, 64]), **test_adamw_ema.HYPER)


def use(monkeypatch, file: str) -> str:
    op = "attention" if file == "attention_short" else file
    use_cuda(monkeypatch, op, "90a")
    return op


@pytest.mark.prove
@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_noticed(monkeypatch, tmp_path, name):
    file, right, wrong, finding = MUTANTS[name]
    text = (ROOT / f"csrc/cuda/{file}.cu").read_text()
    assert text.count(right) == 1
    (tmp_path / f"{file}.cu").write_text(text.replace(right, wrong))
    command = [NVCC, "-ptx", "-O3", "-std=c++17", "-arch=sm_90a", f"-I{ROOT}/csrc", "-o", str(tmp_path / "ptx")]
    subprocess.run([*command, str(tmp_path / f"{file}.cu")], check=True)
    broken = launch.Module((tmp_path / "ptx").read_text())
    programs, op = emulated("90a").programs, use(monkeypatch, file)

    def plain(mangled: str) -> str:  # without what nvcc makes of the file's name
        return re.sub(r"_GLOBAL__N__\w+?_cu_[0-9a-f]{8}", "", mangled)

    run(op)
    for kernel in broken.kernels:
        (same,) = [right for right in programs if plain(right) == plain(kernel)]
        monkeypatch.setitem(programs, same, (broken, kernel))
    with pytest.raises(launch.KernelError, match=finding):
        run(op)


def test_a_launch_elsewhere_than_on_the_current_stream_is_noticed(monkeypatch):
    op = use(monkeypatch, "ema_update")
    monkeypatch.setattr(backends, "stream", lambda: 0)
    with pytest.raises(AssertionError, match="launched on stream None"):
        run(op)
