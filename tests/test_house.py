"""The borders between the parts, and what a build and an import must and must not need."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from bare import environment

ROOT = Path(__file__).resolve().parent.parent
# What a room may import of its own package besides itself; "." is what lies beside the rooms.
ROOMS = {
    "dino_kernels": {
        "_core": set(),
        "triton": {"_core"},
        "cuda": {"_core", "triton"},
        "ops": {"_core", "cuda", "triton"},
        "nn": {"_core", "ops"},
        ".": {"_core", "ops"},
    },
    "python_api/dino_train": {
        "common": set(),
        "data": {"common"},
        "models": {"common"},
        "config": {"common", "models"},
        "evaluate": {"common", "config", "data", "models"},
        "methods": {"common", "config", "models"},
        "engine": {"common", "config", "data", "evaluate", "methods", "models"},
        ".": {"common", "config", "data", "engine", "evaluate", "models"},
    },
}
ALLOWED = {
    "dino_kernels": {"torch", "triton", "numpy", "dino_kernels"},
    "python_api": {"torch", "numpy", "PIL", "simplejpeg", "webdataset", "tyro", "tqdm", "matplotlib", "safetensors"}
    | {"pyarrow", "dino_kernels", "dino_train"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize("part", ALLOWED)
def test_python_imports_stay_within_their_border(part):
    files = list((ROOT / part).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= ALLOWED[part], path


@pytest.mark.parametrize("package, room", [(package, room) for package, rooms in ROOMS.items() for room in rooms])
def test_rooms_know_only_those_below_them(package, room):
    folder, name = ROOT / package, Path(package).name
    files = list(folder.glob("*.py") if room == "." else (folder / room).rglob("*.py"))
    assert files
    for path in files:
        other = set(re.findall(rf"(?:from|import) {name}\.(\w+)", path.read_text())) - {room}
        other = {part for part in other if (folder / part).is_dir()}
        assert other <= ROOMS[package][room], path


def test_every_folder_is_a_room():
    for package, rooms in ROOMS.items():
        assert {path.parent.name for path in (ROOT / package).glob("*/*.py")} | {"."} == set(rooms)


def test_the_trainer_uses_what_the_library_makes_public():
    import dino_kernels
    import dino_kernels.nn

    public = {
        "dino_kernels": {*dino_kernels.__all__, "__version__", "nn"},
        "dino_kernels.nn": set(dino_kernels.nn.__all__),
    }
    for path in (ROOT / "python_api").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (module := node.module or "").startswith("dino_kernels"):
                assert {alias.name for alias in node.names} <= public.get(module, set()), path
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("dino_kernels") for alias in node.names), path
        assert not re.search(r"ops\.dino_kernels|dino_kernels::", path.read_text()), path  # an op by its name


def test_the_command_line_alone_knows_its_library():
    paths = [path for path in (ROOT / "python_api").rglob("*.py") if "tyro" in imported(path)]
    assert [path.name for path in paths] == ["cli.py"]


def test_csrc_includes_no_torch_header():
    for path in (ROOT / "csrc").rglob("*.*"):
        for header in re.findall(r'#include [<"](.*)[>"]', path.read_text()):
            assert not re.match(r"(torch|ATen|c10)\b", header), f"{path}: {header}"


def test_importing_the_ops_loads_none_of_the_trainers_libraries():
    code = "import sys, dino_kernels; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True, cwd="/").split()
    assert not {"dino_train", "PIL", "tyro", "matplotlib", "safetensors"} & set(modules)


def test_importing_the_trainer_loads_not_even_torch_until_a_backbone_is_asked_for():
    code = (
        "import sys, dino_train; assert 'torch' not in sys.modules; "
        "from dino_train import load_backbone; print(*sys.modules)"
    )
    modules = subprocess.check_output([sys.executable, "-c", code], text=True, cwd="/").split()
    assert "torch" in modules and not {"PIL", "tyro", "matplotlib", "safetensors", "triton"} & set(modules)


def test_a_process_on_the_cpu_does_not_load_triton():
    code = (
        "import sys, torch, dino_train.engine.learner, dino_kernels; x = torch.ones(2, 3, requires_grad=True); "
        "dino_kernels.bias_gelu(x, torch.ones(3)).sum().backward(); print(*sys.modules)"
    )
    modules = subprocess.check_output([sys.executable, "-c", code], text=True, cwd="/").split()
    assert "dino_kernels.ops.bias_gelu" in modules and "triton" not in modules


def test_every_op_is_registered_with_a_fake_and_a_gpu_kernel():
    import torch

    import dino_kernels  # noqa: F401

    for op in (
        "dino_loss",
        "dino_loss_",
        "dino_loss_scale_",
        "column_mass",
        "dino_head_loss",
        "info_nce",
        "patch_loss",
        "patch_loss_",
        "ema_update_",
        "adamw_ema_step_",
        "sgd_ema_step_",
        "attention",
        "attention_backward_",
        "add_layer_norm",
        "add_layer_norm_backward_",
        "bias_gelu",
        "bias_gelu_backward",
        "add_product_",
        "weight_norm_",
        "weight_norm_backward_",
        "weight_norm_product_backward_",
        "linear",
        "mlp",
        "mlp_backward_",
    ):
        name = f"dino_kernels::{op}"
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)


def test_an_extension_that_does_not_load_says_how_to_build_it(tmp_path):
    shutil.copytree(ROOT / "dino_kernels", tmp_path / "dino_kernels", ignore=shutil.ignore_patterns("*.so"))
    no_editable_install = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]"
    code = f"import sys; {no_editable_install}; import dino_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "python setup.py build_ext --inplace" in done.stderr


# Where neither Linux nor x86-64 is; set after torch is loaded, which is not what is tested.
ELSEWHERE = """\
import ctypes, mmap, os, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
import torch
sys.platform = "darwin"
del os.sched_getaffinity, mmap.MADV_HUGEPAGE
real = Path.read_text, Path.read_bytes
def missing(self, *a, of, **k):
    if str(self).startswith("/proc"):
        raise FileNotFoundError(self)
    return of(self, *a, **k)
