"""Each class of instructions, in hand-written PTX, compared with numpy."""

import numpy as np
import pytest
from ptx.launch import KernelError, Module, options
from ptx.parser import PtxError

RNG = np.random.default_rng(0)
TYPES = {
    "f32": np.float32,
    "f64": np.float64,
    "s32": np.int32,
    "u32": np.uint32,
    "s64": np.int64,
    "u64": np.uint64,
    "s16": np.int16,
    "u16": np.uint16,
    "b16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
    "f16": np.float16,
}
HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


@pytest.fixture(autouse=True)
def default_options():
    options.__init__()


def apply(
    code: str, result: str, *inputs: tuple[str, np.ndarray], threads: int | None = None, extra: str = ""
) -> np.ndarray:
    """Run `code`, which computes %y from %x0, %x1, ..., with one thread per element."""
    n = len(inputs[0][1]) if inputs else threads
    params = [f".param .u64 p{i}" for i in range(len(inputs) + 1)]
    registers = [f".reg .{kind.replace('f16', 'b16')} %x{i};" for i, (kind, _) in enumerate(inputs)]
    bits = lambda kind: "b" + kind.lstrip("sufb")  # noqa: E731
    loads = []
    for i, (kind, _) in enumerate(inputs):
        size = TYPES[kind]().nbytes
        loads.append(f"ld.param.u64 %a, [p{i}]; mad.wide.u32 %a, %t, {size}, %a; ld.global.{bits(kind)} %x{i}, [%a];")
    size = TYPES[result]().nbytes
    text = f"""{HEADER}.visible .entry k({", ".join(params)}) {{
    .reg .u32 %t; .reg .u64 %a; .reg .pred %p, %q; .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .b16 %h<9>;
    {" ".join(registers)} .reg .{result.replace("f16", "b16")} %y; {extra}
    mov.u32 %t, %tid.x;
    {" ".join(loads)}
    {code}
    ld.param.u64 %a, [p{len(inputs)}]; mad.wide.u32 %a, %t, {size}, %a;
    st.global.{bits(result)} [%a], %y;
    ret; }}"""
    out = np.zeros(n, TYPES[result])
    arrays = [np.ascontiguousarray(x, TYPES[kind]) for kind, x in inputs]
    Module(text)("k", (1,), (n,), *arrays, out)
    return out


def ints(kind: str, n: int = 256) -> np.ndarray:
    info = np.iinfo(TYPES[kind])
    x = RNG.integers(info.min, info.max, n, dtype=TYPES[kind], endpoint=True)
    x[:6] = [0, 1, info.max, info.min, info.max - 1, 7]
    return x


def floats(kind: str, n: int = 256) -> np.ndarray:
    x = (RNG.standard_normal(n) * 10.0 ** RNG.integers(-20, 20, n)).astype(TYPES[kind])
    x[:8] = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-40, 3.5]
    return x


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        expected = expected.astype(actual.dtype)
    both_nan = (actual != actual) & (expected != expected)
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[actual.itemsize]
    wrong = ~both_nan & (actual.view(bits) != expected.view(bits))
    assert not wrong.any(), (wrong.nonzero()[0][:5], actual[wrong][:5], expected[wrong][:5])


