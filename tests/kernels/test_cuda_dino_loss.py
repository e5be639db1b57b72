"""dino_loss's own tests, on the compiled CUDA C++ kernels; and what is special to these."""

import pytest
import torch
from checks import DTYPES, assert_as_accurate
from cuda_emulated import MULTIPROCESSORS, PROVE, QUICK, emulated, needs_nvcc, use_cuda
from ptx import launch
from test_dino_loss import (  # noqa: F401
    inputs,
    run,
    test_a_center_for_each_teacher_view,
    test_against_float64,
    test_fewest_and_most_outputs,
    test_flat_and_sharp_logits,
    test_gradient_rows_sum_to_zero_and_a_perfect_student_gets_none,
    test_in_place_gives_the_same_in_the_memory_of_the_logits,
    test_in_place_is_refused_where_the_logits_are_still_needed,
    test_loss_is_ln_k_for_a_uniform_student,
    test_nan_reaches_the_loss,
    test_repeats_bitwise_and_reads_strided_rows,
    test_temperatures_as_floats_and_tensors,
    test_upstream_gradient_scales_the_stored_one,
)

from dino_kernels import dino_loss, dino_loss_reference

pytestmark = [needs_nvcc, pytest.mark.ptx]


@pytest.fixture(params=PROVE)
def device(request, monkeypatch):
    return use_cuda(monkeypatch, "dino_loss", request.param, addresses=request.param == "90a")


@pytest.fixture(params=QUICK)
def quick(request, monkeypatch):
    use_cuda(monkeypatch, "dino_loss", request.param, addresses=request.param == "90a")


@pytest.mark.parametrize(
    "batch, views, outputs, dtype",
    [
        (1, MULTIPROCESSORS + 2, 65536, torch.bfloat16),  # 8 pieces: a row stays in the ring, the next is copied ahead
        (1, 2, 10 * 8192, torch.float16),  # as many pieces as sm_80's ring holds
        (1, 2, 10 * 8192 + 8, torch.bfloat16),  # one more
        (1, 2, 14 * 8192 + 3, torch.float16),  # one more than sm_90's holds, the last not whole
        (2, 10, 8192, torch.bfloat16),  # several rows in the ring at once
    ],
)
def test_rows_in_and_beyond_shared_memory(quick, batch, views, outputs, dtype):
    x = inputs(batch, views, outputs, dtype)
    actual, eager = run(dino_loss, *x), run(dino_loss_reference, *x)
    exact = run(dino_loss_reference, *(t.double() for t in x))
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert_as_accurate(ours, theirs, truth, floor=torch.finfo(dtype).eps)
    student = x[0].clone().requires_grad_()
    loss, batch_center = dino_loss(student, *x[1:], inplace=True)
    loss.backward()
    for ours, other in zip((loss.detach(), batch_center, student.grad), actual, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_both_nets(quick, teacher_dtype, dtype):
    student, teacher, center = inputs(2, 3, 300)
    x = student.to(dtype), teacher.to(teacher_dtype), center
    exact = run(dino_loss_reference, *(t.double() for t in x))
    eager = run(dino_loss_reference, *(t.to(dtype) for t in x))
    for ours, theirs, truth in zip(run(dino_loss, *x), eager, exact, strict=True):
        assert_as_accurate(ours, theirs, truth, floor=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_any_order_of_execution_gives_the_same_in_four_launches(monkeypatch):
    use_cuda(monkeypatch, "dino_loss", "90a")
    x, launches, results = inputs(2, 4, 3000, torch.bfloat16), emulated("90a").launches, []
    for launch.options.seed in range(3):
        del launches[:]
        results.append(run(dino_loss, *x))
        assert len(launches) == 4
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
