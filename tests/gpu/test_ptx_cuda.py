"""CUDA C++ kernels compiled by nvcc: correct kernels have correct results and no reports, wrong ones are reported."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ptx.launch import KernelError, Module, Span, options

NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def default_options():
    options.__init__()


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def run(request, tmp_path_factory):
    target = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    source = Path(__file__).parent / "ptx_kernels.cu"
    subprocess.run([NVCC, "-ptx", f"-arch={request.param}", "-lineinfo", str(source), "-o", str(target)], check=True)
    return Module(target.read_text())


def silent(found):
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("seed", range(3))
def test_correct_kernels(run, seed):
    options.seed = seed
    n = 1000
    x = RNG.standard_normal(n).astype(np.float32)
    y = np.zeros_like(x)
    silent(run("reverse", (4,), (256,), x, y, np.int32(n)))
    assert (y == 2 * x).all()
    total = np.zeros(1, np.float32)
    silent(run("sum", (3,), (128,), x, total, np.int32(n), shared=16))
    np.testing.assert_allclose(total[0], x.sum(dtype=np.float64), rtol=1e-4)
    parts, count, out = np.zeros(7, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
    silent(run("last_block", (7,), (64,), x, parts, count, out, np.int32(n)))
    np.testing.assert_allclose(out[0], x.sum(dtype=np.float64), rtol=1e-4)
    h, b = x.astype(np.float16), (x.view(np.uint32) >> 16).astype(np.uint16)
    d, whole = np.zeros(n), np.zeros(n, np.int64)
    silent(run("mixed", (4,), (256,), h, b, d, whole, np.int32(n)))
    widened = (b.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_allclose(d, np.exp(h.astype(np.float64)) * widened + np.sqrt(np.abs(widened)), rtol=1e-13)
    q = np.trunc((h.astype(np.float32) * np.float32(1e6)).astype(np.int64) / (np.arange(n) + 1)).astype(np.int64)
    assert (whole == np.fmod(q, 1000)).all()
    i, o = RNG.integers(0, 99, 64, dtype=np.int32), np.zeros(64, np.int32)
    silent(run("locals", (1,), (64,), i, o, np.int32(64)))
    assert (o == i[(np.arange(64) + (i & 7)) % 64]).all()
    silent(run("transcendental", (4,), (256,), x, y, np.int32(n)))
    from math import erf

    e = x.astype(np.float64)
    exact = np.exp(e) + np.log(1 + e * e) + np.vectorize(erf)(e) + np.tanh(e) + e / 3 + np.abs(e) ** 1.5
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    c = np.zeros(8, np.float32)
    silent(run("constants", (1,), (8,), c))
    assert (c == [1, 2, 3, 4] * 2).all()
    k = np.arange(64)
    cases = (k % 8).astype(np.int32)
    silent(run("switches", (1,), (64,), cases, o))
    assert (o == np.choose(np.minimum(cases, 6), [3 + 0 * k, 7 + k, -k, k * k, k ^ 55, k << 3, 9 + 0 * k])).all()
    f, g = RNG.standard_normal((64, 4)).astype(np.float32), np.zeros((64, 4), np.float32)
    silent(run("copy_right", (1,), (64,), f, g))
    assert (g == f[::-1]).all()
    lanes = np.zeros(32, np.int32)
    silent(run("lanes_with_sync", (1,), (32,), lanes))
    assert (lanes == 31 - np.arange(32)).all()


def test_carries(run):
    a, b = (RNG.integers(0, 2**64, 64, dtype=np.uint64) for _ in range(2))
    out = np.zeros((64, 2), np.uint64)
    silent(run("wide", (1,), (64,), a, b, out))
    for x, y, (low, high) in zip(a.tolist(), b.tolist(), out.tolist(), strict=True):
        assert low + (high << 64) == (x * y + y - (x << 31)) % 2**128


@pytest.mark.parametrize("seed", range(5))
def test_bulk_copies(run, seed):
    options.seed, options.budget = seed, 1_000_000
    if "mbarrier.init" not in "".join(s.opcode for s in run.kernels["bulk"].statements):
        pytest.skip("needs sm_90")
    x, out = RNG.standard_normal((6, 256)).astype(np.float32), np.zeros(256, np.float32)
    silent(run("bulk", (1,), (288,), x, out, np.int32(6), np.int32(0)))
    assert np.array_equal(out, np.add.accumulate(x[:, ::-1])[-1])
    with pytest.raises(KernelError, match="race|not been waited for|livelock|arrivals"):
        run("bulk", (1,), (288,), x, out, np.int32(6), np.int32(1))


X = np.arange(4096, dtype=np.float32)
OUT = np.zeros(4096, np.float32)
WRONG = {
    "missing_barrier": ("race between threads of a CTA", (1,), (256,), (X, OUT), 0),
    "missing_second_barrier": ("race between threads of a CTA", (1,), (256,), (X, OUT), 0),
    "race_of_blocks": ("race between CTAs", (3,), (64,), (OUT,), 0),
    "no_atomic": ("race between CTAs", (3,), (1,), (np.zeros(1, np.int32),), 0),
    "last_block_without_fence": (
        "race between CTAs",
        (5,),
        (32,),
        (X, OUT, np.zeros(1, np.uint32), np.zeros(1, np.float32), np.int32(99)),
        0,
    ),
    "out_of_bounds": (
        "out of bounds",
        (1,),
        (64,),
        (np.zeros(63, np.float32), np.zeros(63, np.float32), np.int32(63)),
        0,
    ),
    "out_of_shared": ("out of bounds in shared", (1,), (64,), (OUT,), 128),
    "misaligned": ("misaligned", (1,), (32,), (X, OUT), 0),
    "uninitialised_shared": ("reads shared memory that nobody wrote", (1,), (64,), (OUT,), 0),
    "divergent_barrier": ("barrier executed by some lanes", (1,), (32,), (OUT,), 0),
    "barrier_not_reached": ("deadlock", (1,), (64,), (OUT,), 0),
    "copy_not_waited": ("cp.async has not been waited for", (1,), (64,), (X, OUT), 0),
    "copy_waited_without_barrier": ("race between threads of a CTA", (1,), (64,), (X, OUT), 0),
    "unwritten": ("reads global memory that nobody wrote", (1,), (64,), (np.full(64, 0xFFA5FFA5, np.uint32), OUT), 0),
    "endless": ("livelock", (1,), (1,), (np.zeros(1, np.int32),), 0),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels(run, name, seed):
    what, grid, block, args, shared = WRONG[name]
    args = [x.copy() if isinstance(x, np.ndarray) else x for x in args]
    options.seed, options.budget = seed, 100_000
    with pytest.raises(KernelError, match=what) as error:
        run(name, grid, block, *args, shared=shared)
    assert all(report.kernel == name and report.line for report in error.value.reports)


def test_a_race_of_lanes_is_a_warning(run):
    found = run("lanes_without_sync", (1,), (32,), np.zeros(32, np.int32))
    assert found and all(r.severity == "warning" and "lanes of a warp" in r.what for r in found)
    options.fails_on = ("error", "warning")
    with pytest.raises(KernelError, match="lanes of a warp"):
        run("lanes_without_sync", (1,), (32,), np.zeros(32, np.int32))
    options.allowed = lambda report: "lanes of a warp" in report.what
    assert run("lanes_without_sync", (1,), (32,), np.zeros(32, np.int32))


def test_memory_that_is_not_registered(run):
    x = np.zeros(64, np.float32)
    y = np.zeros(64, np.float32)
    with pytest.raises(KernelError, match="out of bounds: reads"):
        run("unwritten", (1,), (64,), np.uint64(x.ctypes.data), y)
    run(
        "unwritten",
        (1,),
        (64,),
        np.uint64(x.ctypes.data),
        y,
        spans=[Span(x.ctypes.data, x.ctypes.data + x.nbytes, "x")],
    )
