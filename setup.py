"""Compiles csrc/ into dino_kernels._C with ninja: the C++ kernels always, the .cu files when nvcc is found.

No torch header is used, so one build serves every torch version and nvcc needs no CUDA build of torch.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# -fopenmp-simd: vectorize annotated loops; no OpenMP library is linked (csrc/common/parallel.cpp says why).
CXX_FLAGS = "-O3 -std=c++20 -fPIC -fvisibility=hidden -fopenmp-simd -fno-trapping-math -fno-math-errno -Wall"
X86_FLAGS = " -mprefer-vector-width=512"  # in the AVX-512 versions; says nothing about the others
# clang gives the choice of a version of a function external linkage, also where the function has none: names that are
# unique to a file keep them apart. It warns of each loop that it does not vectorize.
CLANG_FLAGS = " -funique-internal-linkage-names -Wno-pass-failed"
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden --threads 0"
NVCC_ARCHS = ("80", "90a", "100")


def pybind11_include() -> str:
    """Headers of the pybind11 package, or else those inside torch (nothing else of torch is used)."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            include = Path(spec.origin).parent / "include"
            if (include / "pybind11" / "pybind11.h").is_file():
                return str(include)
    sys.exit("dino-kernels: no pybind11 headers found. Run: pip install pybind11")


def is_clang(cxx: str) -> bool:
    try:
        done = subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit(f"dino-kernels: no C++ compiler: {cxx} not found. Install g++ or clang++, or set CXX")
    return "clang" in done.stdout


def lacks() -> list[str]:
    """What the kernels are without on this platform."""
    if os.name != "posix":
        sys.exit(f"dino-kernels: {platform.system()} is not supported; build it on Linux, on Windows in WSL")
    missing = []
    if platform.machine() != "x86_64":
        missing.append(f"{platform.machine()}: no AVX2, AVX-512 and AMX kernels, but those for any processor")
    if platform.system() != "Linux":
        missing.append(f"{platform.system()}: no AMX kernels, no huge pages, and no Triton for GPUs")
    return missing


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def ninja_command() -> list[str] | None:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    return ["ninja"] if shutil.which("ninja") else None


def run_without_ninja(text: str, folder: Path) -> None:
    """All commands of such a file, each build's inputs made before it: what ninja does where nothing is built yet."""
    variables: dict[str, str] = {}
    rules: dict[str, str] = {}
    builds = []
    for line in text.splitlines():
        key, _, value = line.strip().partition(" = ")
        words = [re.sub(r"\$(.)", r"\1", word) for word in re.split(r"(?<!\$) ", line)]
        if words[0] == "rule":
            rule = words[1]
        elif words[0] == "build":
            builds.append((words[2], words[1].removesuffix(":"), words[3:]))
        elif key == "command":
            rules[rule] = value
        elif not line.startswith(" "):
            variables[f"${key}"] = value

    def run(build: tuple[str, str, list[str]]) -> None:
        rule, out, inputs = build
        values = {**variables, "$out": shlex.quote(out), "$in": shlex.join(inputs)}
        command = re.sub(r"\$\w+", lambda match: values[match[0]], rules[rule])
        print(command, flush=True)
        subprocess.run(command, shell=True, cwd=folder, check=True)

    *objects, link = builds
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(processors) as threads:
        list(threads.map(run, objects))
    run(link)


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        build = Path(self.build_temp).absolute()
        build.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        text = ninja_file(ext.sources, output)
        (build / "build.ninja").write_text(text)
        if ninja := ninja_command():
            subprocess.run([*ninja, "-C", str(build)], check=True)
        else:
            print("dino-kernels: ninja not found, compiling everything anew", flush=True)
            run_without_ninja(text, build)


def known_archs(nvcc: str | None) -> list[str]:
    """Those of NVCC_ARCHS that this nvcc compiles for."""
    if not nvcc:
        return []
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in NVCC_ARCHS if f"compute_{arch.rstrip('a')}" in listed]


def quote(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_file(sources: list[str], output: Path) -> str:
    nvcc = find_nvcc()
    if not nvcc:
        print("dino-kernels: nvcc not found, building the CPU kernels only", flush=True)
    for line in lacks():
        print(f"dino-kernels: {line}", flush=True)
    cxx = os.environ.get("CXX", "g++")
    flags = CXX_FLAGS + X86_FLAGS * (platform.machine() == "x86_64") + CLANG_FLAGS * is_clang(cxx)
    csrc = f'-I"{here / "csrc"}"'
    includes = f'{csrc} -I"{pybind11_include()}" -I"{sysconfig.get_paths()["include"]}"'
    archs = known_archs(nvcc)
    codes = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    link, libraries = "$cxx", "-ldl -lpthread"
    if platform.system() == "Darwin":  # symbols of Python are found when it loads the module
        libraries = "-undefined dynamic_lookup"
    if nvcc:
        includes += f" -DDINO_CUDA_ARCHS='\"{' '.join(archs)}\"'"
        link = "$nvcc -cudart static -ccbin $cxx"  # it knows where its runtime is
    lines = [
        f"cxx = {cxx}",
        f"nvcc = {nvcc}",
        "rule cpp",
        f"  command = $cxx -MMD -MF $out.d {flags} {includes} -c $in -o $out",
        "  depfile = $out.d",
        "rule cuda",
        f"  command = $nvcc -MD -MF $out.d {NVCC_FLAGS} {csrc} {codes} -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = {link} -shared $in -o $out {libraries}",
    ]
    objects = []
    for source in sources:
        rule = "cuda" if source.endswith(".cu") else "cpp"
        if nvcc or not (rule == "cuda" or source == "csrc/bindings/cuda.cpp"):
            objects.append(source.replace("/", ".") + ".o")
            lines.append(f"build {objects[-1]}: {rule} {quote(Path(source).absolute())}")
    lines.append(f"build {quote(output)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


here = Path(__file__).resolve().parent
sources = sorted(str(p.relative_to(here)) for p in here.glob("csrc/**/*") if p.suffix in (".cpp", ".cu"))
setup(ext_modules=[Extension("dino_kernels._C", sources)], cmdclass={"build_ext": NinjaBuild})