Path.read_text = lambda self, *a, **k: missing(self, *a, of=real[0], **k)
Path.read_bytes = lambda self, *a, **k: missing(self, *a, of=real[1], **k)
ctypes.CDLL = lambda name: SimpleNamespace()

import dino_train.cli
from dino_kernels.nn import FlatParameters
from dino_train.common import process
from dino_train.config.pretrain import PretrainConfig
from dino_train.engine.log import RunLog

process.tune()
process.use_huge_pages()
assert PretrainConfig().num_workers == os.cpu_count()
FlatParameters(torch.nn.Linear(2, 2))
with tempfile.TemporaryDirectory() as folder, RunLog(Path(folder)):
    pass
assert 50 < process.peak_memory() * 1024 < 50_000  # of KiB taken for bytes
"""


def test_nothing_of_linux_is_needed():
    env = {k: v for k, v in os.environ.items() if k != "LOCAL_WORLD_SIZE"}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_the_trainers_libraries_it_says_what_to_install(tmp_path):
    env = environment(tmp_path)
    done = subprocess.run([sys.executable, "-m", "dino_train", "pretrain"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(r'dino-train: error: needs \w+, .*pip install "dino-kernels\[train\]".*\n', done.stderr)


@pytest.fixture
def setup(monkeypatch):
    """What setup.py defines."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    return runpy.run_path(str(ROOT / "setup.py"))


PLATFORMS = {
    ("Linux", "x86_64"): [],
    ("Linux", "aarch64"): ["aarch64: no AVX2, AVX-512 and AMX"],
    ("Darwin", "arm64"): ["arm64: no AVX2, AVX-512 and AMX", "Darwin: no AMX kernels, no huge pages"],
    ("Darwin", "x86_64"): ["Darwin: no AMX kernels, no huge pages"],
}


