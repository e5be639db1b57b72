"""adamw_ema_step_'s own tests, on the compiled CUDA C++ kernels; and what is special to these."""

import pytest
import torch
from cuda_emulated import PROVE, QUICK, emulated, needs_nvcc, use_cuda
from ptx import launch
from test_adamw_ema import (  # noqa: F401
    HYPER,
    by_segment,
    clone,
    state,
    test_a_norm_that_is_not_finite_changes_nothing_but_the_flag,
    test_against_float64,
    test_against_torchs_adamw_clip_and_ema,
    test_clears_the_gradient_of_the_first_segments_also_of_a_refused_step,
    test_clips_only_what_is_too_long,
    test_momentum_one_keeps_the_teacher_and_frozen_weights_still_reach_it,
    test_rates_and_clip_groups_are_those_of_torch,
    test_rates_and_clip_groups_of_segments_against_float64,
    test_rates_of_one_and_a_group_for_each_change_nothing,
    test_repeats_bitwise,
    test_rows_of_a_weight_normed_layer,
    test_rows_stay_where_a_step_is_refused,
    test_settings_as_tensors_and_without_copies,
)

from dino_kernels import adamw_ema_step_, adamw_ema_step_reference_

pytestmark = [needs_nvcc, pytest.mark.ptx]


@pytest.fixture(params=PROVE)
def device(request, monkeypatch):
    return use_cuda(monkeypatch, "adamw_ema", request.param, addresses=request.param == "90a")


@pytest.fixture(params=QUICK)
def quick(request, monkeypatch):
    use_cuda(monkeypatch, "adamw_ema", request.param, addresses=request.param == "90a")


def compare(ours, exact):
    for name in ("student", "exp_avg", "exp_avg_sq", "teacher"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours["steps"], exact["steps"]) and ours["nonfinite"] == 0
    assert torch.equal(ours["student_16"], ours["student"].bfloat16())
    assert torch.equal(ours["teacher_16"], ours["teacher"].half())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[4096, 16, 8192 + 32], [64, 1, 507, 37, 5000]], ids=["aligned", "odd"])
def test_a_step_against_float64(quick, grad_dtype, sizes):
    ours = state("cpu", sizes, frozen=(1,), grad_dtype=grad_dtype)
    exact = clone(ours, torch.float64)
    adamw_ema_step_(**ours, **HYPER, cleared=2)
    adamw_ema_step_reference_(**exact, **HYPER, cleared=2)
    compare(ours, exact)
    assert torch.equal(ours["grad"].double(), exact["grad"].double())


def test_clip_groups_over_more_segments_than_a_launch_takes(quick):
    ours = state("cpu", [i % 3 + 1 for i in range(1030)], frozen=(1, 1027)) | by_segment(1030)
    exact = clone(ours, torch.float64)
    adamw_ema_step_(**ours, **HYPER)
    adamw_ema_step_reference_(**exact, **HYPER)
    compare(ours, exact)


def test_more_segments_than_a_launch_takes(quick):
    ours = state("cpu", [i % 3 + 1 for i in range(1030)], frozen=(1, 1027))
    exact = clone(ours, torch.float64)
    adamw_ema_step_(**ours, **HYPER)
    adamw_ema_step_reference_(**exact, **HYPER)
    compare(ours, exact)
    ours["grad"][-1] = float("nan")  # of the second launch: it refuses the first one's segments, too
    before = clone(ours)
    adamw_ema_step_(**ours, **HYPER)
    assert ours["nonfinite"] == 1
    assert all(torch.equal(ours[name], before[name]) for name in ("student", "exp_avg", "teacher", "steps"))


def test_any_order_of_execution_gives_the_same_in_four_launches(monkeypatch):
    use_cuda(monkeypatch, "adamw_ema", "90a")
    launches, results = emulated("90a").launches, []
    for launch.options.seed in range(3):
        x = state("cpu", [64, 48, 9000])
        rows = tuple(torch.empty(37, 40, dtype=torch.bfloat16) for _ in range(2))
        del launches[:]
        adamw_ema_step_(**x, **HYPER, rows=rows)
        assert len(launches) == 4
        results.append([x[name] for name in ("student", "exp_avg", "exp_avg_sq", "teacher")] + [*rows])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
