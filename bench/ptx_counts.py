"""Instruction and byte counts of the GPU kernels at the reference sizes, from the PTX emulator: nothing is timed.

    python bench/ptx_counts.py [--archs 80 90] [--ops attention_197 ...] [--before table.md] [--output table.md]
    python bench/ptx_counts.py --backend cuda ...       the CUDA C++ kernels, for ops that have them

Each op runs with the tile shapes of the reference sizes (64 images, 2 crops of 224 and 8 of 96 pixels, K = 65536) but
fewer sequences, rows or columns; computed times are scaled up. Instructions are PTX instructions executed per thread,
before ptxas: resources-triton-*.md has the lengths of the compiled loops. Bytes are all loads from and stores to global
memory by threads, including cache hits.
"""

import argparse
import importlib
import multiprocessing
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import ROOT
from setting import CROPS

import dino_kernels

TESTS = ROOT / "tests"
sys.path += [str(TESTS / "helpers"), str(TESTS / "gpu")]
IMAGES, OUTPUTS, PARAMETERS = 64, 65536, 44e6  # parameters of ViT-S with its head
# H200, operations per second by kind. 132 SMs at 1.98 GHz issue 4 warp instructions and compute 16 exponentials (or
# other special functions) per cycle; dense bf16 FLOPs and bytes are measured values.
SECOND = {"issue": 4 * 132 * 1.98e9, "special": 16 * 132 * 1.98e9, "matrix": 790e12}
COPY = 4.3e12  # bytes per second
# Targets of measurements on an H200, in microseconds
TARGETS = {"attention_197": 85, "attention_37": 63, "dino_loss": 60, "dino_head_loss": 200, "adamw_ema": 520}
HEADER = """# Instructions, exponentials and bytes of the {kernels} kernels, counted

Made by `python bench/ptx_counts.py --backend {backend}`: it emulates the compiled kernels on a CPU; no GPU was used and
nothing was timed. Launches: per call, forward and backward. PTX instructions, exponentials and bytes of global memory
(including cache hits): per element. Computed us: estimate at the reference sizes on an H200, only to compare designs:
for a kernel, the maximum over instruction issue, special functions (exponentials and others) and matrix products; for
an op, the sum over its kernels, or the floor (the bytes that must be moved, at 4.3 TB/s) if that is larger.
"""


@dataclass
class Call:
    """A call of an op: its elements, the factor to the reference sizes, minimum bytes to move per element."""

    element: str
    elements: int
    scale: float
    floor: float
    run: Callable[[], object]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def differentiated(op: Callable, *inputs: torch.Tensor, **options: object) -> Callable[[], object]:
    def run() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = op(*leaves, **options)
        outs = [out for out in (outs if isinstance(outs, tuple) else [outs]) if out.requires_grad]
        torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])

    return run


def dino_loss() -> Call:
    images, center = IMAGES // 4, randn(OUTPUTS, dtype=torch.float32) / 100
    student, teacher = randn(10 * images, OUTPUTS) / 16, randn(2 * images, OUTPUTS) / 16
    op = partial(dino_kernels.dino_loss, teacher=teacher, center=center)
    return Call("student logit", student.numel(), IMAGES / images, 4.4, differentiated(op, student))


def patch_loss() -> Call:
    """Masked patches of both views, about a third of all."""
    patches, outputs = 100, OUTPUTS // 8
    student, teacher, center = (randn(n, outputs) / 16 for n in (patches, patches, 1))
    op = partial(dino_kernels.patch_loss, teacher=teacher, center=center.float(), weights=torch.full((patches,), 1e-2))
    return Call("student logit", student.numel(), 3800 / patches, 3 * 2, differentiated(op, student))


def sinkhorn() -> Call:
    """Three sweeps over the teacher's logits."""
    outputs = OUTPUTS // 4
    logits = randn(2 * IMAGES, outputs) / 16
    run = partial(dino_kernels.sinkhorn_center, logits, temp=0.05)
    return Call("teacher logit", logits.numel(), OUTPUTS / outputs, 3 * 2, run)


def info_nce() -> Call:
    keys = OUTPUTS // 4
    query, positive, queue = (torch.nn.functional.normalize(randn(n, 128), dim=1) for n in (IMAGES, IMAGES, keys))
    run = differentiated(dino_kernels.info_nce, query, positive=positive, keys=queue)
    return Call("query and key", IMAGES * keys, OUTPUTS / keys, 2 * 128 / IMAGES, run)


def dino_head_loss() -> Call:
    outputs = OUTPUTS // 8
    z, teacher, *weights = (torch.nn.functional.normalize(randn(n, 256), dim=-1) for n in (640, 128, outputs, outputs))

    def op(z, weight):
        return dino_kernels.dino_head_loss(z, teacher, weight, weights[1], torch.zeros(outputs))

    return Call("student logit", len(z) * outputs, OUTPUTS / outputs, 3 * 512 / 640, differentiated(op, z, weights[0]))


