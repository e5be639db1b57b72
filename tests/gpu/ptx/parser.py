"""Parser from PTX text to statements: instructions with their scopes, labels and declarations."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

SIZES = {
    "pred": 0,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "u16x2": 4,
    "s16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
    "b128": 16,
}


class PtxError(Exception):
    """PTX that the emulator does not support, or an error of a kernel."""


@dataclass
class Statement:
    opcode: str
    operands: list[str]
    guard: str | None  # "%p1" or "!%p1"
    line: int
    scope: Scope
    text: str


@dataclass
class Scope:
    parent: Scope | None
    registers: dict[str, str] = field(default_factory=dict)  # name: type
    families: dict[str, str] = field(default_factory=dict)  # "%r" of %r<10>: type
    number: int = 0

    def find(self, name: str) -> tuple[int, str] | None:
        """(number of the scope, type) of a register."""
        if name in self.registers:
            return self.number, self.registers[name]
        family = name.rstrip("0123456789")
        if family in self.families and family != name:
            return self.number, self.families[family]
        return self.parent.find(name) if self.parent else None


@dataclass
class Variable:
    name: str
    space: str
    align: int
    size: int  # bytes; 0 for extern arrays
    data: bytes | None = None


@dataclass
class Kernel:
    name: str
    params: dict[str, tuple[int, int]]  # name: (offset, bytes)
    param_types: list[str]
    statements: list[Statement]
    labels: dict[str, int]  # number of the statement that follows
    tables: dict[str, list[str]]  # .branchtargets
    variables: dict[str, Variable]  # of the module and of the kernel
    block: tuple[int, int, int] | None  # .reqntid
    lines: list[str]
    sources: dict[int, str]  # by line: "file:line" of the source

    @property
    def param_size(self) -> int:
        return max((offset + size for offset, size in self.params.values()), default=0)


def _without_comments(text: str) -> str:
    def blank(match: re.Match) -> str:
        return match[0] if match[0][0] == '"' else "\n" * match[0].count("\n") or " "

    return re.sub(r'"(?:[^"\\]|\\.)*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.S)


def split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += c in "[{(" or -(c in "]})")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def _variable(text: str) -> Variable | None:
    match = re.match(
        r"(?:\.(?:visible|extern|weak|common)\s+)*\.(shared|global|const|local)\b(.*?)\.([bsuf]\d+|pred)\s+([\w$%]+)\s*((?:\[[^\]]*\])*)\s*(?:=\s*(.*))?$",
        text,
        re.S,
    )
    if not match:
        return None
    space, attributes, kind, name, dims, value = match.groups()
    align = re.search(r"\.align\s+(\d+)", attributes)
    each = SIZES[kind]
    count = 1
    for dim in re.findall(r"\[([^\]]*)\]", dims):
        count *= int(dim, 0) if dim.strip() else 0
    data = None
    if value:
        numbers = [int(x, 0) for x in re.findall(r"0[xX][0-9a-fA-F]+|-?\d+", value)]
        data = b"".join((n % (1 << 8 * each)).to_bytes(each, "little") for n in numbers).ljust(each * count, b"\0")
    return Variable(name, space, int(align[1]) if align else each, each * count, data)


def _params(text: str) -> tuple[dict[str, tuple[int, int]], list[str]]:
    params, types, offset = {}, [], 0
    for part in split(text):
        match = re.match(r"\.param\s+(.*?)([\w$]+)\s*(?:\[(\d+)\])?$", part, re.S)
        if not match:
            raise PtxError(f"parameter: {part}")
        kind = re.search(r"\.([bsuf]\d+|pred)\b", match[1])
        each = SIZES[kind[1]]
        align = re.search(r"\.align\s+(\d+)", match[1]) if ".ptr" not in match[1] else None
        size = each * int(match[3] or 1)
        to = int(align[1]) if align else each
        offset = (offset + to - 1) // to * to
        params[match[2]] = offset, size
        types.append(("*" if ".ptr" in match[1] else "") + kind[1] + (f"[{match[3]}]" if match[3] else ""))
        offset += size
    return params, types


class _Reader:
    def __init__(self, text: str) -> None:
        self.original = text.splitlines()
        self.text = _without_comments(text)
        self.at = 0
        self.starts = [0] + [m.end() for m in re.finditer("\n", self.text)]

    def line(self, at: int) -> int:
        return bisect.bisect_right(self.starts, at)

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def until(self, stops: str) -> str:
        """Text up to one of `stops` outside brackets and strings; the position is then at that character."""
        depth, start = 0, self.at
        while self.at < len(self.text):
            c = self.text[self.at]
            if c == '"':
                self.at = self.text.index('"', self.at + 1)
            elif depth == 0 and c in stops:
                break
            else:
                depth += c in "[{(" or -(c in "]})")
            self.at += 1
        return self.text[start : self.at]


def parse(text: str) -> dict[str, Kernel]:
    """All kernels of a module."""
    reader = _Reader(text)
    variables: dict[str, Variable] = {}
    kernels: dict[str, Kernel] = {}
    files = {
        number: (name or path).rsplit("/", 1)[-1]
        for number, path, name in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', text)
    }
    while True:
        reader.skip()
        if reader.at >= len(reader.text):
            return kernels
        rest = reader.text[reader.at :]
        if match := re.match(r"\.(version|target|address_size|file)\b[^\n]*\n?|\.section[^{]*\{[^}]*\}", rest):
            reader.at += match.end()
        elif match := re.match(r"(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([\w$]+)\s*", rest):
            reader.at += match.end()
            header = reader.until("{;")
            if reader.text[reader.at] == ";":  # a declaration
                reader.at += 1
                continue
            parameters = re.match(r"\((.*?)\)(.*)", header, re.S)
            params, types = _params(parameters[1]) if parameters else ({}, [])
            block = re.search(r"\.reqntid\s+([\d,\s]+)", header)
            size = tuple([*(int(x) for x in block[1].split(",")), 1, 1][:3]) if block else None
            kernel = Kernel(match[1], params, types, [], {}, {}, dict(variables), size, reader.original, {})
            reader.at += 1
            _body(reader, kernel, files)
            kernels[kernel.name] = kernel
        elif re.match(r"(?:\.(?:visible|weak|extern)\s+)*\.func\b", rest):
            reader.until("{;")
            if reader.text[reader.at] == "{":  # device functions: an error only if called
                reader.at += 1
                reader.until("}")
            reader.at += 1
        else:
            statement = reader.until(";").strip()
            reader.at += 1
            if variable := _variable(statement):
                variables[variable.name] = variable
            elif not re.match(r"\.(pragma|alias|common)", statement):
                raise PtxError(f"line {reader.line(reader.at)}: unknown directive {statement[:80]!r}")


def _body(reader: _Reader, kernel: Kernel, files: dict[str, str]) -> None:
    scopes = [Scope(None)]
    count = 0
    source = None
    while scopes:
        reader.skip()
        text = reader.text
        c = text[reader.at]
        if c == "{":
            count += 1
            scopes.append(Scope(scopes[-1], number=count))
            reader.at += 1
            continue
        if c == "}":
            scopes.pop()
            reader.at += 1
            continue
        if c == ";":
            reader.at += 1
            continue
        rest = text[reader.at : reader.at + 200]
        if match := re.match(r"\.loc\s+(\d+)\s+(\d+)[^\n]*", rest):
            end = text.find("\n", reader.at)
            reader.at = end if end >= 0 else len(text)
            if match[2] != "0":
                source = f"{files.get(match[1], match[1])}:{match[2]}"
            continue
        if match := re.match(r"([\w$%]+)\s*:(?!:)", rest):
            kernel.labels[match[1]] = len(kernel.statements)
            reader.at += match.end()
            following = re.match(r"\s*\.branchtargets([^;]*);", text[reader.at : reader.at + 20000])
            if following:
                kernel.tables[match[1]] = split(following[1])
                reader.at += following.end()
            continue
        line = reader.line(reader.at)
        statement = " ".join(reader.until(";").split())
        reader.at += 1
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
            for name in split(match[2]):
                if family := re.match(r"([^<]+)<\d+>", name):
                    scopes[-1].families[family[1].strip()] = match[1]
                else:
                    scopes[-1].registers[name] = match[1]
        elif statement.startswith("."):
            if variable := _variable(statement):
                kernel.variables[variable.name] = variable
            elif not re.match(r"\.(pragma|maxnreg)", statement):
                raise PtxError(f"{kernel.name}, line {line}: unknown directive {statement[:80]!r}")
        else:
            match = re.match(r"(?:@\s*(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
            if not match:
                raise PtxError(f"{kernel.name}, line {line}: cannot read {statement[:80]!r}")
            guard = (match[1] + match[2]) if match[2] else None
            kernel.statements.append(Statement(match[3], split(match[4]), guard, line, scopes[-1], statement))
            if source:
                kernel.sources[line] = source
