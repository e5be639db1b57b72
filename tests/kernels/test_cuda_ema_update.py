"""ema_update_'s own tests, on the compiled CUDA C++ kernel."""

import pytest
import torch
from cuda_emulated import QUICK, emulated, needs_nvcc, use_cuda
from ptx import launch
from test_ema_update import (  # noqa: F401
    lists,
    test_against_float64,
    test_follows_a_changed_list,
    test_momentum_one_keeps_and_zero_copies,
    test_repeats_bitwise_and_never_writes_outside,
)

from dino_kernels import ema_update_

pytestmark = [needs_nvcc, pytest.mark.ptx]


@pytest.fixture(params=QUICK)
def device(request, monkeypatch):
    return use_cuda(monkeypatch, "ema_update", request.param, addresses=request.param == "90a")


def test_a_long_list_takes_few_launches_and_any_order_of_execution_gives_the_same(monkeypatch):
    use_cuda(monkeypatch, "ema_update", "90a")
    launches, results = emulated("90a").launches, []
    for launch.options.seed in range(3):
        del launches[:]
        targets, sources = lists(shapes=[(i % 7,) for i in range(600)])  # a few empty ones among them
        ema_update_(targets, sources, 0.9)
        assert len(launches) == 2
        results.append(torch.cat(targets))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
