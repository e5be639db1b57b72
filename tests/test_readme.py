import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
EXAMPLES = dict(re.findall(r"```python\nimport torch\nfrom dino_kernels import (\w+)\n(.*?)```", README, re.DOTALL))
CHECKS = {
    "dino_loss": lambda x: x["student"].grad.isfinite().all() and x["center"].abs().sum() > 0,
    "dino_head_loss": lambda x: x["z"].grad.isfinite().all() and x["weight"].grad.abs().sum() > 0,
    "ema_update_": lambda x: not x["teacher"].weight.equal(x["student"].weight),
    "adamw_ema_step_": lambda x: x["nonfinite"] == 0 and x["copy"].equal(x["student"].bfloat16()),
    "attention": lambda x: x["out"].shape == (271, 6, 64) and x["tokens"].grad.isfinite().all(),
}


@pytest.mark.parametrize("op", CHECKS)
def test_examples_run(op):
    names = {}
    exec(f"import torch\nfrom dino_kernels import {op}\n{EXAMPLES[op]}", names)  # noqa: S102
    assert CHECKS[op](names)


def test_every_example_is_checked_and_the_pictures_exist():
    assert README.count("```python") == len(CHECKS)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).resolve().parent.parent / picture).is_file()
