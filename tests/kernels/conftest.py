import importlib

import pytest


@pytest.fixture(params=["TILES", "FLOATS", "LIBRARY"])
def products(request, monkeypatch):
    """Each way in which linear layers' products are made, whatever is fastest here; tiles if the processor has them."""
    module = importlib.import_module("dino_kernels.ops.linear")
    if request.param == "TILES" and module.TILES not in module._PRODUCTS.values():
        pytest.skip("needs a processor with matrix tiles")
    monkeypatch.setattr(module, "_PRODUCTS", dict.fromkeys(module._PRODUCTS, getattr(module, request.param)))
    monkeypatch.setattr(module, "_SPLIT", 1)
