import importlib

import pytest

from dino_kernels._core.native import Products


@pytest.fixture(params=[Products.amx, Products.f32, Products.library], ids=lambda products: products.name)
def products(request, monkeypatch):
    """Each way in which linear layers' products are made, whatever is fastest here; AMX if the processor has it."""
    module = importlib.import_module("dino_kernels.ops.linear")
    if request.param == Products.amx and Products.amx not in module._PRODUCTS.values():
        pytest.skip("needs a processor with AMX")
    monkeypatch.setattr(module, "_PRODUCTS", dict.fromkeys(module._PRODUCTS, request.param))
    monkeypatch.setattr(module, "_SPLIT", 1)
    return request.param
