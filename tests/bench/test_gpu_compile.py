"""gpu.py compiles the kernels that it will launch: on meta tensors, for a GPU that is not present."""

import json
import subprocess
import sys
from types import SimpleNamespace

import gpu_compile
import gpu_measure
import pytest
from bare import environment

# In separate processes: the process of the tests uses Triton's interpreter.
LAUNCHES = """\
import json, sys
from collections import Counter
from types import SimpleNamespace
from triton.runtime.jit import JITFunction
import gpu_compile, gpu_measure

launched = {}
JITFunction.run = lambda self, *args, grid, warmup, **options: SimpleNamespace(hash=len(launched))
def done(function, kernel):
    launched.setdefault(name, Counter())[function.__name__] += 1

with gpu_compile.launches_compiled(90, done):
    for name in [*gpu_measure.cases(False), "step ViT-S/16", "step ViT-B/16"]:
        gpu_compile.call_on_meta(name, False)
print(json.dumps(launched))
"""

SAME = """\
import gpu_compile, gpu_measure
from dino_kernels.triton import common
from gpu_report import OURS

common.argument = lambda setting: setting  # as of tensors on a device
for name in ("bias_gelu", "ema_update ViT-S", "dino_loss bfloat16"):
    kernels = {"meta": set(), "cpu": set()}
    for device, hashes in kernels.items():
        with gpu_compile.launches_compiled(90, lambda function, kernel: hashes.add(kernel.hash)):
            gpu_measure.cases(True)[name](device).providers[OURS]()
    assert kernels["meta"] and kernels["meta"] == kernels["cpu"], (name, kernels)
"""


def python(code, folder):
    env = environment(folder) | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_case_and_step_of_the_reference_setting_is_compiled(tmp_path):
    launched = json.loads(python(LAUNCHES, tmp_path))
    assert set(launched) == {*gpu_measure.cases(False), "step ViT-S/16", "step ViT-B/16"}
    step = launched["step ViT-S/16"]
    assert sum(step.values()) > 2 * 100 and len(launched["mlp"]) >= 2  # ops that call each other
    assert {"_teacher_kernel", "_student_kernel", "_update_kernel", "_short_backward_kernel"} <= set(step)


@pytest.mark.slow
def test_meta_tensors_compile_the_same_kernels_as_real_tensors(tmp_path):
    """The specializations are the same; here for tensors on the CPU, which no kernel accesses."""
    python(SAME, tmp_path)


def test_launchers_of_old_triton_are_compiled_too(monkeypatch):
    from triton.backends.nvidia import driver

    made = []
    kernel = SimpleNamespace(src="source", metadata="metadata")
    monkeypatch.setattr(driver, "CudaLauncher", lambda *given: made.append(given))
    monkeypatch.delattr(driver, "make_launcher", raising=False)
    gpu_compile.build_launcher(kernel)
    assert made == []
    monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    gpu_compile.build_launcher(kernel)
    assert made == [("source", "metadata")]


def test_compiled_peers_are_listed_without_allocations():
    assert {"dino_loss bfloat16", "mlp", "dino_loss float16"} < set(gpu_compile.peers_to_compile(False))


@pytest.mark.parametrize("name", ["mlp"])
def test_peers_are_called_once(name, monkeypatch):
    called = []
    case = SimpleNamespace(providers={"reference": None, "compiled reference": lambda: called.append(1)})
    monkeypatch.setattr(gpu_measure, "cases", lambda toy: {name: lambda device: case})
    sent = []
    gpu_compile.peers(sent.append, name, "cpu", True)
    assert called == [1] and sent[0]["compiled"]["peers of mlp"]["kernels"] == 1
