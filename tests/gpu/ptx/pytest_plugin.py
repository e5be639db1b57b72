"""Runs tests of Triton kernels as compiled code:

    pytest -p ptx.pytest_plugin --ptx-arch 90 -k triton tests/kernels/test_x.py

A test fails on an error or a warning of the emulator, but for those of ALLOWED. The summary lists all that was found.
"""

import re
from collections import Counter

import triton

from . import launch
from .triton_driver import install

# (kernel, finding) of what does not fail a test, as patterns; the reason stands above each.
ALLOWED = []
if triton.__version__.startswith("3.6."):
    # A fault of this compiler, mended in the releases of 3.7 (triton-lang/triton#10537): a kernel cannot ask for the
    # fence. The ISA demands one; that the results are right without is for a card to show.
    ALLOWED.append((".*", "wgmma reads what a cp.async wrote without a fence.proxy.async"))


def pytest_addoption(parser):
    group = parser.getgroup("PTX emulator")
    group.addoption("--ptx-arch", type=int, default=80, help="80 or 90: compute capability that is compiled for")
    group.addoption("--ptx-seed", type=int, default=0, help="of the order in which warps and programs run")
    group.addoption("--ptx-noise", action="store_true", help="approximate functions err as much as the ISA allows")
    group.addoption("--ptx-pointers", action="store_true", help="pass scalar arguments of kernels as addresses")


def pytest_load_initial_conftests(early_config):
    given = early_config.known_args_namespace
    launch.options.seed, launch.options.noise = given.ptx_seed, given.ptx_noise
    launch.options.fails_on = ("error", "warning")
    launch.options.allowed = lambda report: any(
        re.fullmatch(kernel, report.kernel) and re.search(finding, report.what) for kernel, finding in ALLOWED
    )
    install(given.ptx_arch)


def pytest_collection_finish(session):
    if session.config.option.ptx_pointers:
        import sys

        for name, module in list(sys.modules.items()):
            if name.startswith("dino_kernels") and hasattr(module, "argument"):
                module.argument = lambda scalar: scalar


def pytest_terminal_summary(terminalreporter, config):
    found = Counter(
        f"{report.severity}: {report.kernel}: {report.what.split(' of line')[0]} [{report.source.split(';')[0]}]"
        for report in launch.reports
    )
    terminalreporter.section(f"PTX emulator, sm_{config.option.ptx_arch}")
    for line, count in sorted(found.items()):
        terminalreporter.line(f"{count} x {line}")
    kernels = sorted({used.program.kernel.name for used in launch.usage.values()})
    launches = sum(used.launches for used in launch.usage.values())
    terminalreporter.line(f"{launches} launches of {len(launch.usage)} compiled kernels: {' '.join(kernels)}")
