"""Compiles what gpu.py will launch, before it touches the card: in many processes, into the caches that launches read.

Ours runs on meta tensors through its CUDA implementations, with every Triton launch turned into a compilation: what is
compiled is what will be launched, its specializations included. The peers of torch.compile run once on the card.
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
            with self:  # ours call each other
                return func._op_dk(torch._C.DispatchKey.CUDA, *args, **(kwargs or {}))
        if func is torch.ops.aten.mm.dtype:  # as the next one on CUDA only
            return args[0].new_empty(len(args[0]), args[1].shape[1], dtype=args[2])
        if func is torch.ops.aten.baddbmm.dtype_out:
            return (kwargs or {})["out"]
        return func(*args, **(kwargs or {}))


@contextmanager
def launches_compiled(arch: int, done: Callable[[object, object], None]):
    """Calls on meta tensors launch nothing: `done(function, kernel)` gets each compiled one. For a whole process."""
    import resources
    import triton
    from dino_train.common import device
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from dino_kernels.triton import multicrop as multicrop_triton

    triton.runtime.driver.set_active(resources.Driver(GPUTarget("cuda", arch, 32)))
    torch.cuda.device = lambda device: nullcontext()  # type: ignore[assignment, misc]
    torch.autocast = lambda *_, **__: nullcontext()  # type: ignore[assignment, misc]  does not know meta tensors
    dino_kernels.set_backend("triton")  # CUDA C++ is compiled by now
    device._GPUS["meta"] = lambda meta: object()  # type: ignore[assignment, return-value]
    dino_kernels.multicrop_packed = multicrop_triton.packed_triton  # whose checks want pixels in memory
    run = JITFunction.run
    JITFunction.run = lambda self, *args, **options: done(self, run(self, *args, **{**options, "warmup": True}))
    try:
        with _CudaKernels():
            yield
    finally:
        JITFunction.run = run


def build_launcher(kernel) -> None:
    """Triton up to 3.6 has gcc compile a launcher for each signature, when a kernel is first launched: do it now."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(kernel.src, kernel.metadata)


def call_on_meta(name: str, toy: bool) -> None:
    """A case, with the launches of its variants; or, with STEP before the name of a net, a whole step."""
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
    """Names of the cases with compiled peers; built with meta tensors, so at no cost."""
    cases = gpu_measure.cases(toy)
    return [name for name in cases if any(map(gpu_measure.is_compiled, cases[name]("meta").providers))]
