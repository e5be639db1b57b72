"""Registers, shared memory and spills of every Triton kernel per GPU, from ahead-of-time compilation, without a GPU.

    python bench/resources.py [--targets sm_90 ...] [--ops dino_loss ...] [--output bench/results]

Each op runs on meta tensors at the reference sizes (64 images, 2 crops of 224 and 8 of 96 pixels, K = 65536); every
launch only compiles, so the table lists the kernels that would be launched, with their tile shapes and specializations.
Prints the table; writes resources-triton-<version>.md into the given folder.
"""

import argparse
import multiprocessing
import re
import subprocess
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
from setting import CROPS
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dino_kernels import draw_crops
from dino_kernels.triton import adamw_ema as adamw_ema_triton
from dino_kernels.triton import add_layer_norm as add_layer_norm_triton
from dino_kernels.triton import attention as attention_triton
from dino_kernels.triton import bias_gelu as bias_gelu_triton
from dino_kernels.triton import column_mass as column_mass_triton
from dino_kernels.triton import column_sums as column_sums_triton
from dino_kernels.triton import dino_head_loss as dino_head_loss_triton
from dino_kernels.triton import dino_loss as dino_loss_triton
from dino_kernels.triton import ema_update as ema_update_triton
from dino_kernels.triton import info_nce as info_nce_triton
from dino_kernels.triton import mlp as mlp_triton
from dino_kernels.triton import multicrop as multicrop_triton
from dino_kernels.triton import patch_loss as patch_loss_triton
from dino_kernels.triton import sgd_ema as sgd_ema_triton
from dino_kernels.triton import weight_norm as weight_norm_triton

TARGETS = {  # (backend, architecture, threads per warp), shared memory limit of a program in bytes
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}
MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")
IMAGES, OUTPUTS = 64, 65536
TOKENS = 2 * IMAGES * 197 + 8 * IMAGES * 37


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def dino_loss() -> None:
    center = meta(OUTPUTS, dtype=torch.float32).expand(2, -1)
    for temp in (torch.tensor(0.1), meta(dtype=torch.float32)):  # a float and a 0-d tensor
        student = meta(10 * IMAGES, OUTPUTS)
        dino_loss_triton.forward_triton(student, meta(2 * IMAGES, OUTPUTS), center, temp, temp, student)
    dino_loss_triton.scale_triton(student, temp)


def patch_loss() -> None:
    for outputs in (8192, OUTPUTS):
        student, center, weights = (
            meta(3800, outputs),
            meta(outputs, dtype=torch.float32),
            meta(3800, dtype=torch.float32),
        )
        for temp in (torch.tensor(0.1), meta(dtype=torch.float32)):
            patch_loss_triton.forward_triton(student, student, center, weights, temp, temp, student)


def column_mass() -> None:
    shapes = ((2 * IMAGES, OUTPUTS, torch.bfloat16), (3800, 8192, torch.bfloat16), (3904, 3000, torch.float32))
    for rows, outputs, dtype in shapes:
        logits, center = meta(rows, outputs, dtype=dtype), meta(outputs, dtype=torch.float32)
        for counted in (None, meta(rows, dtype=torch.bool)):
            for temp in (torch.tensor(0.05), meta(dtype=torch.float32)):
                column_mass_triton.forward_triton(logits, None, counted, temp)
                column_mass_triton.forward_triton(logits, center, counted, temp)


def dino_head_loss() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        z, weight = meta(10 * IMAGES, 256, dtype=dtype), meta(OUTPUTS, 256, dtype=dtype)
        center, temp = meta(OUTPUTS, dtype=torch.float32), meta(dtype=torch.float32)
        dino_head_loss_triton.forward_triton(z, z[: 2 * IMAGES], weight, weight, center, temp, temp, True)


