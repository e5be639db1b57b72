"""Hardware counters: the command line of ncu, and the parsing of its output."""

import os
import sys

import gpu
import gpu_counters
import gpu_measure
import pytest

# Output of ncu with --csv --page raw: messages, names, units, one line per launch.
SAID = """==PROF== Connected to process 42 (/usr/bin/python3.12)
==PROF== Profiling "_student_kernel" - 0: 0%....50%....100% - 2 passes
"ID","Process ID","Kernel Name","Block Size","Grid Size","CC",{metrics}
"","","","","","",{units}
"0","42","_student_kernel","(512, 1, 1)","(640, 1, 1)","9.0","2,000","1,000,000","500,000","60.5","50","64"
"1","42","_student_kernel","(512, 1, 1)","(640, 1, 1)","9.0","4,000","3,000,000","500,000","61.5","50","64"
"2","42","void at::copy<4>(int, T)","(128, 1, 1)","(9, 1, 1)","9.0","9,000","1","2","3","4",""
""".format(
    metrics=",".join(f'"{metric}"' for metric in gpu_counters.METRICS),
    units='"nsecond","byte","byte","%","%","register/thread"',
)


def test_a_table_of_ncu():
    copy, student = gpu_counters.parse(SAID)
    assert student == {
        "kernel": "_student_kernel",
        "launches": 2,
        "us": 3.0,
        "MB read": 2.0,
        "MB written": 0.5,
        "issue %": 61.0,
        "occupancy %": 50.0,
        "registers": 64.0,
    }
    assert copy["us"] == 9.0 and copy["registers"] is None
    assert gpu_counters.parse("==ERROR== ERR_NVGPUCTRPERM") == []


def fake_ncu(tmp_path, monkeypatch, said):
    """A replacement for ncu that runs the given program without a GPU, and prints `said`."""
    script = tmp_path / "ncu"
    script.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\nat = sys.argv.index({sys.executable!r})\n"
        f"print('asked:', *sys.argv[1:at])\nsubprocess.run(sys.argv[at:], check=True)\nprint({said!r})\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(gpu_counters, "find_ncu", lambda: str(script))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(gpu.PATHS))


def test_the_cases_run_under_ncu(tmp_path, monkeypatch, capfd):
    fake_ncu(tmp_path, monkeypatch, SAID)
    sent = []
    gpu_counters.measure(sent.append, "cpu", toy=True)
    assert [row["kernel"] for row in sent[0]["counters"]] == ["void at::copy<4>(int, T)", "_student_kernel"]
    asked = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("asked:"))
    assert "--profile-from-start off" in asked and ",".join(gpu_counters.METRICS) in asked
    assert set(gpu_counters.CASES) < set(gpu_measure.cases(toy=True))


@pytest.mark.parametrize(
    "said, reason",
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "ERR_NVGPUCTRPERM"),
        ("==WARNING== No kernels were profiled.", "it printed no error"),
    ],
)
def test_unreadable_counters_are_reported(tmp_path, monkeypatch, said, reason):
    fake_ncu(tmp_path, monkeypatch, said)
    with pytest.raises(RuntimeError, match=f"ncu measured no kernel: .*{reason}"):
        gpu_counters.measure(None, "cpu", toy=True)


def test_missing_ncu_is_reported(monkeypatch):
    monkeypatch.setattr(gpu_counters.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_counters.Path, "is_file", lambda self: False)
    with pytest.raises(RuntimeError, match="ncu.* is not on this machine"):
        gpu_counters.measure(None, "cpu", toy=True)
