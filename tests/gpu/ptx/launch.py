"""Launches decoded kernels on host memory, with reports and instruction counts."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .build import library
from .parser import SIZES, PtxError, parse
from .program import Program


@dataclass
class Options:
    seed: int = 0
    resident: int = 4  # CTAs that are interleaved
    budget: int = 4_000_000_000  # maximum number of warp instructions; more is reported as an endless loop
    races: bool = True
    warp_races: bool = True  # report races between lanes of one warp as warnings
    noise: bool = False  # approximate functions have the maximum error that the PTX manual allows
    fails_on: tuple[str, ...] = ("error",)  # severities that raise KernelError; all reports are kept in `reports`
    allowed: Callable[[Report], bool] = lambda report: False  # reports that never raise


@dataclass
class Report:
    kernel: str
    severity: str  # error, warning, note
    what: str
    line: int
    place: str
    detail: str
    count: int
    text: str  # of the instruction
    source: str  # source location

    def __str__(self) -> str:
        source = f" [{self.source}]" if self.source else ""
        first = f"first by {self.place}, {self.count} times; PTX line {self.line}: {self.text}{source}"
        return f"{self.severity}: {self.kernel}: {self.what}; {self.detail}; {first}"


class KernelError(PtxError):
    """A kernel made an error; see `reports`."""

    def __init__(self, reports: list[Report]) -> None:
        super().__init__("\n".join(str(report) for report in reports))
        self.reports = reports


@dataclass
class Span:
    """Memory that a kernel may access: [begin, end)."""

    begin: int
    end: int
    name: str
    writable: bool = True
    poisoned: bool = True


@dataclass
class Usage:
    program: Program
    launches: int = 0


options = Options()
reports: list[Report] = []
usage: dict[int, Usage] = {}


def _merged(spans: list[Span]) -> list[Span]:
    out: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.begin, -s.end)):
        if out and span.begin < out[-1].end:
            last = out[-1]
            name = last.name if span.end <= last.end and span.name in last.name else f"{last.name}|{span.name}"
            out[-1] = Span(last.begin, max(last.end, span.end), name, last.writable or span.writable, last.poisoned)
        elif span.end > span.begin:
            out.append(span)
    return out


def launch(
    program: Program, grid: tuple[int, ...], block: tuple[int, ...], params: bytes, spans: list[Span], shared: int = 0
) -> list[Report]:
    """Run a kernel; `params`: its parameter block, `shared`: its dynamic shared memory in bytes."""
    kernel = program.kernel
    if len(params) != kernel.param_size:
        raise PtxError(f"{kernel.name}: {len(params)} bytes of parameters given, expected {kernel.param_size}")
    if kernel.block and kernel.block != tuple([*block, 1, 1][:3]):
        raise PtxError(f"{kernel.name} requires blocks of {kernel.block}, got {block}")
    variables = kernel.variables.values()
    spans = [
        *spans,
        *(
            Span(program.symbols[v.name], program.symbols[v.name] + v.size, v.name, v.space != "const", False)
            for v in variables
            if v.name in program.buffers
        ),
    ]
    spans = _merged(spans)
    if not all(grid):
        return []
    bounds = np.array([[s.begin, s.end] for s in spans] or [[0, 0]], np.uint64)
    names = (ctypes.c_char_p * max(1, len(spans)))(*[s.name.encode() for s in spans])
    kinds = np.array([s.writable | s.poisoned << 1 for s in spans] or [0], np.uint8)
    settings = np.array(
        [options.seed, options.resident, options.budget, options.races, options.noise, options.warp_races], np.uint64
    )
    three = lambda sizes: np.array([*sizes, 1, 1][:3], np.uint32)  # noqa: E731
    sizes, threads = three(grid), three(block)
    buffer = np.frombuffer(params or b"\0", np.uint8)
    at = lambda a: ctypes.c_void_p(a.ctypes.data)  # noqa: E731
    text = (
        library()
        .ptx_launch(
            program.pointer,
            at(sizes),
            at(threads),
            ctypes.c_uint32(shared),
            ctypes.c_uint64(len(params)),
            at(buffer),
            ctypes.c_uint64(len(spans)),
            at(bounds),
            names,
            at(kinds),
            at(settings),
        )
        .decode()
    )
    used = usage.setdefault(id(program), Usage(program))
    used.launches += 1
    found = []
    statements = {s.line: s.text for s in kernel.statements}
    for row in text.splitlines():
        severity, what, line, place, detail, count = row.split("\t")
        number = int(line)
        source = kernel.sources.get(number, "")
        other = re.search(r"of line (\d+)", what)
        if other and (there := kernel.sources.get(int(other[1]))):
            source += f"; line {other[1]}: {there}: {statements.get(int(other[1]), '')[:60]}"
        found.append(
            Report(
                kernel.name, severity, what, number, place, detail, int(count), statements.get(number, "")[:160], source
            )
        )
    reports.extend(found)
    if wrong := [report for report in found if report.severity in options.fails_on and not options.allowed(report)]:
        raise KernelError(wrong)
    return found


class Module:
    """Kernels of a PTX module, called with numpy arrays and scalars; for CUDA C++ and hand-written PTX."""

    def __init__(self, text: str) -> None:
        self.kernels = parse(text)
        self._programs: dict[str, Program] = {}

    def program(self, name: str) -> Program:
        if name not in self._programs:
            self._programs[name] = Program(self.kernels[name])
        return self._programs[name]

    def __call__(self, name: str, grid, block, *args, shared: int = 0, spans: list[Span] = ()) -> list[Report]:
        program = self.program(name)
        params = bytearray(program.kernel.param_size)
        memory = list(spans)
        for i, (value, (offset, size)) in enumerate(zip(args, program.kernel.params.values(), strict=True)):
            if isinstance(value, np.ndarray):
                memory.append(Span(value.ctypes.data, value.ctypes.data + value.nbytes, f"argument {i}"))
                value = np.uint64(value.ctypes.data)
            data = value if isinstance(value, bytes) else np.asarray(value).tobytes()
            if len(data) != size:
                raise PtxError(f"{name}: argument {i} has {len(data)} bytes, its parameter has {size}")
            params[offset : offset + size] = data
        return launch(program, grid, block, bytes(params), memory, shared)


# ---- counts, to compare designs

SPECIAL = re.compile(r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh|div)\.(approx|full)")
GLOBAL = re.compile(r"(ld|st|atom|red)\.(volatile\.)?global|cp\.async\.c[ag]")


def counted(program: Program) -> Counter:
    """Counts: warp instructions; per thread, special functions (including exponentials) and bytes of global memory;
    multiplications and additions of matrix instructions."""
    total: Counter = Counter()
    for statement, warps, lanes in zip(program.instructions, *(n.tolist() for n in program.counts()), strict=True):
        opcode = statement.opcode
        total["warps"] += warps
        total["special"] += lanes * bool(SPECIAL.match(opcode))
        total["exponentials"] += lanes * opcode.startswith("ex2")
        if GLOBAL.match(opcode):
            total["bytes"] += lanes * _bytes(opcode, statement.operands)
        if shape := re.match(r"(?:wgmma\.mma_async|mma)\..*\bm(\d+)n(\d+)k(\d+)", opcode):
            m, n, k = map(int, shape.groups())
            total["products"] += 2 * min(m, 16) * n * k * warps  # a warp computes 16 of the 64 rows of its warpgroup
    return total


def _bytes(opcode: str, operands: list[str]) -> int:
    base, *mods = opcode.split(".")
    if base == "cp":
        return int(operands[2], 0)
    vector = next((int(m[1:]) for m in mods if re.fullmatch(r"v\d", m)), 1)
    return SIZES[mods[-1]] * vector