def attention(count: int, length: int) -> Call:
    qkv = randn(count * length, 3, 6, 64)
    bounds = torch.arange(0, len(qkv) + 1, length, dtype=torch.int32)
    run = differentiated(dino_kernels.attention, qkv, cu_seqlens=bounds, groups=[(count, length)])
    # Forward 8 and backward 16 bytes per token and channel
    return Call("query and key", 6 * count * length**2, IMAGES, 24 * 64 / length, run)


def add_layer_norm() -> Call:
    tokens = IMAGES // 8 * (2 * 197 + 8 * 37)
    x, branch, affine = randn(tokens, 384, dtype=torch.float32), randn(tokens, 384), torch.ones(2, 384)
    op = dino_kernels.add_layer_norm
    return Call("channel of a token", x.numel(), 8, 12 + 16, differentiated(op, x, branch, *affine))


def bias_gelu() -> Call:
    x = randn(IMAGES // 16 * (2 * 197 + 8 * 37), 1536)
    return Call(
        "channel of a token", x.numel(), 16, 4 + 6, differentiated(dino_kernels.bias_gelu, x, torch.zeros(1536))
    )


def mlp() -> Call:
    """The first GEMM of the forward with GELU: per token, 1536 hidden values are written before and after GELU, and 384
    channels are read."""
    tokens = IMAGES // 32 * (2 * 197 + 8 * 37)
    x, weight = randn(tokens, 384), randn(1536, 384)
    hidden = importlib.import_module("dino_kernels.triton.mlp").hidden_triton
    return Call(
        "hidden channel of a token", tokens * 1536, 32, 4.5, partial(hidden, x, weight, torch.zeros(1536), True)
    )


def weight_norm() -> Call:
    v, g = randn(OUTPUTS // 16, 256, dtype=torch.float32), torch.ones(OUTPUTS // 16, 1)

    def run() -> None:
        grad = dino_kernels.weight_norm_(torch.empty(v.shape, dtype=torch.bfloat16), v, g)
        torch.ops.dino_kernels.weight_norm_backward_(torch.zeros_like(v), torch.zeros_like(g), grad.float(), v, g)

    return Call("weight", v.numel(), 16, 6 + 16, run)


def ema_update() -> Call:
    weights = [[randn(128, 128, dtype=torch.float32) for _ in range(150)] for _ in range(2)]
    elements = 150 * 128 * 128
    return Call("weight", elements, PARAMETERS / elements, 12, lambda: dino_kernels.ema_update_(*weights, 0.996))


def step(op: Callable, moments: int, floor: float, **options: object) -> Call:
    """An optimizer's, over 150 tensors; `floor`: bytes of a weight."""
    offsets = [128 * 128 * i for i in range(151)]
    student, grad, teacher = (randn(offsets[-1], dtype=torch.float32) for _ in range(3))
    run = partial(
        op, student, grad, *torch.rand(moments, offsets[-1]), teacher, offsets=offsets,
        decayed=torch.ones(150, dtype=torch.bool), frozen=torch.zeros(150, dtype=torch.bool),
        nonfinite=torch.zeros((), dtype=torch.int32), lr=1e-3, weight_decay=0.04, momentum=0.996, clip_norm=3.0,
        student_16=randn(offsets[-1]), teacher_16=randn(offsets[-1]), **options,
    )  # fmt: skip
    return Call("weight", offsets[-1], PARAMETERS / offsets[-1], floor, run)


def adamw_ema() -> Call:
    return step(dino_kernels.adamw_ema_step_, 2, 40, steps=torch.zeros(150, dtype=torch.int64))


def sgd_ema() -> Call:
    return step(dino_kernels.sgd_ema_step_, 1, 32, adapted=torch.ones(150, dtype=torch.bool))


def multicrop() -> Call:
    crops = dino_kernels.draw_crops(0, 0, 0, CROPS, (375, 500))[None]
    out = [torch.empty(1, 3, kind.size, kind.size, dtype=torch.bfloat16) for kind in CROPS]
    pixels = torch.randint(0, 256, (3 * 375 * 500,), dtype=torch.uint8)
    run = partial(dino_kernels.multicrop_packed, pixels, np.array([[0, 375, 500]]), crops, out)
    pixels_out = sum(kind.size**2 for kind in CROPS)
    return Call("pixel of a crop", pixels_out, IMAGES, 6 + pixels.numel() / pixels_out, run)


OPS = {
    "attention_197": partial(attention, 2, 197),
    "attention_37": partial(attention, 8, 37),
    **{
        op.__name__: op
        for op in (
            dino_loss, patch_loss, dino_head_loss, sinkhorn, info_nce, add_layer_norm, bias_gelu, mlp, weight_norm,
            ema_update, adamw_ema, sgd_ema, multicrop,
        )
    },
}  # fmt: skip

CUDA_OPS = ["attention_197", "attention_37", "dino_loss", "ema_update", "adamw_ema"]


def count(job: tuple[str, int, str]) -> list[dict]:
    """One row per kernel and one for the whole op; in a separate process, since Triton caches compiled kernels."""
    from ptx import launch

    name, arch, backend = job
    torch.manual_seed(0)
    if backend == "triton":
        from ptx import triton_driver

        triton_driver.install(arch)
        from ptx.dino_ops import use_triton

        use_triton()
    else:
        import pytest
        from cuda_emulated import use_cuda

        use_cuda(pytest.MonkeyPatch(), re.sub(r"_\d+$", "", name), {80: "80", 90: "90a"}[arch])
    launch.options.races = False
    call = OPS[name]()
    call.run()
    totals: dict[str, Counter] = defaultdict(Counter)
    for used in launch.usage.values():
        totals[used.program.kernel.name].update({"launches": used.launches, **launch.counted(used.program)})
    rows = [row(name, arch, kernel, total, call, *busy(total, call)) for kernel, total in totals.items()]
    moved = call.floor * call.elements * call.scale / COPY
    computing = sum(busy(total, call)[0] for total in totals.values())
    slowest = (moved, "bytes") if moved > computing else (computing, "its kernels")
    return [*rows, row(name, arch, "all", sum(totals.values(), Counter()), call, *slowest, moved)]


def busy(total: Counter, call: Call) -> tuple[float, str]:
    """Seconds of a kernel at the reference sizes without memory traffic, and the limiting resource."""
    kinds = {"issue": "warps", "special": "special", "matrix": "products"}
    return max((total[key] / SECOND[kind] * call.scale, kind) for kind, key in kinds.items())


def row(
    op: str, arch: int, kernel: str, total: Counter, call: Call, time: float, bound: str, floor: float | None = None
) -> dict:
    per_element = {"instructions": 32 * total["warps"], "exponentials": total["exponentials"], "bytes": total["bytes"]}
    per_element = {key: value / call.elements for key, value in per_element.items()}
    return {
        "chip": f"sm_{arch}",
        "op": op,
        "element": call.element,
        "kernel": re.sub(r".*\d([a-z_]+_kernel).*", r"\1", kernel).strip("_"),  # function name without mangling
        "launches": str(total["launches"]),
        **{key: f"{value:.3g}" for key, value in per_element.items()},
        "computed us": f"{time * 1e6:.3g}" if arch == 90 else "-",
        "bound by": bound if arch == 90 else "-",
        "floor us": f"{floor * 1e6:.3g}" if arch == 90 and floor else "-",
        "target us": str(TARGETS.get(op, "-")) if arch == 90 and floor else "-",
    }


def compared(before: list[dict], after: list[dict]) -> list[dict]:
    """One row per op with its totals before and after."""
    old = {(row["chip"], row["op"]): row for row in before if row["kernel"] == "all"}
    changing = ("launches", "instructions", "exponentials", "bytes", "computed us")
    return [
        {k: f"{old[row['chip'], row['op']][k]} -> {v}" if k in changing else v for k, v in row.items() if k != "kernel"}
        for row in after
        if row["kernel"] == "all" and (row["chip"], row["op"]) in old
    ]


def table(rows: list[dict]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join([*lines, *(f"| {' | '.join(row.values())} |" for row in rows)]) + "\n"


def read(text: str) -> list[dict]:
    """The rows of the last table in a text."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    start = max(i for i, line in enumerate(lines) if line[0] == "---")
    return [dict(zip(lines[start - 1], line, strict=True)) for line in lines[start + 1 :]]


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", type=int, choices=(80, 90), default=[80, 90])
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    parser.add_argument("--ops", nargs="+", choices=OPS, help="all by default")
    parser.add_argument("--before", type=Path, help="an earlier table, to compare with")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with_kernels = CUDA_OPS if options.backend == "cuda" else list(OPS)
    jobs = [(op, arch, options.backend) for arch in options.archs for op in options.ops or with_kernels]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        rows = [row for part in pool.map(count, jobs, chunksize=1) for row in part]
    kernels, compiler = {"triton": ("Triton", f"Triton {triton.__version__}"), "cuda": ("CUDA C++", "nvcc")}[
        options.backend
    ]
    text = f"{HEADER.format(kernels=kernels, backend=options.backend)}Compiled with {compiler}.\n\n"
    if options.before:
        text += f"## Before and after\n\n{table(compared(read(options.before.read_text()), rows))}\n## Each kernel\n\n"
    text += table(rows)
    if options.output:
        options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
