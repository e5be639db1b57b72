"""README, docs and examples: their code runs, their commands parse, their links and paths exist."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dino_train import cli
from dino_train.common import checkpoint
from dino_train.models.vit import vit

import dino_kernels

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES += [ROOT / "examples/README.md"]
LANGUAGES = {"python", "sh", "text"}  # text: output, formulas, signatures


def blocks(*languages: str) -> list:
    """(code) of every block, named by page and number."""
    found = []
    for page in PAGES:
        for i, (language, code) in enumerate(re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)):
            assert language in LANGUAGES, f"{page}: a block of {language!r}"
            if language in languages:
                found.append(pytest.param(code, id=f"{page.relative_to(ROOT)}-{i}"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what the examples read: the checkpoint of a run and a backbone exported from it."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    backbone = vit("vit_tiny", patch_size=16, img_size=32)  # of the number of blocks that the pages count on
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    args = {"arch": "vit_tiny", "patch_size": 16, "global_crops_size": 32}
    (folder / "runs/demo").mkdir(parents=True)
    checkpoint.save({"teacher": state, "args": args}, folder / "runs/demo" / checkpoint.LAST)
    words = ["export", "--checkpoint", folder / "runs/demo", "--output", folder / "backbone.safetensors"]
    assert cli.main(list(map(str, words))) == 0
    return folder


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(folder, monkeypatch, code):
    monkeypatch.chdir(folder)
    exec(code, {})  # noqa: S102


def test_shapes_of_the_export_page(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(re.search(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)[1], names)  # noqa: S102
    assert names["features"].shape == (2, 192) and names["attention"].shape == (2, 3, 197)
    assert [tokens.shape for tokens in names["tokens"]] == [(2, 197, 192)] * 4


@pytest.mark.parametrize("code", blocks("sh"))
def test_commands_exist(monkeypatch, tmp_path, code):
    """Each dino-train parses without being run, each make target and each program is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stats.json").write_text('{"channels": 1, "value_range": [0, 1], "mean": [0.5], "std": [1]}')
    real = cli.tyro.cli
    parsed = lambda *args, **options: (real(*args, **options), SimpleNamespace(run=lambda: None))[1]  # noqa: E731
    monkeypatch.setattr(cli.tyro, "cli", parsed)
    for line in code.replace("\\\n", "").splitlines():
        program, *words = shlex.split(line, comments=True) or ["#"]
        if program == "torchrun":
            program, words = "dino-train", words[words.index("-m") + 2 :]
        if program == "dino-train":
            assert cli.main(words) == 0, line
        elif program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), line
        elif program == "python":
            assert (ROOT / words[0]).is_file(), line
            text = (ROOT / words[0]).read_text()
            assert all(f'"{word}"' in text for word in words if word.startswith("--")), line
        else:
            assert program in ("#", "pip"), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text):
        link = "".join(target)
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:csrc|dino_kernels|python_api|tests|bench|docs|examples)/[^`<>*{} ]*)`", text):
        assert (ROOT / path).exists(), path


def test_files_of_the_architecture_page_exist():
    tree = re.search(r"## Files\n\n```text\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S)
    for line in tree[1].splitlines():
        path = line.split()[0]
        if not line.startswith(" "):
            top = path
        path = top if path == top else top + path
        assert "<" in path or (ROOT / path).exists(), path


def test_every_op_has_a_section_with_its_signature():
    page = re.sub(r"\s+", " ", (ROOT / "docs/ops.md").read_text()).replace("( ", "(")
    for name in dino_kernels.__all__:
        if "_reference" in name or name == "CROP":
            continue
        signature = inspect.signature(getattr(dino_kernels, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        line = f"{name}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"
        assert f" {line} " in page, f"docs/ops.md has no signature\n{line}"


@pytest.mark.parametrize(
    "words, output",
    [
        (["one_op.py", "--steps", "10"], r"step 10: loss \d+\.\d+\n"),
        (
            ["backbone.py", "--checkpoint", "runs/demo", "--limit", "50", "--queries", "2"],
            r"(.+jpg: .+\(0\.\d\d\)\n){2}",
        ),
        (["own_model.py", "--steps", "10"], r"model: .+ %.+\naverage: .+ %.+\n"),
    ],
)
def test_examples_run(folder, words, output):
    command = [sys.executable, str(ROOT / "examples" / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert re.fullmatch(output, done.stdout), (done.stdout, done.stderr)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "examples/pretrain.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)  # noqa: S102
    assert names["last"] == Path("runs/notebook/last.pt") and names["features"].shape == (1000, 96)
    assert {"loss", "knn10"} <= {name for row in names["rows"] for name in row}
    assert len(names["axis"].get_legend().get_texts()) == 10


def test_the_speed_plot_reads_its_numbers():
    import plot_speed

    times = [plot_speed.step_times(*run) for run in plot_speed.RUNS.values()]
    table = (ROOT / "docs/performance.md").read_text()
    assert all(f"{ms:.0f} ms" in table for run in times for name, ms in run.items() if name in plot_speed.LABELS)


def test_versions_agree():
    versions = [
        re.search(r"^version ?[=:] ?\"?([\d.]+)", (ROOT / name).read_text(), re.M)[1]
        for name in ("pyproject.toml", "CITATION.cff")
    ]
    assert versions[0] == versions[1]


def test_the_site_builds_without_the_network(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\" >]+)", page.read_text())
        assert not loaded, (page, loaded)
