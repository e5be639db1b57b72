"""The subset of the tests that runs last on a GPU: kernel tests at one shape per dtype, and tests that need a GPU."""

import os
import sys
from pathlib import Path

from machine import ROOT


def test_files(toy: bool) -> list[Path]:
    """Test files of every op, of all ops in a CUDA graph, of the trainer's step and of its loader."""
    names = [f"{op.stem}*" for op in ROOT.glob("dino_kernels/ops/[a-z]*.py")] + ["gpu", "step", "loaders"]
    files = sorted({file for name in names for file in ROOT.glob(f"tests/*/test_{name}.py")})
    return [ROOT / f"tests/kernels/test_{name}.py" for name in ("bias_gelu", "gpu")] if toy else files


class Subset:
    """A pytest plugin: selects the subset, and sends each outcome immediately."""

    def __init__(self, send, file: str) -> None:
        self.send, self.file = send, file

    def pytest_collection_modifyitems(self, config, items) -> None:
        kept, paths = [], set()
        for item in items:
            values = item.callspec.params.values() if hasattr(item, "callspec") else ()
            dtype = next((value for value in values if str(value).startswith("torch.")), None)
            path = item.nodeid.partition("[")[0], dtype
            on_card = "triton" in item.nodeid or any(mark.name == "skipif" for mark in item.iter_markers())
            if "gpu" in item.keywords or (on_card and path not in paths):
                item.add_marker("gpu_subset")
                paths.add(path)
                kept.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.record(report)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.record(report)

    def record(self, report) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = crash.message.splitlines() if crash else report.longreprtext.strip().splitlines()[::-1]
        problem = lines[0][:200] if report.failed else ""
        name = report.nodeid.partition("::")[2] or "collection"
        self.send({"tests": {self.file: {name: {"outcome": report.outcome, "problem": problem}}}})


def run(send, file: str) -> None:
    import pytest

    # The pytest options of the project use plugins that may not be installed.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "--tb", "short", "-q"]
    options += ["-W", "ignore::pytest.PytestUnknownMarkWarning", file]
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    code = pytest.main(options, plugins=[Subset(send, Path(file).name)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code).name}, see the log")
