"""The functions of dino_kernels._C take every argument by name, and the stub _C.pyi says so."""

import ast
import re
from pathlib import Path

import pytest
import torch

from dino_kernels import _C
from dino_kernels._core.native import DTYPES

STUB = ast.parse((Path(__file__).resolve().parents[2] / "dino_kernels/_C.pyi").read_text())
COUNTS = {"tokens": 2, "channels": 3, "threads": 1, "dtype": DTYPES[torch.float32]}


def arguments() -> dict[str, int]:
    tensors = {"x": torch.zeros(2, 3), "bias": torch.zeros(3), "out": torch.zeros(2, 3)}
    return {name: t.data_ptr() for name, t in tensors.items()} | COUNTS


def test_arguments_by_name_are_taken():
    x, bias, out = torch.randn(2, 3), torch.randn(3), torch.empty(2, 3)
    _C.bias_gelu(x=x.data_ptr(), bias=bias.data_ptr(), out=out.data_ptr(), **COUNTS)
    torch.testing.assert_close(out, torch.nn.functional.gelu(x + bias))


@pytest.mark.parametrize("change", ["missing", "misspelt", "surplus", "positional"])
def test_other_arguments_raise(change):
    given, positional = arguments(), []
    if change == "surplus":
        given["stride"] = 3
    else:
        bias = given.pop("bias")
        if change == "misspelt":
            given["biases"] = bias
        elif change == "positional":
            positional = [bias]
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.bias_gelu(*positional, **given)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_raise(threads):
    with pytest.raises(ValueError, match=f"threads must be at least 1, got {threads}"):
        _C.bias_gelu(**arguments() | {"threads": threads})


def functions(scope, body):
    """(name, function, node of the stub) of all in the stub that this build has."""
    for node in body:
        inner = getattr(scope, {"Cuda": "cuda"}.get(getattr(node, "name", ""), getattr(node, "name", "")), None)
        if isinstance(node, ast.ClassDef) and node.name != "Products" and inner is not None:
            yield from functions(inner, node.body)
        elif isinstance(node, ast.FunctionDef):
            yield f"{scope.__name__}.{node.name}", getattr(scope, node.name), node


def test_the_stub_has_the_names_of_the_module():
    seen = []
    for name, function, node in functions(_C, STUB.body):
        assert not [a.arg for a in node.args.args if a.arg != "self"], name
        keywords = re.findall(r"(\w+): ", function.__doc__.splitlines()[0].partition("*, ")[2])
        assert keywords == [a.arg for a in node.args.kwonlyargs], name
        seen.append(node.name)
    for scope in (_C, *([_C.cuda] if hasattr(_C, "cuda") else [])):
        bound = {name for name in dir(scope) if type(getattr(scope, name)).__name__ == "builtin_function_or_method"}
        assert bound <= set(seen)
    assert {"bias_gelu", "attention_backward", "FusedBlock"} <= {*seen, "FusedBlock"}


@pytest.mark.parametrize("name", [node.name for node in STUB.body if isinstance(node, ast.FunctionDef)])
def test_a_call_without_arguments_raises(name):
    with pytest.raises(TypeError):
        getattr(_C, name)()


def test_products_are_no_plain_numbers():
    x = torch.ones(32, 32)
    addresses = dict.fromkeys(("x", "weight"), x.data_ptr()) | {"bias": 0, "out": torch.empty(32, 32).data_ptr()}
    sizes = {"tokens": 32, "depth": 32, "outputs": 32, "transposed": False, "threads": 1, "dtype": 0}
    with pytest.raises(TypeError):
        _C.linear(**addresses, **sizes, products=1)
