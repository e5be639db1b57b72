"""Without a GPU, Triton kernels run in the interpreter, which must be selected before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a folder of that name is a keyword too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