def info_nce() -> None:
    labels = meta(IMAGES, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for channels in (128, 256):
            query, keys = meta(IMAGES, channels, dtype=dtype), meta(OUTPUTS, channels, dtype=dtype)
            for temp in (torch.tensor(0.2), meta(dtype=torch.float32)):
                info_nce_triton.forward_triton(query, query, keys, None, temp, 1.0)
                info_nce_triton.forward_triton(query, None, keys, labels, temp, 1.0)


def attention() -> None:
    crops = [(2 * IMAGES, 197), (8 * IMAGES, 37)]
    long = [(8, 257), (16, 785), (2, 4096)]
    cases = [(crops, 64, torch.bfloat16), (crops + long, 64, torch.float16), (crops + long, 64, torch.float32)]
    cases += [(crops + long, channels, torch.bfloat16) for channels in (32, 128)]
    for groups, channels, dtype in cases:
        flat = [n for group in groups for n in group]
        qkv = meta(sum(count * length for count, length in groups), 3, 6, channels, dtype=dtype)
        bounds = meta(sum(flat[::2]) + 1, dtype=torch.int32)
        for known in (flat, []):
            out, lse = attention_triton.forward_triton(qkv, bounds, known, 0.125)
            sums = meta(3 * 6 * channels, dtype=torch.float32)
            attention_triton.backward_triton(out, qkv, out, lse, bounds, known, 0.125, sums)


def ema_update() -> None:
    weights = [meta(384, 384, dtype=torch.float32)] * 150
    for momentum in (torch.tensor(0.996), meta(dtype=torch.float64)):
        ema_update_triton.update_triton(weights, weights, momentum)


def flat_steps():
    """A number or an address for scalars, and the tensors of a step: flat, grad, a copy, rows, offsets, flags."""
    numbers, addresses = torch.tensor(0.1, dtype=torch.float64), meta(dtype=torch.float64)
    for size, setting, dtype in (
        (384 * 384, numbers, torch.float32),
        (384 * 384, addresses, torch.bfloat16),
        (383 * 383, addresses, torch.float32),  # segments start at odd addresses
        (383 * 383, addresses, torch.bfloat16),
    ):
        offsets = [size * i for i in range(149)]
        offsets += [offsets[-1] + OUTPUTS, offsets[-1] + OUTPUTS * 257]
        flat, grad, copy = (meta(offsets[-1], dtype=kind) for kind in (torch.float32, dtype, torch.bfloat16))
        yield setting, flat, grad, copy, meta(OUTPUTS, 256, dtype=dtype), offsets, meta(150, dtype=torch.bool)


def adamw_ema() -> None:
    steps = meta(150, dtype=torch.int64)
    for setting, flat, grad, copy, rows, offsets, flags in flat_steps():
        for of_dinov2 in ((None, None), (meta(150, dtype=torch.float32), steps)):
            adamw_ema_triton.step_triton(
                flat, grad, flat, flat, flat, copy, copy, rows, rows, offsets, steps, flags, flags,
                meta(dtype=torch.int32), setting, setting, setting, 3.0, 0.9, 0.999, 1e-8, 0, *of_dinov2,
            )  # fmt: skip


def sgd_ema() -> None:
    for setting, flat, grad, copy, rows, offsets, flags in flat_steps():
        for larc in (False, True):
            sgd_ema_triton.step_triton(
                flat, grad, flat, flat, copy, copy, rows, rows, offsets, flags, flags, flags, meta(dtype=torch.int32),
                setting, setting, setting, 3.0, 0.9, larc, 0.001, 1e-8, 0,
            )  # fmt: skip


def add_layer_norm() -> None:
    for channels in (384, 768):
        affine = meta(2, channels, dtype=torch.float32)
        branch, scale = meta(TOKENS, channels), meta(TOKENS, dtype=torch.float32)
        rows = meta(TOKENS, dtype=torch.int32)
        cases = ((torch.float32, scale, None), (torch.float32, None, None), (torch.bfloat16, None, None))
        for dtype, *drop_path in (*cases, (torch.float32, scale, rows)):
            drop_path.append(drop_path[1])
            total, normed, *stats = add_layer_norm_triton.forward_triton(
                branch.to(dtype), branch, *affine, *drop_path, 1e-6
            )
            for sums in (None, affine[0]):
                add_layer_norm_triton.backward_triton(
                    total, normed, total, *stats, affine[0], *drop_path, *affine, sums
                )


def bias_gelu() -> None:
    for channels in (1536, 3072):
        x, bias = meta(TOKENS, channels), meta(channels, dtype=torch.float32)
        for again in (False, True):
            bias_gelu_triton.backward_triton(bias_gelu_triton.forward_triton(x, bias), x, bias, again)


def mlp() -> None:
    for channels in (384, 768):
        x, weight = meta(TOKENS, channels), meta(4 * channels, channels)
        for keep in (False, True):
            mlp_triton.hidden_triton(x, weight, meta(4 * channels, dtype=torch.float32), keep)


def column_sums() -> None:
    for channels in (1152, 2304):
        column_sums_triton.add_column_sums(meta(TOKENS, channels), meta(channels, dtype=torch.float32))


def weight_norm() -> None:
    v, g = meta(65536, 256, dtype=torch.float32), meta(65536, 1, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        weight_norm_triton.forward_triton(v.to(dtype), v, g)
        weight_norm_triton.backward_triton(v, g, v.to(dtype), v, g)
        weight_norm_triton.backward_triton(v, None, v.to(dtype), v, g)
    weight_norm_triton.backward_triton(v, None, v, v, g, True)


def multicrop() -> None:
    places = np.array([[0, 375, 500]])
    for dtype in (torch.bfloat16, torch.uint8):
        out = [meta(1, 3, kind.size, kind.size, dtype=dtype) for kind in CROPS]
        crops = draw_crops(0, 0, 0, CROPS, (375, 500))[None]
        multicrop_triton.packed_triton(meta(3 * 375 * 500, dtype=torch.uint8), places, crops, out)


OPS = (
    dino_loss,
    patch_loss,
    column_mass,
    dino_head_loss,
    info_nce,
    attention,
    ema_update,
    adamw_ema,
    sgd_ema,
    add_layer_norm,
    bias_gelu,
    column_sums,
    mlp,
    weight_norm,
    multicrop,
)


class Driver:
    """Replaces the driver of a GPU: sufficient for Triton to compile for it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_ops(names: list[str], target: str) -> list[dict]:
    """The rows of one target; call it once per process, since Triton caches compiled kernels."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    triton.runtime.driver.set_active(Driver(TARGETS[target][0]))
    rows: dict[str, dict] = {}
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        # Tuples are numbers, such as a mean and a deviation; they change no launch.
        constants = " ".join(f"{k}={v}" for k, v in kwargs.items() if k.isupper() and not isinstance(v, tuple))
        row = {"op": op.__name__, "kernel": self.__name__.strip("_"), "constants": constants, "target": target}
        row |= {"warps": compiled.metadata.num_warps, **resources(compiled)}
        # Several dtypes and alignments share a row, which has the maximum over them.
        known = rows.setdefault(str([row[key] for key in ("op", "kernel", "constants", "warps")]), row)
        for key in ("registers", "spills", "shared", "loops"):
            known[key] = max(known[key], row[key])

    JITFunction.run = compile_only
    for op in OPS:
        if op.__name__ in names:
            op()
    JITFunction.run = launch
    return list(rows.values())


def resources(compiled) -> dict:
    """Registers and bytes of spills of a thread, shared memory, matrix instruction, atomics, lengths of loops."""
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    lengths: list[int] = []
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            report = output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
            lengths = loops(output(triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name))
        registers, stack, local = (int(re.findall(rf"{key}:(\d+)", report)[-1]) for key in ("REG", "STACK", "LOCAL"))
        spills = stack + local
    else:
        # Scalar registers spill into lanes of vector registers, never to memory, so they are not counted.
        registers, spills = (
            int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[-1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
    return {
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "matrix": next((name for name in MATRIX_INSTRUCTIONS if name in assembly), None),
        "atomics": len(re.findall(r"\b(?:atom|red)\.\w*global|global_atomic", assembly)),
        "loops": lengths,
    }


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[int]:
    """Instructions of each innermost loop, in order: from a label to a branch back to it, without a loop inside."""
    labels: dict[str, int] = {}
    branches, count = [], 0
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            count += 1
            back = re.search(r"\bBRA\b.*(\.L_x_\d+)", instruction[1])
            if back and back[1] in labels:
                branches.append((labels[back[1]], count))
    inner = [(a, b) for a, b in branches if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in branches)]
    return [b - a for a, b in inner if b - a > 1]  # a kernel ends with a branch to itself


def table(rows: list[dict]) -> str:
    lines = [
        f"# Resources of the Triton kernels, compiled with Triton {triton.__version__} without a GPU",
        "",
        "Made by `make resources` at the reference setting (64 images, 2 + 8 crops of 224 and 96 pixels, ViT-S, bf16).",
        "Registers and bytes of spills are a thread's, bytes of shared memory a program's (limit: "
        + ", ".join(f"{name} {limit:,}" for name, (_, limit) in TARGETS.items())
        + "); loops: instructions (SASS) of each innermost loop.",
        "",
        f"| {' | '.join(rows[0])} |",
        f"|{'---|' * len(rows[0])}",
    ]
    for row in rows:
        cells = {**row, "loops": " ".join(map(str, row["loops"]))}
        lines.append("| " + " | ".join(str(cell or "-") if cell != 0 else "0" for cell in cells.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    ops = [op.__name__ for op in OPS]
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        rows = [
            row for part in pool.map(partial(compile_ops, options.ops), options.targets, chunksize=1) for row in part
        ]
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"resources-triton-{triton.__version__}.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
