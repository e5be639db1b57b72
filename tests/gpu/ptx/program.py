"""Decodes statements to instructions of the core: registers, constants, opcodes. Unknown instructions are errors."""

from __future__ import annotations

import ctypes
import re
import struct
from functools import cache

import numpy as np

from .build import library
from .parser import SIZES, Kernel, PtxError, Statement, Variable

# As in core/machine.h
SINK, OWN_DEF, COLLECTIVE, ALIGNED, BRANCH = 1, 2, 4, 8, 16
FTZ, SAT = 1, 2
ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4, "rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
SHARED_BASE, SHARED_WINDOW, LOCAL_WINDOW = 1024, 0x0100 << 48, 0x0200 << 48
SPACES = {"global": 1, "shared": 2, "local": 3, "param": 4, "const": 1}
SPECIAL = {
    "%tid.x": 0,
    "%tid.y": 1,
    "%tid.z": 2,
    "%ntid.x": 3,
    "%ntid.y": 4,
    "%ntid.z": 5,
    "%ctaid.x": 6,
    "%ctaid.y": 7,
    "%ctaid.z": 8,
    "%nctaid.x": 9,
    "%nctaid.y": 10,
    "%nctaid.z": 11,
    "%laneid": 12,
    "%warpid": 13,
    "%nwarpid": 14,
    "%smid": 15,
    "%nsmid": 16,
    "%lanemask_eq": 17,
    "%lanemask_lt": 18,
    "%lanemask_le": 19,
    "%lanemask_gt": 20,
    "%lanemask_ge": 21,
    "%dynamic_smem_size": 22,
    "%total_smem_size": 23,
    "%cluster_ctaid.x": 24,
    "%cluster_ctaid.y": 24,
    "%cluster_ctaid.z": 24,
    "%cluster_ctarank": 24,
    "%cluster_nctaid.x": 25,
    "%cluster_nctaid.y": 25,
    "%cluster_nctaid.z": 25,
    "%cluster_nctarank": 25,
}
CLOCKS = {"%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi"}
CACHE = {"ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "unified"}
ORDERS = {"relaxed": 0, "acquire": 1, "release": 2, "acq_rel": 3}
SCOPES = {"cta", "cluster", "gpu", "sys"}
FLOATS = {"f32", "f64"}
HALVES = {"f16": ("f16", 1), "f16x2": ("f16", 2), "bf16": ("bf16", 1), "bf16x2": ("bf16", 2)}
ELEMENTS = {"f16": 0, "bf16": 1, "tf32": 2, "f64": 3, "s8": 4, "u8": 5}
INTEGER = {
    "add",
    "sub",
    "mul.lo",
    "mul.hi",
    "mul.wide",
    "div",
    "rem",
    "min",
    "max",
    "mad.lo",
    "mad.hi",
    "mad.wide",
    "sad",
    "neg",
    "abs",
}


@cache
def _handler(name: str) -> int:
    return library().ptx_handler(name.encode())


class Program:
    """A kernel decoded for the core."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._constants: dict[tuple[int, int], int] = {}  # (value, bytes): number
        self._specials: dict[str, int] = {}
        self._fixed: list[tuple[int, int, int | None]] = []  # (offset, bytes, value or None) of constants, specials
        self._fixed_size = 0
        self._registers: dict[tuple[int, str], tuple[int, int, int]] = {}  # (offset, number, bytes)
        self._size = 0
        self._code: list[list] = []
        self._where: list[Statement] = []
        self._targets: list[tuple[int, int, str]] = []  # instruction, number of its imm, label
        self._first: list[int] = []  # first instruction of each statement
        self._granules = {"shared": 4, "global": 4}
        self._place_variables()
        for statement in kernel.statements:
            self._first.append(len(self._code))
            self._now = statement
            try:
                self._decode(statement)
            except PtxError:
                raise
            except Exception as error:  # noqa: BLE001
                self._fail(f"{type(error).__name__}: {error}")
        self._first.append(len(self._code))
        self._now = Statement("exit", [], None, len(kernel.lines), kernel.statements[-1].scope, "end of the kernel")
        self._emit("exit", flags=BRANCH)
        self._build()

    def _fail(self, why: str) -> None:
        raise PtxError(f"{self.kernel.name}, line {self._now.line}: {self._now.text}: {why}")

    # ---- memory declared by the module

    def _place_variables(self) -> None:
        shared = local = 0
        self.symbols: dict[str, int] = {}
        self.buffers: dict[str, ctypes.Array] = {}
        dynamic: list[Variable] = []
        for variable in self.kernel.variables.values():
            if variable.space == "shared" and not variable.size:
                dynamic.append(variable)
            elif variable.space == "shared":
                shared = -(-shared // variable.align) * variable.align
                self.symbols[variable.name] = SHARED_BASE + shared
                shared += variable.size
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                self.symbols[variable.name] = local
                local += variable.size
            else:
                buffer = ctypes.create_string_buffer(variable.data or bytes(variable.size), max(variable.size, 1) + 256)
                at = -(-ctypes.addressof(buffer) // 256) * 256
                if at != ctypes.addressof(buffer):
                    ctypes.memmove(at, variable.data or bytes(variable.size), variable.size)
                self.buffers[variable.name] = buffer
                self.symbols[variable.name] = at
        # Hopper aligns dynamic shared memory to 1 KiB; swizzling by address depends on it.
        self.static_shared = -(-shared // 1024) * 1024 if dynamic else shared
        for variable in dynamic:
            self.symbols[variable.name] = SHARED_BASE + self.static_shared
        self.local_size = -(-local // 16) * 16

    # ---- operands: each gives (is fixed, offset, number, bytes)

    def _constant(self, value: int, size: int) -> tuple[bool, int, int, int]:
        bits = value % (1 << (8 * size if size else 1))
        key = bits, size
        if key not in self._constants:
            self._constants[key] = self._fix(size, bits)
        number = self._constants[key]
        return True, self._fixed[number][0], number, size

    def _fix(self, size: int, value: int | None) -> int:
        self._fixed.append((self._fixed_size, size, value))
        self._fixed_size += 64 * max(1, size // 2)
        return len(self._fixed) - 1

    def _register(self, name: str) -> tuple[bool, int, int, int]:
        found = self._now.scope.find(name)
        if not found:
            self._fail(f"unknown register or symbol {name}")
        key = found[0], name
        if key not in self._registers:
            size = max(SIZES[found[1]], 2) if found[1] != "pred" else 0
            self._registers[key] = self._size, len(self._registers), size
            self._size += 64 * max(1, size // 2)
        return False, *self._registers[key]

    def _integer(self, text: str) -> int | None:
        text = text.strip()
        if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
            digits = match[2]
            value = int(digits, 8 if re.fullmatch(r"0[0-7]+", digits) else 0)
            return -value if match[1] else value
        return None

    def _literal(self, text: str, kind: str) -> int | None:
        """Bits of an immediate operand of the given type."""
        if (value := self._integer(text)) is not None:
            if kind in FLOATS and text.lstrip("-") not in ("0",):
                return self._float(float(value), kind)
            return value
        if match := re.fullmatch(r"(-?)0[fF]([0-9a-fA-F]{8})", text):
            bits = int(match[2], 16) ^ (bool(match[1]) << 31)
            return self._float(struct.unpack("<f", struct.pack("<I", bits))[0], "f64") if kind == "f64" else bits
        if match := re.fullmatch(r"(-?)0[dD]([0-9a-fA-F]{16})", text):
            bits = int(match[2], 16) ^ (bool(match[1]) << 63)
            return self._float(struct.unpack("<d", struct.pack("<Q", bits))[0], "f32") if kind == "f32" else bits
        if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
            return self._float(float(text), kind)
        return None

    @staticmethod
    def _float(value: float, kind: str) -> int:
        code, bits = ("<d", "<Q") if kind == "f64" else ("<f", "<I")
        return struct.unpack(bits, struct.pack(code, value))[0]

    def _source(self, text: str, kind: str, *, size: int | None = None, any_width: bool = False):
        """A register, constant, special register or address of a symbol, read as type `kind`."""
        size = SIZES[kind] if size is None else size
        if text in SPECIAL:
            if text not in self._specials:
                self._specials[text] = self._fix(4, None)
            number = self._specials[text]
            return True, self._fixed[number][0], number, 4
        if (value := self._literal(text, kind)) is not None:
            if kind == "pred":
                value = int(value != 0)
            return self._constant(value, size)
        base, _, offset = text.partition("+")
        if base.strip() in self.symbols and not self._now.scope.find(base.strip()):
            return self._constant(self.symbols[base.strip()] + int(offset or "0", 0), size)
        if base.strip() in self.kernel.params and size == 8:  # an address in parameter space, for ld.param
            return self._constant(self.kernel.params[base.strip()][0] + int(offset or "0", 0), size)
        found = self._register(text)
        if found[3] != size and not any_width:
            self._fail(f"{text} has {found[3]} bytes, its type {kind} has {size}")
        return found

    def _destination(self, text: str, kind: str, *, any_width: bool = False):
        if text == "_":
            size = SIZES[kind]
            key = -1, f"_{size}"
            if key not in self._registers:
                self._registers[key] = self._size, len(self._registers), size
                self._size += 64 * max(1, size // 2)
            return False, *self._registers[key]
        return self._source(text, kind, any_width=any_width) if any_width else self._source(text, kind)

    def _address(self, text: str):
        """(base, offset, size of the base in bytes) of [base + offset]."""
        inner = text.strip()
        if not (inner.startswith("[") and inner.endswith("]")):
            self._fail(f"{text} is not an address")
        inner = inner[1:-1].strip()
        match = re.fullmatch(r"([\w$%]+)\s*(?:([+-])\s*(-?\w+))?", inner)
        if not match:
            self._fail(f"cannot read the address {text}")
        offset = int(match[3] or "0", 0) * (-1 if match[2] == "-" else 1)
        name = match[1]
        if self._now.scope.find(name):
            base = self._register(name)
            return base, offset, base[3]
        if (value := self._integer(name)) is not None:
            return self._constant(value, 8), offset, 8
        if name in self.symbols:
            return self._constant(self.symbols[name], 8), offset, 8
        if name in self.kernel.params:
            return self._constant(0, 8), offset + self.kernel.params[name][0], 8
        self._fail(f"unknown symbol {name}")

    def _group(self, text: str) -> list[str]:
        return [part.strip() for part in text[1:-1].split(",")] if text.startswith("{") else [text]

    # ---- emission

    def _emit(self, handler: str, destinations=(), sources=(), flags: int = 0, **imm: int) -> int:
        number = _handler(handler)
        if number < 0:
            self._fail(f"unknown instruction (no handler {handler})")
        guard = None
        if self._now.guard:
            guard = self._register(self._now.guard.lstrip("!"))
        self._code.append(
            [number, list(destinations), list(sources), flags, guard, [imm.get(f"i{k}", 0) for k in range(8)]]
        )
        self._where.append(self._now)
        return len(self._code) - 1

    def _narrow(self, space: str, size: int) -> None:
        for name in ("shared", "global") if space == "" else (space,):
            if name in self._granules:
                self._granules[name] = min(self._granules[name], size)

    def _decode(self, s: Statement) -> None:
        base, *mods = s.opcode.split(".")
        decode = getattr(self, "_op_" + base, None)
        if decode:
            return decode(mods, s.operands)
        self._simple(base, mods, s.operands)

    def _flags(self, mods: list[str]) -> tuple[list[str], int]:
        """Modifiers without the floating-point modifiers, and the flags for imm 7."""
        value = 0
        rest = []
        for mod in mods:
            if mod == "ftz":
                value |= FTZ
            elif mod == "sat":
                value |= SAT
            elif mod in ("rn", "rz", "rm", "rp"):
                value |= ROUNDING[mod] << 2
            else:
                rest.append(mod)
        return rest, value

    def _simple(self, base: str, mods: list[str], operands: list[str]) -> None:
        """One result, and sources of the same type, with exceptions for some instructions."""
        kind = mods[-1]
        if base in ("addc", "subc", "madc") or "cc" in mods:
            return self._extended(base, mods, operands)
        rest, flags = self._flags(mods[:-1])
        if kind not in SIZES:
            self._fail("unknown instruction")
        if base in ("fma", "mad") and kind in FLOATS:
            base, rest = "fma", [m for m in rest if m not in ("lo", "hi")]
        name, same, extra = base, kind, {}
        counts = {
            "shl": (kind, "u32"),
            "shr": (kind, "u32"),
            "bfe": (kind, "u32", "u32"),
            "bfi": (kind, kind, "u32", "u32"),
            "selp": (kind, kind, "pred"),
            "slct": (kind, kind, rest[-1] if rest else kind),
        }
        result = kind
        if kind in HALVES:
            same, extra["i6"] = HALVES[kind]
        elif base in (
            "and",
            "or",
            "xor",
            "not",
            "cnot",
            "shl",
            "selp",
            "popc",
            "clz",
            "brev",
            "bfi",
            "lop3",
            "prmt",
            "shf",
        ):
            same = kind if kind == "pred" else f"b{8 * SIZES[kind]}"
        elif base == "shr":
            same = f"s{8 * SIZES[kind]}" if kind[0] == "s" else f"u{8 * SIZES[kind]}"
        if base in ("popc", "clz", "bfind"):
            result = "u32"
        if base in ("mul", "mad") and rest[:1] == ["wide"]:
            result = f"{kind[0]}{16 * SIZES[kind]}"
            counts["mad"] = (kind, kind, result)
        if kind not in FLOATS and kind not in HALVES and flags & SAT:
            rest, flags = ["sat"], 0
        if (
            kind in FLOATS | set(HALVES)
            and base
            in ("min", "max", "fma", "add", "sub", "mul", "neg", "abs", "div", "sqrt", "rcp", "copysign", "testp")
            or rest == ["approx"]
        ):
            extra["i7"] = flags
            flags = 0
        if base == "div" and "full" in rest or base in ("ex2", "lg2", "rsqrt", "sin", "cos", "tanh", "rcp", "sqrt"):
            extra["i7"] = flags & FTZ if flags else extra.get("i7", 0)
            flags = 0
        if flags:
            self._fail("unsupported rounding or saturation")
        if base == "lop3":
            extra["i0"] = self._integer(operands.pop())
        if base == "prmt":
            modes = ["", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]
            extra["i0"], rest = modes.index(rest[0] if rest else ""), []
        if base == "shf":
            extra["i0"], rest = int(rest[-1] == "wrap"), rest[:1]
        if base == "slct":
            if rest != ["s32"]:
                self._fail("slct on a float")
            rest, same = [], "b32"
        if base == "bfind":
            extra["i0"], rest = int("shiftamt" in rest), []
        if base == "testp":
            result = "pred"
        if base in ("ex2", "tanh") and kind in HALVES and rest == ["approx"]:
            pass
        name = ".".join([base, *rest, same])
        destination = self._destination(operands[0], result)
        kinds = counts.get(base, (kind,) * (len(operands) - 1))
        if len(kinds) != len(operands) - 1:
            self._fail("number of operands")
        sources = [self._source(text, k) for text, k in zip(operands[1:], kinds, strict=True)]
        self._emit(name, [destination], sources, OWN_DEF if base == "selp" else 0, **extra)

    def _extended(self, base: str, mods: list[str], operands: list[str]) -> None:
        kind = mods[-1]
        operation = {"add": 0, "sub": 1, "mad": 3 if "hi" in mods else 2}[base[:3]]
        if kind[0] == "s" and operation == 3:
            self._fail("signed high product with a carry")
        values = [self._source(x, kind) for x in operands[1:]]
        self._emit(
            f"extended.u{8 * SIZES[kind]}",
            [self._destination(operands[0], kind)],
            values,
            i0=int(base.endswith("c")),
            i1=int("cc" in mods),
            i2=operation,
        )

    # ---- moves and conversions

    def _op_mov(self, mods, operands):
        kind = mods[0]
        to, source = operands
        size = SIZES[kind]
        if source in CLOCKS:
            destination = self._destination(to, kind)
            return self._emit(f"clock.b{8 * size}", [destination], [self._constant(0, size)])
        if to.startswith("{"):
            names = self._group(to)
            part = size // len(names)
            parts = [self._destination(name, f"b{8 * part}") for name in names]
            return self._emit("unpack", parts, [self._source(source, kind)], OWN_DEF, i0=part)
        if source.startswith("{"):
            names = self._group(source)
            part = size // len(names)
            parts = [self._source(name, f"b{8 * part}") for name in names]
            return self._emit("pack", [self._destination(to, kind)], parts, OWN_DEF, i0=part)
        name = "mov.pred" if kind == "pred" else f"mov.b{8 * size}"
        destination, value = self._destination(to, kind), self._source(source, kind, any_width=source in SPECIAL)
        if source in SPECIAL and size != 4:
            return self._emit("cvt.u64.u32", [destination], [value], i3=size, i4=4)
        self._emit(name, [destination], [value])

    def _op_cvta(self, mods, operands):
        kind = mods[-1]
        window = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(mods[-2], 0)
        if "to" in mods:
            window = -window
        self._emit(
            "add.u64",
            [self._destination(operands[0], kind)],
            [self._source(operands[1], kind), self._constant(window, 8)],
        )

    def _op_mapa(self, mods, operands):  # clusters have one CTA
        kind = mods[-1]
        self._emit(f"mov.b{8 * SIZES[kind]}", [self._destination(operands[0], kind)], [self._source(operands[1], kind)])

    def _op_isspacep(self, mods, operands):
        self._emit(
            "isspacep",
            [self._destination(operands[0], "pred")],
            [self._source(operands[1], "u64")],
            i0={"global": 0, "shared": 1, "shared::cta": 1, "local": 2}[mods[0]],
        )

    def _op_createpolicy(self, mods, operands):
        self._emit("mov.b64", [self._destination(operands[0], "b64")], [self._constant(0, 8)])

    def _op_cvt(self, mods, operands):
        to, source = mods[-2:]
        imm = {"i7": 0}
        for mod in mods[:-2]:
            if mod in ROUNDING:
                imm["i0"] = ROUNDING[mod]
                imm["i1"] = int(mod.endswith("i") and to in FLOATS | {"f16", "bf16"})
            elif mod == "ftz":
                imm["i7"] |= FTZ
            elif mod == "sat":
                imm["i7"] |= SAT
            elif mod == "relu":
                imm["i5"] = 1
            else:
                self._fail(f"cvt modifier {mod}")
        if to in ("bf16x2", "f16x2") and source == "f32":
            sources = [self._source(x, "f32") for x in operands[1:]]
            return self._emit(f"cvt.{to}.f32", [self._destination(operands[0], to)], sources, **imm)
        if to == "tf32":
            return self._emit(
                "cvt.tf32.f32", [self._destination(operands[0], "b32")], [self._source(operands[1], "f32")], **imm
            )
        destination = self._destination(operands[0], to, any_width=True)
        value = self._source(operands[1], source, any_width=True)
        if destination[3] < SIZES[to] or value[3] < SIZES[source]:
            self._fail("register narrower than its type")
        if (to, source) == ("u16", "u32") and destination[3] == 2 and not imm["i7"]:  # lower half of a packed register
            return self._emit("unpack", [destination, self._destination("_", "b16")], [value], OWN_DEF, i0=2)
        imm["i3"], imm["i4"] = destination[3], value[3]
        plain = not imm["i7"] and not imm.get("i1") and not imm.get("i5") and imm.get("i0", 0) == 0
        plain &= destination[3] == SIZES[to] and value[3] == SIZES[source]
        integers = to[0] in "us" and source[0] in "us"
        fast = (
            integers
            or (source[0] in "us" and to in FLOATS)
            or (to, source) in (("f32", "f16"), ("f32", "bf16"), ("bf16", "f32"), ("f16", "f32"), ("f64", "f32"))
        )
        self._emit(f"cvt.{to}.{source}" + (".plain" if plain and fast else ""), [destination], [value], **imm)

    # ---- predicates

    def _op_setp(self, mods, operands):
        mods, flags = self._flags(mods)
        compare, kind = mods[0], mods[-1]
        combine = mods[1:-1]
        p, *second = operands[0].split("|")
        names = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        compare = names.get(compare, compare)
        typed = (
            kind
            if kind in FLOATS
            else HALVES[kind][0]
            if kind in HALVES
            else (("s" if kind[0] == "s" else "u") + kind[1:])
        )
        destinations = [self._destination(x, "pred") for x in (p, *second)]
        sources = [self._source(x, kind) for x in operands[1:3]]
        negated = 0
        if combine:
            negated = int(operands[3].startswith("!"))
            sources.append(self._source(operands[3].lstrip("!"), "pred"))
        self._emit(
            f"setp.{compare}.{typed}",
            destinations,
            sources,
            i0=["", "and", "or", "xor"].index(combine[0] if combine else ""),
            i1=negated,
            i2=len(second),
            i6=1 if kind in HALVES else 0,
            i7=flags & FTZ,
        )

    def _op_set(self, mods, operands):
        mods, flags = self._flags(mods)
        compare, to, kind = mods
        typed = kind if kind in FLOATS else ("s" if kind[0] == "s" else "u") + kind[1:]
        self._emit(
            f"set.{compare}.{typed}",
            [self._destination(operands[0], to)],
            [self._source(x, kind) for x in operands[1:]],
            i3=int(to == "f32"),
            i7=flags,
        )

    # ---- memory

    def _access(self, mods: list[str]) -> dict:
        found = {"space": "", "vector": 1, "kind": mods[-1], "strong": 0, "order": 0}
        for mod in mods[:-1]:
            if mod.split("::")[0] in SPACES:
                found["space"] = mod.split("::")[0]
                if mod == "shared::cluster":
                    found["space"] = "shared"
            elif mod in ("v2", "v4", "v8"):
                found["vector"] = int(mod[1:])
            elif mod in ("volatile", "mmio"):
                found["strong"] = 1
            elif mod in ORDERS:
                found["strong"], found["order"] = 1, ORDERS[mod]
            elif mod in CACHE or mod in SCOPES or mod == "weak" or re.match(r"L[12]::", mod):
                pass
            else:
                self._fail(f"modifier {mod}")
        return found

    def _op_ld(self, mods, operands):
        a = self._access(mods)
        size = SIZES[a["kind"]]
        names = self._group(operands[0])
        results = [self._destination(x, a["kind"], any_width=True) for x in names]
        base, offset, width = self._address(operands[1])
        if len(names) != a["vector"] or any(r[3] != results[0][3] or r[3] < size for r in results):
            self._fail("results of a load")
        if a["space"] != "param":
            self._narrow(a["space"], size)
        self._emit(
            "ld",
            results,
            [base],
            SINK | OWN_DEF,
            i0=SPACES.get(a["space"], 0),
            i1=offset,
            i2=size,
            i3=a["vector"],
            i4=int(a["kind"][0] == "s"),
            i5=a["strong"] | a["order"] << 1,
            i6=results[0][3],
            i7=width,
        )

    _op_ldu = _op_ld

    def _op_st(self, mods, operands):
        a = self._access(mods)
        size = SIZES[a["kind"]]
        base, offset, width = self._address(operands[0])
        values = [self._source(x, a["kind"], any_width=True) for x in self._group(operands[1])]
        if len(values) != a["vector"]:
            self._fail("values of a store")
        wide = max(v[3] for v in values)
        if any(v[3] != wide for v in values) or wide < size:
            self._fail("values of a store")
        self._narrow(a["space"], size)
        self._emit(
            "st",
            [],
            [base, *values],
            0,
            i0=SPACES.get(a["space"], 0),
            i1=offset,
            i2=size,
            i3=a["vector"],
            i5=a["strong"] | a["order"] << 1,
            i6=wide,
            i7=width,
        )

    def _atomic(self, base: str, mods, operands):
        kinds = {"u": 0, "b": 0, "s": 1, "f": 2}
        space, order, vector = "", 0, 1
        operations = ["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"]
        operation = None
        for mod in mods[:-1]:
            if mod.split("::")[0] in ("global", "shared"):
                space = mod.split("::")[0]
            elif mod in ORDERS:
                order = ORDERS[mod]
            elif mod in operations:
                operation = operations.index(mod)
            elif mod in ("v2", "v4", "v8"):
                vector = int(mod[1:])
            elif mod not in SCOPES and mod != "noftz" and not mod.startswith("L2::"):
                self._fail(f"modifier {mod}")
        kind = mods[-1]
        code = {"f16": 3, "bf16": 4, "f16x2": 5, "bf16x2": 6}.get(kind, kinds.get(kind[0]))
        results = [self._destination(x, kind) for x in self._group(operands[0])] if base == "atom" else []
        rest = operands[1:] if base == "atom" else operands
        at, offset, width = self._address(rest[0])
        values = [self._source(x, kind) for text in rest[1 : 3 if operation == 7 else 2] for x in self._group(text)]
        self._narrow(space, SIZES[kind])
        self._emit(
            base,
            results,
            [at, *values],
            SINK,
            i0=SPACES.get(space, 0),
            i1=offset,
            i2=SIZES[kind],
            i3=vector,
            i4=operation,
            i5=1 | order << 1,
            i6=code,
            i7=width,
        )

    def _op_atom(self, mods, operands):
        self._atomic("atom", mods, operands)

    def _op_red(self, mods, operands):
        if mods[0] == "async":
            self._fail("unknown instruction")
        self._atomic("red", mods, operands)

    def _op_cp(self, mods, operands):
        if mods[:2] == ["async", "commit_group"] or mods[:2] == ["async", "wait_all"]:
            return self._emit(f"cp.async.{mods[1]}")
        if mods[:2] == ["async", "wait_group"]:
            return self._emit("cp.async.wait_group", i0=int(operands[0], 0))
        if mods[:2] == ["async", "bulk"]:
            return self._bulk(mods, operands)
        if mods[0] != "async" or mods[1] not in ("ca", "cg"):
            self._fail("unknown instruction")
        if any(m not in ("shared", "shared::cta", "global") and not m.startswith("L2::") for m in mods[2:]):
            self._fail("modifier")
        to, to_offset, width = self._address(operands[0])
        source, offset, source_width = self._address(operands[1])
        size = int(operands[2], 0)
        rest = operands[3:]
        if "L2::cache_hint" in mods:
            rest = rest[:-1]
        if source_width != 8:
            self._fail("source address")
        sources = [to, source]
        if rest:
            known = self._now.scope.find(rest[0])
            if known and known[1] == "pred":
                self._fail("ignore-src")
            sources.append(self._source(rest[0], "u32"))
        self._narrow("shared", min(size, 4))
        self._emit("cp.async", [], sources, SINK, i0=to_offset, i1=offset, i2=size, i3=int(bool(rest)), i7=width)

    def _bulk(self, mods, operands):
        if (
            mods[2:4] not in (["shared::cluster", "global"], ["shared::cta", "global"])
            or mods[4] != "mbarrier::complete_tx::bytes"
            or len(mods) > 5
        ):
            self._fail("unknown bulk copy")
        (to, i0, i5), (source, i1, _), (barrier, i2, i7) = (self._address(operands[k]) for k in (0, 1, 3))
        self._emit(
            "cp.async.bulk",
            [],
            [to, source, self._source(operands[2], "u32"), barrier],
            SINK,
            i0=i0,
            i1=i1,
            i2=i2,
            i5=i5,
            i7=i7,
        )

    def _op_mbarrier(self, mods, operands):
        what = mods[0]
        if what in ("init", "inval"):
            base, offset, width = self._address(operands[0])
            rest = [self._source(operands[1], "u32")] if what == "init" else []
            return self._emit(f"mbarrier.{what}", [], [base, *rest], SINK, i0=offset, i7=width)
        if what in ("arrive", "expect_tx"):
            if "noComplete" in mods or "shared::cluster" in mods and operands[0] != "_":
                self._fail("unknown instruction")
            state = [] if operands[0] == "_" or what == "expect_tx" else [self._destination(operands[0], "b64")]
            operands = operands if what == "expect_tx" else operands[1:]
            base, offset, width = self._address(operands[0])
            more = [self._source(x, "u32") for x in operands[1:2]]
            expects = "expect_tx" in mods
            return self._emit(
                "mbarrier.arrive",
                state,
                [base, *more],
                SINK,
                i0=offset,
                i1=len(state),
                i2=int(expects),
                i3=int(bool(more) and not expects),
                i4=int(what == "expect_tx"),
                i7=width,
            )
        if what not in ("test_wait", "try_wait"):
            self._fail("unknown instruction")
        base, offset, width = self._address(operands[1])
        parity = "parity" in mods
        value = self._source(operands[2], "u32" if parity else "b64")
        self._emit(
            "mbarrier.wait",
            [self._destination(operands[0], "pred")],
            [base, value],
            SINK,
            i0=offset,
            i1=int(parity),
            i7=width,
        )

    def _op_ldmatrix(self, mods, operands):
        if mods[:3] != ["sync", "aligned", "m8n8"] or mods[-1] != "b16":
            self._fail("unknown shape")
        results = [self._destination(x, "b32") for x in self._group(operands[0])]
        base, offset, width = self._address(operands[1])
        self._emit(
            "ldmatrix",
            results,
            [base],
            SINK | OWN_DEF | ALIGNED,
            i0=int(mods[3][1:]),
            i1=int("trans" in mods),
            i2=offset,
            i7=width,
        )

    def _op_stmatrix(self, mods, operands):
        if mods[:3] != ["sync", "aligned", "m8n8"] or mods[-1] != "b16":
            self._fail("unknown shape")
        base, offset, width = self._address(operands[0])
        values = [self._source(x, "b32") for x in self._group(operands[1])]
        self._emit(
            "stmatrix", [], [base, *values], ALIGNED, i0=int(mods[3][1:]), i1=int("trans" in mods), i2=offset, i7=width
        )

    def _op_prefetch(self, mods, operands):
        self._emit("prefetch")

    _op_prefetchu = _op_applypriority = _op_discard = _op_prefetch

    def _op_membar(self, mods, operands):
        self._emit("fence")

    def _op_fence(self, mods, operands):
        if mods[0] == "proxy":
            if mods[1] == "async":
                return self._emit("fence.proxy.async")
            self._fail("unknown proxy")
        self._emit("fence")

    # ---- tensor cores

    def _op_mma(self, mods, operands):
        match = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", mods[2])
        kinds = [m for m in mods[3:] if m in SIZES]
        if mods[:2] != ["sync", "aligned"] or mods[3:5] != ["row", "col"] or int(match[2]) != 8 or len(kinds) != 4:
            self._fail("unknown shape")
        if "satfinite" in mods or kinds[1] != kinds[2] or kinds[1] not in ELEMENTS:
            self._fail("unknown types")
        d, a, b, c = (self._group(x) for x in operands)
        wide, k = SIZES[kinds[0]], int(match[3])
        word = "b64" if kinds[1] == "f64" else "b32"
        accumulator = "b64" if kinds[0] == "f64" else "b32"
        sources = [self._source(x, word) for x in a + b] + [
            self._source(x, "f32" if accumulator == "b32" else "f64") for x in c
        ]
        self._emit(
            "mma",
            [self._destination(x, accumulator) for x in d],
            sources,
            SINK | ALIGNED,
            i0=ELEMENTS[kinds[1]],
            i1=wide,
            i2=int(match[1]),
            i3=k,
            i4=len(a),
            i5=len(b),
        )

    def _op_wgmma(self, mods, operands):
        if mods[0] == "fence":
            return self._emit("wgmma.fence", flags=ALIGNED)
        if mods[0] == "commit_group":
            return self._emit("wgmma.commit_group", flags=ALIGNED)
        if mods[0] == "wait_group":
            return self._emit("wgmma.wait_group", flags=ALIGNED, i0=int(operands[0], 0))
        match = re.fullmatch(r"m64n(\d+)k(\d+)", mods[3])
        if (
            mods[:3] != ["mma_async", "sync", "aligned"]
            or len(mods) != 7
            or mods[5] != mods[6]
            or mods[5] not in ELEMENTS
        ):
            self._fail("unknown shape")
        accumulators = self._group(operands[0])
        registers = operands[1].startswith("{")
        a = (
            [self._source(x, "b32") for x in self._group(operands[1])]
            if registers
            else [self._source(operands[1], "b64")]
        )
        scale = self._source(operands[3], "pred")
        numbers = [int(x, 0) for x in operands[4:]]
        signs = (numbers[0] < 0) | (numbers[1] < 0) << 1
        major = numbers[2:]
        transposed = (major[0] << 1 if registers else major[0] | major[1] << 1) if major else 0
        self._narrow("shared", 4)
        results = [self._destination(x, "b32") for x in accumulators]
        self._emit(
            "wgmma",
            results,
            [*a, self._source(operands[2], "b64"), scale],
            SINK | ALIGNED | OWN_DEF,
            i0=ELEMENTS[mods[5]],
            i1=SIZES[mods[4]],
            i2=int(match[1]),
            i3=int(match[2]),
            i4=int(registers),
            i5=signs,
            i6=transposed,
        )

    # ---- collectives, barriers, control

    def _op_shfl(self, mods, operands):
        if mods[0] != "sync" or mods[2] != "b32":
            self._fail("unknown instruction")
        d, *p = operands[0].split("|")
        results = [self._destination(d, "b32"), *(self._destination(x, "pred") for x in p)]
        self._emit(
            "shfl",
            results,
            [self._source(x, "b32") for x in operands[1:]],
            OWN_DEF | COLLECTIVE,
            i0=["idx", "up", "down", "bfly"].index(mods[1]),
            i1=len(p),
        )

    def _op_vote(self, mods, operands):
        if mods[0] != "sync":
            self._fail("unknown instruction")
        kind = ["all", "any", "uni", "ballot"].index(mods[1])
        result = self._destination(operands[0], "b32" if kind == 3 else "pred")
        source = self._source(operands[1].lstrip("!"), "pred")
        self._emit(
            "vote",
            [result],
            [source, self._source(operands[2], "b32")],
            SINK | COLLECTIVE,
            i0=kind,
            i1=int(operands[1].startswith("!")),
        )

    def _op_match(self, mods, operands):
        d, *p = operands[0].split("|")
        results = [self._destination(d, "b32"), *(self._destination(x, "pred") for x in p)]
        self._emit(
            f"match.{mods[-1]}",
            results,
            [self._source(operands[1], mods[-1]), self._source(operands[2], "b32")],
            SINK | COLLECTIVE,
            i0=int(mods[0] == "all"),
            i1=len(p),
        )

    def _op_redux(self, mods, operands):
        kind = mods[-1].replace("b", "u")
        self._emit(
            f"redux.{kind}",
            [self._destination(operands[0], kind)],
            [self._source(operands[1], kind), self._source(operands[2], "b32")],
            SINK | COLLECTIVE,
            i0=["add", "min", "max", "and", "or", "xor"].index(mods[1]),
        )

    def _op_elect(self, mods, operands):
        d, p = operands[0].split("|")
        self._emit(
            "elect",
            [self._destination(d, "b32"), self._destination(p, "pred")],
            [self._source(operands[1], "b32")],
            COLLECTIVE,
        )

    def _op_activemask(self, mods, operands):
        self._emit("activemask", [self._destination(operands[0], "b32")])

    def _op_bar(self, mods, operands):
        mods = [m for m in mods if m not in ("cta", "aligned")]
        if mods[0] == "warp":
            return self._emit("bar.warp.sync", [], [self._source(operands[0], "b32")], COLLECTIVE)
        results, sources, imm = [], [], {"i2": ["sync", "arrive", "red"].index(mods[0])}
        if mods[0] == "red":
            results.append(self._destination(operands[0], mods[-1]))
            sources.append(self._source(operands[-1].lstrip("!"), "pred"))
            imm["i3"], imm["i4"] = ["and", "or", "popc"].index(mods[1]), int(operands[-1].startswith("!"))
            operands = operands[1:-1]
        for key, text in zip(("i0", "i1"), operands, strict=False):
            value = self._integer(text)
            imm[key] = -1 if value is None else value
            if value is None:
                sources.append(self._source(text, "u32"))
        self._emit("barrier", results, sources, SINK | OWN_DEF, **imm)

    _op_barrier = _op_bar

    def _op_bra(self, mods, operands):
        at = self._emit("bra", flags=BRANCH)
        self._targets.append((at, 0, operands[0]))

    def _op_ret(self, mods, operands):
        self._emit("exit", flags=BRANCH)

    _op_exit = _op_ret

    def _op_trap(self, mods, operands):
        self._emit("trap")

    def _op_nanosleep(self, mods, operands):
        self._emit("nop")

    _op_setmaxnreg = _op_griddepcontrol = _op_pmevent = _op_nanosleep

    # ---- arrays for the core

    def _build(self) -> None:
        first_register = self._fixed_size
        for at, k, label in self._targets:
            if label not in self.kernel.labels:
                self._now = self._where[at]
                self._fail(f"unknown label {label}")
            self._code[at][5][k] = self._first[self.kernel.labels[label]]
        fixed = len(self._fixed)
        operands: list[tuple[int, int]] = []

        def place(operand) -> tuple[int, int]:
            is_fixed, offset, number, _ = operand
            return (offset, number) if is_fixed else (offset + first_register, number + fixed)

        code = np.zeros((len(self._code), 17), np.int64)
        for i, (handler, destinations, sources, flags, guard, imm) in enumerate(self._code):
            where, number = place(guard) if guard else (-1, 0)
            negated = bool(guard) and self._where[i].guard.startswith("!")
            code[i, :9] = (
                handler,
                len(destinations),
                len(destinations) + len(sources),
                len(operands),
                flags,
                self._where[i].line,
                where,
                number,
                negated,
            )
            code[i, 9:] = [((value + (1 << 63)) % (1 << 64)) - (1 << 63) for value in imm]
            operands += [place(x) for x in (*destinations, *sources)]
        constants = bytearray(self._fixed_size)
        for offset, size, value in self._fixed:
            if value is None:
                continue
            if size == 0:
                constants[offset : offset + 4] = (0xFFFFFFFF if value else 0).to_bytes(4, "little")
            else:
                constants[offset : offset + 32 * size] = value.to_bytes(size, "little") * 32
        specials = [(SPECIAL[name], self._fixed[number][0]) for name, number in self._specials.items()]
        sizes = (
            self._fixed_size + self._size,
            fixed + len(self._registers),
            fixed,
            self.static_shared,
            self.local_size,
            self._granules["shared"],
            self._granules["global"],
        )
        core = library()
        operand_array = np.array(operands or [(0, 0)], np.uint32)
        special_array = np.array(specials or [(0, 0)], np.uint32)
        constant_array = np.frombuffer(bytes(constants) or b"\0", np.uint8)
        size_array = np.array(sizes, np.uint32)
        as_pointer = lambda a: ctypes.c_void_p(a.ctypes.data)  # noqa: E731
        code = np.ascontiguousarray(code)
        self.pointer = ctypes.c_void_p(
            core.ptx_program(
                ctypes.c_uint64(len(code)),
                as_pointer(code),
                ctypes.c_uint64(len(operands)),
                as_pointer(operand_array),
                ctypes.c_uint64(len(specials)),
                as_pointer(special_array),
                ctypes.c_uint64(len(constants)),
                as_pointer(constant_array),
                as_pointer(size_array),
            )
        )
        self.instructions = self._where

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Executions of each instruction by warps, and by lanes."""
        core, n = library(), len(self.instructions)
        views = []
        for function in (core.ptx_executed, core.ptx_executed_lanes):
            pointer = ctypes.cast(ctypes.c_void_p(function(self.pointer)), ctypes.POINTER(ctypes.c_uint64))
            views.append(np.ctypeslib.as_array(pointer, (n,)))
        return views[0], views[1]
