"""Compiled kernels with one injected fault each: the emulator must detect it.

Run by test_ptx_compiled.py in a separate process, like compiled_ops.py.
"""

import re

import pytest
import torch
from ptx import launch, triton_driver
from ptx.dino_ops import FOLDER, use_triton

from dino_kernels import attention, dino_loss

GLOBAL = r"(?:(?:ld|st)\.global|cp\.async\.c[ag]\.)"
BARRIER = r"bar\.sync\s+0;"
FAULTS = {  # pattern, replacement, report, architectures
    "out of bounds": (rf"@!?%p\d+ ({GLOBAL})", r"\1", "out of bounds", (80, 90)),
    "misaligned": (r"(ld\.global[^\[]*\[ ?%rd\d+ ?\+ ?)0", r"\g<1>2", "misaligned", (80, 90)),
    "no barrier": (BARRIER, "", "race between threads of a CTA", (80, 90)),
    "uninitialised": (r"(@!?%p\d+ )?st\.shared[^;]*;", "", "nobody wrote|undefined", (80, 90)),
    "copy not waited for": (r"cp\.async\.wait_group [^;]*;", "", "cp.async has not been waited for", (80, 90)),
    "product not waited for": (r"wgmma\.wait_group\.sync\.aligned [^;]*;", "", "wgmma in flight", (90,)),
    "no proxy fence": (r"fence\.proxy\.async[^;]*;", "", "a (cp.async|store) wrote without a fence.proxy.async", (90,)),
}


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    use_triton(monkeypatch.setattr)
    monkeypatch.setattr(launch.options, "budget", 20_000_000)
    first = len(launch.reports)
    yield
    del launch.reports[first:]  # not for the summary


@pytest.fixture
def broken(monkeypatch):
    """broken(change): from now on, `change` is applied to the PTX of kernels."""

    def use(change):
        original = triton_driver._program

        def program(ptx, name):
            text = change(ptx)
            return original(text, name)

        monkeypatch.setattr(triton_driver, "_program", program)

    return use


def attend(tokens=197):
    qkv = torch.randn(tokens, 3, 1, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    return attention(qkv, torch.tensor([0, tokens], dtype=torch.int32), groups=[(1, tokens)])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_detected(broken, fault, request):
    pattern, replacement, report, architectures = FAULTS[fault]
    if request.config.option.ptx_arch not in architectures:
        pytest.skip("an instruction of sm_90")

    def change(ptx):
        text, count = re.subn(pattern, replacement, ptx)
        assert count
        return text

    attend()
    broken(change)
    with pytest.raises(launch.KernelError, match=report):
        attend()


def test_a_ticket_counter_without_ordering_is_detected(broken):
    student, teacher, center = torch.randn(6, 1024), torch.randn(4, 1024), torch.zeros(1024)
    dino_loss(student, teacher, center)
    broken(lambda ptx: ptx.replace("acq_rel", "relaxed"))
    with pytest.raises(launch.KernelError, match="race between CTAs"):
        dino_loss(student, teacher, center)


@pytest.mark.prove
def test_the_barrier_before_delta_is_read_suffices_but_is_not_the_only_one(broken, monkeypatch, request):
    """Without the barrier of `_short_backward_kernel`, no race is detected. On sm_90, each block of queries and each
    step over the keys has barriers for shared memory, some of them between the store and the load of delta. On sm_80,
    with Triton 3.9, the lane that loads an element is the one that stored it. Neither is guaranteed, so the barrier is
    needed."""
    lines = (FOLDER / "triton/attention.py").read_text().splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if "tl.debug_barrier()" in text)

    def without(ptx):
        start = re.search(rf"\.loc\s+\d+\s+{line}\s", ptx).start()
        own = re.compile(BARRIER).search(ptx, start)
        before, after = ptx[: own.start()], ptx[own.end() :]
        if others:
            before, after = re.sub(BARRIER, "", before), re.sub(BARRIER, "", after)
        return before + ("" if its_own else own[0]) + after

    monkeypatch.setattr(launch.options, "fails_on", ())
    out = attend()
    broken(without)
    for its_own, others in ((True, False), (False, True), (True, True)):
        first = len(launch.reports)
        out.sum().backward(retain_graph=True)
        races = [report for report in launch.reports[first:] if "delta float32" in report.detail]
        if not (its_own and others):
            assert not races
        elif request.config.option.ptx_arch == 90:
            assert races