INTEGER = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": np.minimum,
    "max": np.maximum,
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("op", INTEGER)
def test_integer(op, kind):
    a, b = ints(kind), ints(kind)
    with np.errstate(all="ignore"):
        same(apply(f"{op}.{kind} %y, %x0, %x1;", kind, (kind, a), (kind, b)), INTEGER[op](a, b))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_wide_products_and_quotients(kind):
    a, b = ints(kind), ints(kind)
    exact = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    bits = 32 if "32" in kind else 64
    high = np.array([(p >> bits) & (2**bits - 1) for p in exact], np.uint64).astype(f"u{bits // 8}").view(TYPES[kind])
    same(apply(f"mul.hi.{kind} %y, %x0, %x1;", kind, (kind, a), (kind, b)), high)
    if bits == 32:
        wide = kind[0] + "64"
        product = np.array([p & (2**64 - 1) for p in exact], np.uint64).view(TYPES[wide])
        same(apply(f"mul.wide.{kind} %y, %x0, %x1;", wide, (kind, a), (kind, b)), product)
        c = ints(wide)
        with np.errstate(all="ignore"):
            same(apply(f"mad.wide.{kind} %y, %x0, %x1, %x2;", wide, (kind, a), (kind, b), (wide, c)), product + c)
    b[b == 0] = 3
    truncated = np.array(
        [int(abs(int(x)) // abs(int(y))) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)],
        dtype=object,
    )
    truncated = (
        np.array([t & (2**bits - 1) for t in truncated], dtype=np.uint64).astype(f"u{bits // 8}").view(TYPES[kind])
    )
    same(apply(f"div.{kind} %y, %x0, %x1;", kind, (kind, a), (kind, b)), truncated)
    with np.errstate(all="ignore"):
        same(apply(f"rem.{kind} %y, %x0, %x1;", kind, (kind, a), (kind, b)), a - truncated * b)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bitwise_and_shifts(bits):
    kind = f"u{bits}"
    a, b = ints(kind), ints(kind)
    for op, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        same(apply(f"{op}.b{bits} %y, %x0, %x1;", kind, (kind, a), (kind, b)), f(a, b))
    same(apply(f"not.b{bits} %y, %x0;", kind, (kind, a)), ~a)
    n = RNG.integers(0, bits + 9, 256, dtype=np.uint32)  # shifts by more than the width are clamped
    fits = n < bits
    small = np.where(fits, n, 0).astype(TYPES[kind])
    same(apply(f"shl.b{bits} %y, %x0, %x1;", kind, (kind, a), ("u32", n)), np.where(fits, a << small, 0))
    same(apply(f"shr.u{bits} %y, %x0, %x1;", kind, (kind, a), ("u32", n)), np.where(fits, a >> small, 0))
    s = a.view(TYPES[f"s{bits}"])
    expected = s >> np.minimum(n, bits - 1).astype(s.dtype)
    same(apply(f"shr.s{bits} %y, %x0, %x1;", f"s{bits}", (f"s{bits}", s), ("u32", n)), expected)


def test_bit_fields():
    a, b, c = ints("u32"), ints("u32"), ints("u32")
    same(apply("popc.b32 %y, %x0;", "u32", ("u32", a)), np.array([bin(x).count("1") for x in a]))
    same(apply("clz.b32 %y, %x0;", "u32", ("u32", a)), np.array([32 - int(x).bit_length() for x in a]))
    same(apply("brev.b32 %y, %x0;", "u32", ("u32", a)), np.array([int(f"{x:032b}"[::-1], 2) for x in a]))
    position, length = (RNG.integers(0, 32, 256, dtype=np.uint32) for _ in range(2))
    length = np.minimum(length, 32 - position)

    def signed(x, n):
        return (x ^ (1 << n >> 1)) - (1 << n >> 1) if n else 0

    field = [int(x) >> int(p) & (1 << int(n)) - 1 for x, p, n in zip(a, position, length, strict=True)]
    same(apply("bfe.u32 %y, %x0, %x1, %x2;", "u32", ("u32", a), ("u32", position), ("u32", length)), np.array(field))
    expected = np.array([signed(f, int(n)) for f, n in zip(field, length, strict=True)])
    same(
        apply("bfe.s32 %y, %x0, %x1, %x2;", "s32", ("s32", a.view(np.int32)), ("u32", position), ("u32", length)),
        expected,
    )
    mask = ((np.uint64(1) << length.astype(np.uint64)) - 1 << position).astype(np.uint32)
    expected = (b & ~mask) | (a << position & mask)
    same(
        apply("bfi.b32 %y, %x0, %x1, %x2, %x3;", "u32", ("u32", a), ("u32", b), ("u32", position), ("u32", length)),
        expected,
    )
    same(
        apply("lop3.b32 %y, %x0, %x1, %x2, 0xE8;", "u32", ("u32", a), ("u32", b), ("u32", c)),
        (a & b) | (a & c) | (b & c),
    )
    same(apply("lop3.b32 %y, %x0, %x1, %x2, 0x96;", "u32", ("u32", a), ("u32", b), ("u32", c)), a ^ b ^ c)
    n = c & 31
    both = b.astype(np.uint64) << np.uint64(32) | a
    same(
        apply("shf.l.wrap.b32 %y, %x0, %x1, %x2;", "u32", ("u32", a), ("u32", b), ("u32", c)),
        both << n.astype(np.uint64) >> np.uint64(32),
    )
    same(
        apply("shf.r.wrap.b32 %y, %x0, %x1, %x2;", "u32", ("u32", a), ("u32", b), ("u32", c)),
        (both >> n.astype(np.uint64)).astype(np.uint32),
    )
    selector = c & 0x7777
    stacked = np.stack([both >> np.uint64(8 * k) & np.uint64(255) for k in range(8)]).astype(np.uint32)
    expected = sum(stacked[selector >> 4 * i & 7, np.arange(256)] << np.uint32(8 * i) for i in range(4))
    same(apply("prmt.b32 %y, %x0, %x1, %x2;", "u32", ("u32", a), ("u32", b), ("u32", selector)), expected)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_floats(kind):
    a, b, c = floats(kind), floats(kind), floats(kind)
    RNG.shuffle(b)
    with np.errstate(all="ignore"):
        for op, f in (
            ("add.rn", np.add),
            ("sub", np.subtract),
            ("mul", np.multiply),
            ("div.rn", np.divide),
            ("min", np.fmin),
            ("max", np.fmax),
        ):
            x, y = (a, b) if op not in ("min", "max") else (a + 0, np.where(b == 0, b.dtype.type(1), b))
            same(apply(f"{op}.{kind} %y, %x0, %x1;", kind, (kind, x), (kind, y)), f(x, y))
        same(apply(f"sqrt.rn.{kind} %y, %x0;", kind, (kind, np.abs(a))), np.sqrt(np.abs(a)))
        same(apply(f"neg.{kind} %y, %x0;", kind, (kind, a)), -a)
        same(apply(f"abs.{kind} %y, %x0;", kind, (kind, a)), np.abs(a))
        same(apply(f"copysign.{kind} %y, %x0, %x1;", kind, (kind, a), (kind, b)), np.copysign(b, a))
        wide = np.longdouble
        fused = (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(
            kind.replace("f32", "f4").replace("f64", "f8")
        )
        actual = apply(f"fma.rn.{kind} %y, %x0, %x1, %x2;", kind, (kind, a), (kind, b), (kind, c))
        ok = (actual == fused) | ((actual != actual) & (fused != fused))
        assert ok.mean() > 0.99  # long double is not exact


def test_fma_rounds_once_and_ftz_flushes():
    a = np.float32([1 + 2**-12] * 32)
    exact = np.float64(a) * np.float64(a) - 1
    same(apply("fma.rn.f32 %y, %x0, %x0, 0fBF800000;", "f32", ("f32", a)), exact.astype(np.float32))
    tiny = np.float32([1e-39] * 32)
    same(apply("add.f32 %y, %x0, 0f00000000;", "f32", ("f32", tiny)), tiny)
    same(apply("add.ftz.f32 %y, %x0, 0f00000000;", "f32", ("f32", tiny)), tiny * 0)
    same(
        apply("mul.ftz.f32 %y, %x0, 0f3F000000;", "f32", ("f32", np.float32([-1.5e-38] * 32))), np.float32([-0.0] * 32)
    )
    same(
        apply("add.sat.f32 %y, %x0, 0f3F800000;", "f32", ("f32", np.float32([0.5, -3, np.nan, -0.25] * 8))),
        np.float32([1, 0, 0, 0.75] * 8),
    )
    one = np.float32([1.0] * 32)
    for mode, expected in (("rn", 1), ("rz", 1), ("rm", 1), ("rp", np.nextafter(np.float32(1), np.float32(2)))):
        same(apply(f"add.{mode}.f32 %y, %x0, 0f2F800000;", "f32", ("f32", one)), one * expected)


def test_nan_of_min_and_max():
    a, b = np.float32([np.nan, 1, np.nan, -0.0] * 8), np.float32([2, np.nan, np.nan, 0.0] * 8)
    same(apply("min.f32 %y, %x0, %x1;", "f32", ("f32", a), ("f32", b)), np.float32([2, 1, np.nan, -0.0] * 8))
    same(apply("max.f32 %y, %x0, %x1;", "f32", ("f32", a), ("f32", b)), np.float32([2, 1, np.nan, 0.0] * 8))
    same(
        apply("max.NaN.f32 %y, %x0, %x1;", "f32", ("f32", a), ("f32", b)), np.float32([np.nan, np.nan, np.nan, 0.0] * 8)
    )


@pytest.mark.parametrize(
    "op, f, relative, absolute, low, high",
    [
        ("ex2.approx", np.exp2, 2**-22, 0, -20, 20),
        ("lg2.approx", np.log2, 2**-22, 2**-22, 0.01, 100),
        ("rcp.approx", lambda x: 1 / x, 2**-22, 0, 0.01, 100),
        ("sqrt.approx", np.sqrt, 2**-22, 0, 0.01, 100),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x), 2**-22, 0, 0.01, 100),
        ("sin.approx", np.sin, 0, 2**-20, -3, 3),
        ("cos.approx", np.cos, 0, 2**-20, -3, 3),
        ("tanh.approx", np.tanh, 2**-10, 0, -3, 3),
    ],
)
@pytest.mark.parametrize("noise", [False, True])
def test_approximate(op, f, relative, absolute, low, high, noise):
    options.noise = noise
    x = RNG.uniform(low, high, 256).astype(np.float32)
    exact = f(x.astype(np.float64))
    y = apply(f"{op}.f32 %y, %x0;", "f32", ("f32", x))
    assert (np.abs(y - exact) <= np.abs(exact) * (relative + 2**-23) + absolute).all()
    if noise:
        assert (y != exact.astype(np.float32)).any()


def test_approximate_at_the_ends():
    x = np.float32([-np.inf, np.inf, np.nan, -150, 200, -140] * 4)
    with np.errstate(over="ignore"):
        expected = np.exp2(x.astype(np.float64)).astype(np.float32)
    same(apply("ex2.approx.f32 %y, %x0;", "f32", ("f32", x)), expected)
    same(apply("ex2.approx.ftz.f32 %y, %x0;", "f32", ("f32", x)), np.float32([0, np.inf, np.nan, 0, np.inf, 0] * 4))
    y = np.float32([0, -1, np.inf, 1e-40] * 4)
    same(apply("lg2.approx.ftz.f32 %y, %x0;", "f32", ("f32", y)), np.float32([-np.inf, np.nan, np.inf, -np.inf] * 4))
    same(apply("rcp.approx.ftz.f32 %y, %x0;", "f32", ("f32", y)), np.float32([np.inf, -1, 0, np.inf] * 4))


COMPARE = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "f32", "f64", "s16", "u16"])
def test_compare_and_select(kind):
    a = floats(kind) if kind[0] == "f" else ints(kind)
    b = np.roll(a, 3)
    b[::5] = a[::5]
    names = dict(COMPARE)
    if kind[0] == "f":
        names |= {
            "neu": lambda a, b: ~(a == b),
            "ltu": lambda a, b: ~(a >= b),
            "nan": lambda a, b: np.isnan(a) | np.isnan(b),
            "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
            "equ": lambda a, b: ~((a < b) | (a > b)),
        }
    for name, f in names.items():
        code = f"setp.{name}.{kind} %p, %x0, %x1; selp.u32 %y, 1, 0, %p;"
        same(apply(code, "u32", (kind, a), (kind, b)), f(a, b))
    code = f"setp.lt.{kind} %q, %x0, %x1; setp.gt.and.{kind} %p, %x1, %x0, !%q; selp.u32 %y, 1, 0, %p;"
    same(apply(code, "u32", (kind, a), (kind, b)), (b > a) & ~(a < b))