@pytest.mark.parametrize("system, machine", PLATFORMS)
def test_a_build_says_what_a_platform_lacks(setup, monkeypatch, capsys, system, machine):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    text = setup["ninja_file"](["csrc/a.cpp"], Path("out.so"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "nvcc" not in line]
    for line, expected in zip(lines, PLATFORMS[system, machine], strict=True):
        assert line.startswith(f"dino-kernels: {expected}")
    assert ("-mprefer-vector-width" in text) == (machine == "x86_64")
    assert ("-undefined dynamic_lookup" in text) == (system == "Darwin")


def test_a_build_without_a_compiler_or_on_windows_is_one_line(setup, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler: /nowhere/g\\+\\+ not found"):
        setup["ninja_file"](["csrc/a.cpp"], Path("out.so"))
    monkeypatch.setattr("os.name", "nt")
    with pytest.raises(SystemExit, match="not supported"):
        setup["lacks"]()


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs the repository")
def test_a_source_distribution_is_complete(tmp_path):
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    files = [name for name in listed if (ROOT / name).is_file()]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        assert {name.partition("/")[2] for name in tar.getnames()} >= set(files)


OTHER_COMPILERS = [name for name in ("clang++", "clang++-14", "clang++-19", "g++-11") if shutil.which(name)]


@pytest.mark.slow
class TestBuild:
    """setup.py in a copy of the tree; nothing is downloaded."""

    @pytest.fixture
    def tree(self, tmp_path):
        for name in ("setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, tmp_path)
        for name in ("csrc", "dino_kernels"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        (tmp_path / "python_api/dino_train").mkdir(parents=True)
        return tmp_path

    def build(self, tree, **env):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env={**os.environ, **env}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    def call(self, tree, expression):
        code = f"import torch, dino_kernels._C as c; assert c.__file__.startswith({str(tree)!r}); print({expression})"
        return subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tree).strip()

    def test_without_nvcc_and_with_torchs_pybind11(self, tree, monkeypatch):
        """CPU only, in one line; and pybind11's headers out of torch where the package is absent."""
        hide = tree / "hide"
        hide.mkdir()
        (hide / "sitecustomize.py").write_text(
            "import importlib.util as u\nfind = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name in ('pybind11', 'ninja') else find(name, *a)\n"
        )
        tools = tree / "tools"
        tools.mkdir()
        for tool in ("g++", "sh", "as", "ld"):
            (tools / tool).symlink_to(shutil.which(tool))
        source = (tree / "setup.py").read_text()
        (tree / "setup.py").write_text(source.replace('"/usr/local/cuda"', '"/nowhere"'))
        output = self.build(tree, PATH=str(tools), CUDA_HOME="", PYTHONPATH=str(hide))
        assert output.count("ninja not found, compiling everything anew") == 1
        assert output.count("nvcc not found, building the CPU kernels only") == 1
        assert "torch/include" in output
        assert "dino_loss" in self.call(tree, "dir(c)") and self.call(tree, "hasattr(c, 'cuda')") == "False"

    @pytest.mark.parametrize("compiler", OTHER_COMPILERS)
    def test_another_compiler(self, tree, compiler):
        source = (tree / "setup.py").read_text()
        (tree / "setup.py").write_text(source.replace('"/usr/local/cuda"', '"/nowhere"').replace('"-O3 ', '"-O1 '))
        self.build(tree, CXX=compiler, CUDA_HOME="")
        assert "dino_loss" in self.call(tree, "dir(c)")

    @pytest.mark.skipif(
        not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="nvcc is not installed"
    )
    def test_cuda_sources_are_compiled_where_nvcc_is(self, tree):
        self.build(tree)
        assert {"80", "90a"} <= set(ast.literal_eval(self.call(tree, "c.cuda.archs")))  # imported without a driver

    @pytest.mark.skipif(os.uname().machine != "x86_64", reason="the versions are those of x86-64")
    def test_kernels_have_a_version_for_old_and_for_new_processors(self):
        import dino_kernels._C as compiled

        symbols = subprocess.check_output(["nm", "--demangle", compiled.__file__], text=True)
        for function in (
            "student_stats",
            "student_gradient",
            "teacher_probabilities",
            "mean_columns",
            "update",
            "normalize",
        ):
            for version in ("default", "(arch_x86_64_v3|avx2)", "(arch_x86_64_v4|avx512f)"):
                assert re.search(rf"{function}\(.*\[clone \.{version}\]", symbols), (function, version)
