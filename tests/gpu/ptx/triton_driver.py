"""A driver for Triton whose launches run the compiled PTX on host memory: kernels take CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import struct
import types
from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from .build import CACHE
from .launch import Span, launch
from .parser import PtxError, parse
from .program import Program

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
POISON = 0xFFA5  # value of each 16 bits of new memory, as in core/memory.cpp
_FORMATS = {
    "i1": "<b",
    "i8": "<b",
    "u8": "<B",
    "i16": "<h",
    "u16": "<H",
    "i32": "<i",
    "u32": "<I",
    "i64": "<q",
    "u64": "<Q",
    "fp32": "<f",
    "f32": "<f",
    "fp64": "<d",
    "fp16": "<e",
    "u1": "<B",
}


class Driver:
    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        limit = SHARED[arch]
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": limit, "multiprocessor_count": 4},
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install(arch: int = 80) -> None:
    """From now on, Triton compiles for `arch` and runs on the emulator. Call it before kernels are decorated."""
    triton.knobs.runtime.interpret = False
    triton.knobs.cache.dir = str(CACHE / "triton")  # a separate cache, since its entries have no cubin
    triton.runtime.driver.set_active(Driver(arch))
    CUDABackend.make_cubin = lambda *args, **kwargs: b""  # not needed, and half of the compilation time
    CompiledKernel._init_handles = _init_handles
    _poison_new_tensors()


def _init_handles(self: CompiledKernel) -> None:
    if self._run is not None:
        return
    driver = triton.runtime.driver.active
    limit = driver.utils.get_device_properties(0)["max_shared_mem"]
    if self.metadata.shared > limit:
        raise OutOfResources(self.metadata.shared, limit, "shared memory")
    self._run = functools.partial(_launch, self)
    self.function = 0


@functools.cache
def _program(ptx: str, name: str) -> Program:
    return Program(parse(ptx)[name])


def _launch(kernel: CompiledKernel, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args) -> None:
    metadata = kernel.metadata
    if getattr(metadata, "num_ctas", 1) != 1 or metadata.launch_cooperative_grid:
        raise PtxError("clusters and cooperative grids are not supported")
    program = _program(kernel.asm["ptx"], metadata.name)
    spans: list[Span] = []
    values: list[bytes] = []
    signature = kernel.src.signature
    for (name, kind), value in zip(signature.items(), args, strict=True):
        _argument(name, kind, value, values, spans)
    scratch = []
    for size in (metadata.global_scratch_size, metadata.profile_scratch_size):
        memory = torch.zeros(max(1, size * x * y * z), dtype=torch.uint8)
        scratch.append(memory)
        if size:
            spans.append(Span(memory.data_ptr(), memory.data_ptr() + memory.numel(), "scratch"))
        values.append(struct.pack("<Q", memory.data_ptr() if size else 0))
    params = bytearray(program.kernel.param_size)
    for value, (offset, size) in zip(values, program.kernel.params.values(), strict=True):
        if len(value) > size:
            raise PtxError(f"parameter of {size} bytes, got {len(value)}")
        params[offset : offset + len(value)] = value
    launch(program, (x, y, z), (32 * metadata.num_warps,), bytes(params), spans, metadata.shared)


def _argument(name: str, kind, value, values: list[bytes], spans: list[Span]) -> None:
    if isinstance(kind, tuple):
        for i, (inner, part) in enumerate(zip(kind, value, strict=True)):
            _argument(f"{name}.{i}", inner, part, values, spans)
    elif kind == "constexpr":
        return
    elif kind.startswith("*"):
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise PtxError(f"argument {name} is on {value.device}")
            spans += [_span(value, name), *_pointed_to(value, name)]
        values.append(struct.pack("<Q", value.data_ptr() if hasattr(value, "data_ptr") else int(value or 0)))
    elif kind == "bf16":
        values.append(struct.pack("<f", value)[2:])
    else:
        values.append(struct.pack(_FORMATS[kind], float(value) if "f" in kind else int(value)))


def _span(tensor: torch.Tensor, name: str) -> Span:
    """Memory from the first to the last element of a tensor, not its whole storage."""
    begin = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    shape = ", ".join(map(str, tensor.shape))
    label = f"{name} {str(tensor.dtype).removeprefix('torch.')}[{shape}]"
    return Span(begin, begin + (last + 1) * tensor.element_size(), label)


def _pointed_to(table: torch.Tensor, name: str) -> list[Span]:
    """The live tensors whose addresses are values of an int64 table."""
    if table.dtype != torch.int64 or table.numel() > 1 << 20 or not table.numel():
        return []
    addresses = {int(a) for a in table.detach().flatten().tolist() if a >= 1 << 32}
    if not addresses:
        return []
    found: dict[int, Span] = {}
    for tensor in gc.get_objects():
        if not issubclass(type(tensor), torch.Tensor) or type(tensor).__name__ == "FakeTensor":
            continue
        try:
            if tensor.device.type != "cpu" or tensor.layout != torch.strided:
                continue
            address = tensor.data_ptr()
            if address in addresses:
                span = _span(tensor, f"through {name}:")
                if address not in found or span.end > found[address].end:
                    found[address] = span
        except RuntimeError:
            continue
    return list(found.values())


def _poison_new_tensors() -> None:
    """Fill the results of torch.empty and similar functions, so that reads of unwritten memory are reported."""

    def poisoned(make: Callable) -> Callable:
        @functools.wraps(make)
        def run(*args, **kwargs):
            tensor = make(*args, **kwargs)
            plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
            if (
                plain
                and tensor.dtype != torch.bool
                and tensor.numel()
                and not torch._C._len_torch_dispatch_stack()
                and not torch.compiler.is_compiling()
            ):
                with contextlib.suppress(RuntimeError):
                    _fill(tensor)
            return tensor

        return run

    if not hasattr(torch.empty, "__wrapped__"):
        torch.empty = poisoned(torch.empty)
        torch.empty_like = poisoned(torch.empty_like)
        torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)


def _fill(tensor: torch.Tensor) -> None:
    size = tensor.numel() * tensor.element_size()
    pattern = struct.pack("<H", POISON) * (size // 2 + 1)
    ctypes.memmove(tensor.data_ptr(), pattern, size)
