"""A machine that has only torch, triton, numpy, Pillow and pytest: what else this project imports is not found."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCKER = """\
import sys

class Blocker:
    names = {names}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""
ABSENT = (
    *("tyro", "tqdm", "matplotlib", "simplejpeg", "safetensors", "webdataset", "tensorboard"),
    *("ninja", "pybind11", "timm", "torchvision", "transformers", "sklearn", "scipy", "onnx", "pytest_benchmark"),
)


def environment(folder: Path) -> dict[str, str]:
    """Of a process that finds this tree and, through a file in the folder, none of the ABSENT."""
    (folder / "sitecustomize.py").write_text(BLOCKER.format(names=ABSENT))
    paths = [str(folder), *(str(ROOT / part) for part in (".", "python_api", "bench"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
