"""Without a GPU, Triton kernels run in the interpreter, which must be selected before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# Files that take longest, last: what is broken is seen early.
LATE = [
    "test_bench_step.py",
    "test_report.py",
    "test_export.py",
    "test_dino_loss.py",
    "test_mlp.py",
    "test_cuda_dino_loss.py",
    "test_cuda_adamw_ema.py",
    "test_dino_head_loss.py",
    "test_adamw_ema.py",
    "test_loaders.py",
    "test_trainer.py",
    "test_ranks.py",
    "test_ptx_compiled.py",
    "test_multicrop_triton.py",
    "test_add_layer_norm.py",
    "test_attention.py",
]


@pytest.hookimpl(tryfirst=True)  # before `slow` selects
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LATE.index(item.path.name) if item.path.name in LATE else -1)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("slow_interpreted") and item.callspec.params["device"] == "triton":
                item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("gpu"):  # a folder of that name is a keyword too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
