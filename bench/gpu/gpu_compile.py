"""Compiles the kernels of gpu.py in many processes, before the GPU is used, into the caches that launches read.

Our ops run on meta tensors through their CUDA implementations; every Triton launch only compiles. So exactly the
specializations are compiled that will be launched. The torch.compile peers run once on the GPU.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import gpu_measure
import torch
from gpu_run import Send
from gpu_targets import OURS, STEP
from torch.utils._python_dispatch import TorchDispatchMode

import dino_kernels


class _CudaKernels(TorchDispatchMode):
    """Runs the CUDA implementations of our ops, on meta tensors too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dino_kernels":
            with self:  # our ops call each other
                return func._op_dk(torch._C.DispatchKey.CUDA, *args, **(kwargs or {}))
        if func is torch.ops.aten.mm.dtype:  # implemented for CUDA only, like the next one
            return args[0].new_empty(len(args[0]), args[1].shape[1], dtype=args[2])
        if func is torch.ops.aten.baddbmm.dtype_out:
            return (kwargs or {})["out"]
        return func(*args, **(kwargs or {}))


@contextmanager
def launches_compiled(arch: int, done: Callable[[object, object], None]):
    """Calls on meta tensors compile but launch nothing: `done(function, kernel)` is called with each compiled kernel.
    Changes global state, so the process can be used for nothing else."""
    import resources
    import triton
    from dino_train.common import device
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from dino_kernels._core.device import GPU_TYPES
    from dino_kernels.triton import multicrop as multicrop_triton

    triton.runtime.driver.set_active(resources.Driver(GPUTarget("cuda", arch, 32)))
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment, misc]
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment, misc]  does not support meta tensors
    dino_kernels.set_backend("triton")  # CUDA C++ is already compiled
    GPU_TYPES.add("meta")
    device._GPUS["meta"] = lambda meta: object()  # type: ignore[assignment, return-value]
    dino_kernels.multicrop_packed = multicrop_triton.packed_triton  # without checks, which read pixels
    run = JITFunction.run
    JITFunction.run = lambda self, *args, **options: done(self, run(self, *args, **{**options, "warmup": True}))
    try:
        with _CudaKernels():
            yield
    finally:
        JITFunction.run = run


def build_launcher(kernel) -> None:
    """Triton up to 3.6 compiles a launcher per signature with gcc at the first launch of a kernel: compile it now."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(kernel.src, kernel.metadata)


def call_on_meta(name: str, toy: bool) -> None:
    """Call a case and its launch variants; or a whole step if the name is STEP and the name of a network."""
    if name.startswith(STEP):
        import gpu_steps

        gpu_steps.step_on_meta(name.removeprefix(STEP), toy)
        return
    case = gpu_measure.cases(toy)[name]("meta")
    for provider, call in case.providers.items():
        if provider.startswith(OURS) and "upload" not in provider and "span" not in provider:
            call()
    for variant in gpu_measure.launches_of(name).values():
        gpu_measure.called(variant, case.providers[OURS])


def ours(send: Send, name: str, arch: int, toy: bool) -> None:
    started, kernels = time.time(), {}

    def done(function, kernel) -> None:
        if kernel.hash not in kernels:
            kernels[kernel.hash] = function.__name__
            build_launcher(kernel)

    with launches_compiled(arch, done):
        call_on_meta(name, toy)
    send({"compiled": {name: {"kernels": len(kernels), "seconds": time.time() - started}}})


def peers(send: Send, name: str, device: str, toy: bool) -> None:
    started, count = time.time(), 0
    for provider, call in gpu_measure.cases(toy)[name](device).providers.items():
        if gpu_measure.is_compiled(provider):
            call()
            count += 1
    send({"compiled": {f"peers of {name}": {"kernels": count, "seconds": time.time() - started}}})


def stock_step(send: Send, net: str, device: str, toy: bool) -> None:
    import gpu_steps

    started = time.time()
    gpu_steps.first_steps("stock", gpu_steps.setting(net, device, toy), 2)
    send({"compiled": {f"stock, {net}": {"kernels": 1, "seconds": time.time() - started}}})


def peers_to_compile(toy: bool) -> list[str]:
    """Names of the cases with compiled peers; built with meta tensors, so without allocations."""
    cases = gpu_measure.cases(toy)
    return [name for name in cases if any(map(gpu_measure.is_compiled, cases[name]("meta").providers))]
