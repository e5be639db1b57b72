import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code):
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    if "loss" in names:
        assert names["student"].grad.isfinite().all() and names["center"].abs().sum() > 0
    if "out" in names:
        assert names["out"].shape == (271, 6, 64) and names["tokens"].grad.isfinite().all()


def test_there_are_three_examples_and_the_pictures_exist():
    assert len(EXAMPLES) == 3
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).resolve().parent.parent / picture).is_file()