def rounded_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    out = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    out[np.isnan(x)] = 0x7FFF
    return out


def test_conversions():
    x = floats("f32", 1024)
    x[8:40] = np.uint32(0x3F808000 + np.arange(32) * 0x8000).view(np.float32)  # ties
    with np.errstate(all="ignore"):
        same(apply("cvt.rn.bf16.f32 %y, %x0;", "u16", ("f32", x)), rounded_bf16(x))
        half = (x * 1e-3).astype(np.float16)
        y = apply("cvt.rn.f16.f32 %y, %x0;", "f16", ("f32", x * np.float32(1e-3)))
        same(y, (x * np.float32(1e-3)).astype(np.float16))
        same(apply("cvt.f32.f16 %y, %x0;", "f32", ("f16", half)), half.astype(np.float32))
        pair = apply("cvt.rn.bf16x2.f32 %y, %x0, %x1;", "u32", ("f32", x), ("f32", x[::-1]))
        same(pair, rounded_bf16(x).astype(np.uint32) << 16 | rounded_bf16(np.ascontiguousarray(x[::-1])))
        same(
            apply("cvt.f32.bf16 %y, %x0;", "f32", ("u16", rounded_bf16(x))),
            (rounded_bf16(x).astype(np.uint32) << 16).view(np.float32),
        )
        d = floats("f64")
        same(apply("cvt.rn.f32.f64 %y, %x0;", "f32", ("f64", d)), d.astype(np.float32))
        same(apply("cvt.f64.f32 %y, %x0;", "f64", ("f32", x)), x.astype(np.float64))
        clamped = np.where(np.isnan(x), 0, np.clip(np.trunc(x.astype(np.float64)), -(2**31), 2**31 - 1)).astype(
            np.int32
        )
        same(apply("cvt.rzi.s32.f32 %y, %x0;", "s32", ("f32", x)), clamped)
        near = np.where(np.isnan(x), 0, np.clip(np.rint(x.astype(np.float64)), 0, 2**32 - 1)).astype(np.uint32)
        same(apply("cvt.rni.u32.f32 %y, %x0;", "u32", ("f32", x)), near)
        same(apply("cvt.rmi.f32.f32 %y, %x0;", "f32", ("f32", x)), np.floor(x))
        i = ints("s32")
        same(apply("cvt.rn.f32.s32 %y, %x0;", "f32", ("s32", i)), i.astype(np.float32))
        same(apply("cvt.s64.s32 %y, %x0;", "s64", ("s32", i)), i.astype(np.int64))
        same(apply("cvt.u64.u32 %y, %x0;", "u64", ("u32", i.view(np.uint32))), i.view(np.uint32).astype(np.uint64))
        same(apply("cvt.s32.s8 %y, %x0;", "s32", ("s32", i)), i.astype(np.int8).astype(np.int32))
        same(apply("cvt.u16.u32 %y, %x0;", "u16", ("u32", i.view(np.uint32))), i.astype(np.uint16))
        same(
            apply("cvt.sat.u8.s32 %r1, %x0; mov.b32 %y, %r1;", "u32", ("s32", i)), np.clip(i, 0, 255).astype(np.uint32)
        )
        t = apply(
            "cvt.rna.tf32.f32 %y, %x0;", "b32", ("f32", np.float32([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-12] * 8))
        )
        same(t.view(np.float32), np.float32([1 + 2**-10, 1 + 2**-9, -1] * 8))


