"""Runs tests of Triton kernels as compiled code:

    pytest -p ptx.pytest_plugin --ptx-arch 90 -k triton tests/kernels/test_x.py

A test fails on an error or a warning of the emulator, except for those in ALLOWED. The summary lists all reports.
"""

import re
from collections import Counter

import triton

from . import launch
from .triton_driver import install

# Patterns (kernel, report) of reports that do not fail a test; the reason is above each.
ALLOWED = []
if triton.__version__.startswith("3.6."):
    # A bug of this Triton version, fixed in 3.7 (triton-lang/triton#10537): a kernel cannot request the fence. The ISA
    # requires one; whether results are correct without it must be tested on a GPU.
    ALLOWED.append((".*", "wgmma reads what a cp.async wrote without a fence.proxy.async"))


def pytest_addoption(parser):
    group = parser.getgroup("PTX emulator")
    group.addoption("--ptx-arch", type=int, default=80, help="compute capability to compile for, 80 or 90")
    group.addoption("--ptx-seed", type=int, default=0, help="seed of the order in which warps and programs run")
    group.addoption("--ptx-noise", action="store_true", help="approximate functions have the maximum error of the ISA")
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
