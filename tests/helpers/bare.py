"""An environment with only torch, triton, numpy, Pillow and pytest: other imports of this project fail."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCKER = """\
import sys

class Blind:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {names} else self.finder.find_spec(name, *rest)

sys.meta_path[:] = map(Blind, sys.meta_path)
"""
ABSENT = (
    *("tyro", "tqdm", "matplotlib", "simplejpeg", "safetensors", "webdataset", "tensorboard"),
    *("ninja", "pybind11", "timm", "torchvision", "transformers", "sklearn", "scipy", "onnx", "pytest_benchmark"),
)


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of a process that can import this tree but, by a file in `folder`, none of ABSENT."""
    (folder / "sitecustomize.py").write_text(BLOCKER.format(names=ABSENT))
    paths = [str(folder), *(str(ROOT / part) for part in (".", "python_api", "bench", "bench/cases", "bench/gpu"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