def test_halves_round_once():
    a, b, c = (RNG.standard_normal(256).astype(np.float16) for _ in range(3))
    c *= np.float16(2.0**-8)
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    same(apply("fma.rn.f16 %y, %x0, %x1, %x2;", "f16", ("f16", a), ("f16", b), ("f16", c)), exact.astype(np.float16))
    same(apply("add.f16 %y, %x0, %x1;", "f16", ("f16", a), ("f16", b)), a + b)
    pairs = RNG.standard_normal((3, 128, 2)).astype(np.float16)
    words = [np.ascontiguousarray(x).view(np.uint32).ravel() for x in pairs]
    y = apply("fma.rn.f16x2 %y, %x0, %x1, %x2;", "b32", *(("b32", w) for w in words)).view(np.float16)
    exact = (pairs[0].astype(np.float64) * pairs[1] + pairs[2]).astype(np.float16)
    same(y, exact.ravel())


@pytest.mark.parametrize("kind", ["u16", "s16"])
def test_pairs_of_integers(kind):
    a, b = (RNG.integers(0, 2**32, 64, dtype=np.uint32) for _ in range(2))
    halves = a.view(TYPES[kind]), b.view(TYPES[kind])
    for op, f in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
        y = apply(f"{op}.{kind}x2 %y, %x0, %x1;", "u32", ("u32", a), ("u32", b))
        same(y, f(*halves).view(np.uint32))


