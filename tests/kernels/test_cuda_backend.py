"""The choice between the Triton and the CUDA C++ kernels of an op, and that every registered op makes it."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_emulated import NVCC, emulated, needs_nvcc, use_cuda
from test_adamw_ema import by_segment, state
from test_attention import inputs as attention_inputs
from test_dino_loss import inputs
from test_ema_update import lists

import dino_kernels
from dino_kernels._core import backends
from dino_kernels._core.cuda_defaults import CUDA_BY_DEFAULT
from dino_kernels._core.registry import _OPS

ROOT = Path(__file__).resolve().parents[2]
GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(backends, "_backend", None)


def build_for(monkeypatch, archs, capability):
    """As if the kernels had been compiled for `archs`, on a GPU of that compute capability."""
    compiled = SimpleNamespace(cuda=SimpleNamespace(archs=archs)) if archs else SimpleNamespace()
    monkeypatch.setattr(backends, "_C", compiled)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def backend_of(*fits):
    names = {"triton": "ema_update.update_triton", "cuda": "ema_update.update_cuda"}
    kernel = backends.GpuKernel(**names, **({"fits": fits[0]} if fits else {}))
    return kernel.chosen(GPU, torch.zeros(1)).__name__.removeprefix("update_")


def test_triton_unless_a_committed_measurement_says_otherwise(monkeypatch):
    build_for(monkeypatch, ["80", "90a", "100"], (9, 0))
    assert backend_of() == "triton"
    monkeypatch.setitem(CUDA_BY_DEFAULT, ("ema_update", (9, 0)), "bench/results/any.json")
    assert backend_of() == "cuda" and backend_of(lambda _: False) == "triton"
    dino_kernels.set_backend("triton")
    assert backend_of() == "triton"
    dino_kernels.set_backend(None)
    build_for(monkeypatch, [], (9, 0))
    assert backend_of() == "triton"  # the table's choice is not in this build


def test_every_default_names_its_measurement():
    tracked = subprocess.check_output(["git", "ls-files", "bench/results"], text=True, cwd=ROOT).split()
    for (op, capability), measurement in CUDA_BY_DEFAULT.items():
        assert f"{op}.py" in os.listdir(ROOT / "dino_kernels/cuda") and len(capability) == 2
        assert measurement in tracked, f"{op} on {capability}: {measurement} is not committed"


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (["80", "90a", "100"], (8, 0), True),
        (["80", "90a", "100"], (9, 0), True),
        (["80", "90a", "100"], (10, 0), True),
        (["80", "90a", "100"], (10, 3), True),
        (["80", "90a", "100"], (8, 6), False),
        (["80", "90a", "100"], (12, 0), False),
        (["80"], (9, 0), False),
    ],
)
def test_only_on_chips_that_it_was_compiled_for(monkeypatch, archs, capability, runs):
    build_for(monkeypatch, archs, capability)
    dino_kernels.set_backend("cuda")
    if runs:
        assert backend_of() == "cuda"
    else:
        with pytest.raises(
            RuntimeError, match=rf"sm_80.* cuda:0 has compute capability {capability[0]}.{capability[1]}"
        ):
            backend_of()


def test_what_is_unknown_or_unavailable_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="must be triton or cuda, got 'cublas'"):
        dino_kernels.set_backend("cublas")
    build_for(monkeypatch, [], (9, 0))
    with pytest.raises(RuntimeError, match="no CUDA C.. kernels: nvcc was not found; install nvcc"):
        dino_kernels.set_backend("cuda")


@pytest.mark.parametrize("value, error", [("triton", ""), ("", ""), ("cublas", "ValueError: backend .*DINO_KERNELS")])
def test_the_environment_sets_it(value, error):
    code = "import sys, dino_kernels; assert 'triton' not in sys.modules; print(dino_kernels._core.backends._backend)"
    env = {**os.environ, "DINO_KERNELS_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if error:
        assert done.returncode and re.search(error, done.stderr)
    else:
        assert done.stdout.strip() == (value or "None"), done.stderr


@needs_nvcc
def test_this_build_has_the_kernels():
    assert {"80", "90a"} <= set(backends.compiled_archs())
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA: "):  # without a driver it fails as it is called, and not before
            backends.kernels().ema_update(
                targets=[16], sources=[16], sizes=[4], source_dtypes=[0], momentum=(0, False, 0.5), stream=0
            )


@needs_nvcc
@pytest.mark.prove
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_no_kernel_spills_registers(tmp_path, source, arch):
    command = [
        NVCC,
        "-cubin",
        "-O3",
        "-std=c++17",
        f"-arch=sm_{arch}",
        f"-I{ROOT}/csrc",
        "--resource-usage",
        "-o",
        str(tmp_path / "cubin"),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=True)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0", "0")} and "warning" not in done.stderr


def ema_update_arguments():
    targets, sources = lists()
    return targets, sources, torch.tensor(0.9, dtype=torch.float64)


def dino_loss_arguments():
    student, teacher, center = inputs(2, 4, 300)
    return student, teacher, center.expand(2, -1), torch.tensor(0.1), torch.tensor(0.04)


def adamw_ema_arguments():
    x = state("cpu", [64, 37, 37 * 40])
    flat = [x[name] for name in ("student", "grad", "exp_avg", "exp_avg_sq", "teacher", "student_16", "teacher_16")]
    rows = [torch.zeros(37, 40) for _ in range(2)]
    segments = [x[name] for name in ("offsets", "steps", "decayed", "frozen", "nonfinite")]
    scalars = [torch.tensor(value, dtype=torch.float64) for value in (0.01, 0.1, 0.9)]
    return *flat, *rows, *segments, *scalars, 3.0, 0.9, 0.999, 1e-8, 2, *by_segment(3).values()


def attention_arguments():
    return *attention_inputs([20, 20], 2, 64, torch.float16), [2, 20], 0.125


def attention_backward_arguments():
    x = attention_arguments()
    return torch.ones(40, 2, 64).half(), x[0], *_OPS["attention"].cpu(*x), *x[1:], torch.ones(3 * 2 * 64)


@needs_nvcc
@pytest.mark.ptx
@pytest.mark.parametrize(
    "module, op, arguments",
    [
        ("ema_update", "ema_update_", ema_update_arguments),
        ("adamw_ema", "adamw_ema_step_", adamw_ema_arguments),
        ("attention", "attention", attention_arguments),
        ("attention", "attention_backward_", attention_backward_arguments),
        ("dino_loss", "dino_loss", dino_loss_arguments),
        ("dino_loss", "dino_loss_", dino_loss_arguments),
        ("dino_loss", "dino_loss_scale_", lambda: (torch.arange(12.0).view(3, 4), torch.tensor(2.0))),
    ],
)
def test_registered_ops_make_the_choice(monkeypatch, module, op, arguments):
    """The functions that are registered for GPUs, called on CPU tensors: on the emulator, against the CPU's."""
    ours, theirs = arguments(), arguments()
    expected = _OPS[op].cpu(*theirs)
    use_cuda(monkeypatch, module, "90a")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    dino_kernels.set_backend("cuda")
    launches = emulated("90a").launches
    del launches[:]
    result = _OPS[op].kernels["cuda"](*ours)
    assert launches
    tolerance = {"rtol": 2e-3, "atol": 5e-3} if op.startswith("attention") else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(result, expected, **tolerance)