def test_pack_unpack_and_vectors():
    a, b = ints("u32"), ints("u32")
    same(apply("mov.b64 %y, {%x0, %x1};", "u64", ("u32", a), ("u32", b)), b.astype(np.uint64) << np.uint64(32) | a)
    code = "mov.b32 {%h1, %h2}, %x0; mov.b32 %y, {%h2, %h1};"
    same(apply(code, "u32", ("u32", a)), a << 16 | a >> 16)
    code = "mov.b64 %d1, {%x0, %x1}; mov.b64 {_, %y}, %d1;"
    same(apply(code, "u32", ("u32", a), ("u32", b)), b)


def test_shuffles_votes_and_reductions():
    a = ints("u32")
    lanes = np.arange(256) % 32
    at = lambda j: a[np.arange(256) // 32 * 32 + j]  # noqa: E731
    for mode, clamp, source in (
        ("bfly", 31, lanes ^ 5),
        ("idx", 31, 0 * lanes + 5),
        ("down", 31, np.where(lanes + 5 < 32, lanes + 5, lanes)),
        ("up", 0, np.where(lanes >= 5, lanes - 5, lanes)),
    ):
        same(apply(f"shfl.sync.{mode}.b32 %y, %x0, 5, {clamp}, -1;", "u32", ("u32", a)), at(source))
    code = "shfl.sync.down.b32 %r1|%p, %x0, 9, 31, -1; selp.u32 %y, %r1, 77, %p;"
    same(apply(code, "u32", ("u32", a)), np.where(lanes + 9 < 32, at(np.minimum(lanes + 9, 31)), 77))
    # Segments of 8 lanes: c = (32 - 8) << 8 | 7
    code = "shfl.sync.bfly.b32 %y, %x0, 3, 0x181f, -1;"
    same(apply(code, "u32", ("u32", a)), at(lanes ^ 3))
    odd = np.array([sum(int(x & 1) << i for i, x in enumerate(a[k : k + 32])) for k in range(0, 256, 32)], np.uint32)
    code = "and.b32 %r1, %x0, 1; setp.ne.u32 %p, %r1, 0; vote.sync.ballot.b32 %y, %p, -1;"
    same(apply(code, "u32", ("u32", a)), odd.repeat(32))
    groups = a.reshape(8, 32)
    for op, f in (("add", np.add), ("min", np.minimum), ("max", np.maximum)):
        same(
            apply(f"redux.sync.{op}.u32 %y, %x0, -1;", "u32", ("u32", a)),
            f.reduce(groups, axis=1).astype(np.uint32).repeat(32),
        )
    same(apply("redux.sync.xor.b32 %y, %x0, -1;", "u32", ("u32", a)), np.bitwise_xor.reduce(groups, axis=1).repeat(32))


def test_divergence_loops_and_predicates():
    n = np.arange(256, dtype=np.uint32)
    code = """mov.u32 %r1, 0; mov.u32 %r2, %x0;
    LOOP: setp.eq.u32 %p, %r2, 0; @%p bra DONE; and.b32 %r3, %r2, 1; setp.eq.u32 %q, %r3, 0;
    @!%q bra ODD; add.u32 %r1, %r1, 2; bra NEXT;
    ODD: add.u32 %r1, %r1, 5;
    NEXT: sub.u32 %r2, %r2, 1; bra LOOP;
    DONE: shfl.sync.idx.b32 %r4, %r1, 31, 31, -1; sub.u32 %y, %r4, %r1;"""
    count = n // 2 * 2 + (n + 1) // 2 * 5
    same(apply(code, "u32", ("u32", n)), count[n // 32 * 32 + 31] - count)


@pytest.mark.parametrize(
    "shape, types",
    [
        ("m16n8k16", "f32.f16.f16.f32"),
        ("m16n8k8", "f32.f16.f16.f32"),
        ("m16n8k16", "f32.bf16.bf16.f32"),
        ("m16n8k8", "f32.tf32.tf32.f32"),
        ("m16n8k4", "f32.tf32.tf32.f32"),
        ("m8n8k4", "f64.f64.f64.f64"),
        ("m16n8k32", "s32.s8.s8.s32"),
    ],
)
def test_mma(shape, types):
    m, n, k = (int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())
    kind = types.split(".")[1]
    if kind == "s8":
        a, b, c = RNG.integers(-99, 99, (m, k)), RNG.integers(-99, 99, (k, n)), RNG.integers(-99, 99, (m, n))
    else:
        a, b, c = (RNG.integers(-8, 8, s) / 4 for s in ((m, k), (k, n), (m, n)))
    size = {"f16": 2, "bf16": 2, "tf32": 4, "f64": 8, "s8": 1}[kind]
    encode = {
        "f16": lambda x: x.astype(np.float16),
        "bf16": lambda x: rounded_bf16(x.astype(np.float32).ravel()).reshape(x.shape),
        "tf32": lambda x: x.astype(np.float32),
        "f64": lambda x: x.astype(np.float64),
        "s8": lambda x: x.astype(np.int8),
    }[kind]
    per = max(1, 4 // size)
    lane = np.arange(32)
    ea, eb = encode(a), encode(b)
    registers_a = [
        [np.ascontiguousarray(ea[lane // 4 + 8 * r, h * 4 * per + lane % 4 * per + i]) for i in range(per)]
        for h in range(k // (4 * per))
        for r in range(m // 8)
    ]
    registers_b = [
        [np.ascontiguousarray(eb[h * 4 * per + lane % 4 * per + i, lane // 4]) for i in range(per)]
        for h in range(k // (4 * per))
    ]
    word = "b64" if kind == "f64" else "b32"
    inputs = [
        (word, np.ascontiguousarray(np.stack(parts, 1)).view(TYPES[word]).ravel())
        for parts in registers_a + registers_b
    ]
    accumulators = [c[lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2] for r in range(m // 4)]
    result = {"f64": "f64", "s8": "s32"}.get(kind, "f32")
    inputs += [(result, x) for x in accumulators]
    na, nb, nc = len(registers_a), len(registers_b), len(accumulators)
    names = [f"%x{i}" for i in range(na + nb + nc)]
    group = lambda x: "{" + ",".join(x) + "}"  # noqa: E731
    expected = a @ b + c
    for pick in range(nc):
        results = [f"%z{i}" for i in range(nc)]
        operands = ", ".join(map(group, (results, names[:na], names[na : na + nb], names[na + nb :])))
        move = f"mov.b{8 * TYPES[result]().nbytes} %y, %z{pick};"
        code = f"mma.sync.aligned.{shape}.row.col.{types} {operands}; {move}"
        y = apply(code, result, *inputs, extra=f".reg .{result} %z<{nc}>;")
        same(y, expected[lane // 4 + 8 * (pick // 2), lane % 4 * 2 + pick % 2])


def test_ldmatrix_and_stmatrix():
    tile = np.arange(4 * 8 * 8, dtype=np.uint16)
    for transposed in ("", ".trans"):
        text = f"""{HEADER}.visible .entry k(.param .u64 in, .param .u64 out) {{
        .shared .align 16 .b8 tile[512]; .reg .u32 %t, %s, %r<4>; .reg .u64 %a; .reg .b32 %v<4>;
        mov.u32 %t, %tid.x; shl.b32 %s, %t, 4; mov.u32 %r0, tile; add.u32 %s, %s, %r0;
        ld.param.u64 %a, [in]; mad.wide.u32 %a, %t, 16, %a;
        ld.global.v4.b32 {{%v0,%v1,%v2,%v3}}, [%a]; st.shared.v4.b32 [%s], {{%v0,%v1,%v2,%v3}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 {{%v0,%v1,%v2,%v3}}, [%s];
        ld.param.u64 %a, [out]; mad.wide.u32 %a, %t, 16, %a; st.global.v4.b32 [%a], {{%v0,%v1,%v2,%v3}}; ret; }}"""
        out = np.zeros((32, 4, 2), np.uint16)
        Module(text)("k", (1,), (32,), tile, out)
        matrices = tile.reshape(4, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 2, 1)
        lane = np.arange(32)
        for m in range(4):
            for i in range(2):
                assert (out[:, m, i] == matrices[m, lane // 4, lane % 4 * 2 + i]).all()


def test_atomics():
    text = f"""{HEADER}.visible .entry k(.param .u64 p) {{ .reg .u64 %a; .reg .u32 %t, %o; .reg .f32 %f; .reg .b32 %x;
    ld.param.u64 %a, [p]; mov.u32 %t, %tid.x;
    atom.global.add.u32 %o, [%a], %t; red.global.max.s32 [%a+4], %t; cvt.rn.f32.u32 %f, %t;
    red.global.gpu.relaxed.add.f32 [%a+8], %f; atom.global.inc.u32 %o, [%a+12], 6;
    atom.global.cas.b32 %x, [%a+16], 0, %t;
    atom.global.exch.b32 %x, [%a+20], 9; red.global.or.b32 [%a+24], %t; ret; }}"""
    memory = np.zeros(8, np.uint32)
    Module(text)("k", (3,), (64,), memory)
    total = 3 * 64 * 63 // 2
    assert memory[0] == total and memory[1] == 63 and memory.view(np.float32)[2] == total
    assert memory[3] == 3 * 64 % 7 and memory[4] < 64 and memory[5] == 9 and memory[6] == 63


@pytest.mark.parametrize(
    "code",
    [
        "tex.2d.v4.f32.f32 {%x0}, [t, {%x0}];",
        "add.f32x9 %y, %x0, %x0;",
        "frobnicate.u32 %y, %x0;",
        "ld.global.v3.b32 %y, [%a];",
        "cvt.rn.e4m3x2.f32 %h1, %x0, %x0;",
        "wmma.load.a.sync.aligned.row.m16n16k16.f16 {%r1}, [%a];",
    ],
)
def test_unknown_instructions_are_reported(code):
    with pytest.raises(PtxError) as error:
        apply(code, "u32", ("u32", np.zeros(32)))
    assert code.split()[0].split(".")[0] in str(error.value)


def test_a_parameter_is_read_through_its_address():
    text = f"""{HEADER}.visible .entry k(.param .u64 out, .param .align 8 .b8 table[32]) {{
    .reg .u64 %a, %p; .reg .u32 %t; .reg .b64 %d;
    mov.u32 %t, %tid.x; mov.b64 %p, table; mad.wide.u32 %p, %t, 8, %p; ld.param.b64 %d, [%p+8];
    ld.param.u64 %a, [out]; mad.wide.u32 %a, %t, 8, %a; st.global.b64 [%a], %d; ret; }}"""
    out, table = np.zeros(3, np.int64), np.arange(5, 9)
    Module(text)("k", (1,), (3,), out, table.tobytes())
    assert out.tolist() == [6, 7, 8]
    with pytest.raises(Exception, match="parameter out of bounds"):
        Module(text)("k", (1,), (4,), np.zeros(4, np.int64), table.tobytes())


def test_undefined_registers_are_reported_when_used():
    with pytest.raises(KernelError, match="stores an undefined value"):
        apply("setp.lt.u32 %p, %t, 5; @%p mov.u32 %r1, 1; add.u32 %y, %r1, 2;", "u32", ("u32", np.zeros(32)))
    with pytest.raises(KernelError, match="undefined guard"):
        apply("mov.u32 %y, 1; @%p mov.u32 %y, 2;", "u32", ("u32", np.zeros(32)))
    apply("setp.lt.u32 %p, %t, 99; @%p mov.u32 %r1, 1; selp.u32 %y, %r1, %r2, %p;", "u32", ("u32", np.zeros(32)))


def test_an_undefined_half_register_is_reported_when_used():
    half = "u16", np.arange(32)
    for out in ("mov.b32 {%y, _}, %r1;", "cvt.u16.u32 %y, %r1;"):
        same(apply(f"mov.b32 %r1, {{%x0, %h1}}; {out}", "u16", half), half[1])
    for out in ("mov.b32 {_, %y}, %r1;", "add.u32 %r2, %r1, 1; cvt.u16.u32 %y, %r2;"):
        with pytest.raises(KernelError, match="stores an undefined value"):
            apply(f"mov.b32 %r1, {{%x0, %h1}}; {out}", "u16", half)
