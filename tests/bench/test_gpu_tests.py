"""Selection of tests for a GPU; outcomes are kept if a later test kills the process."""

import gpu
import gpu_tests

TESTS = """\
import os, pytest, torch
@pytest.mark.parametrize("shape", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_op(backend, dtype, shape): assert backend == "triton" and shape == 1
def test_elsewhere(): assert False
@pytest.mark.gpu
@pytest.mark.parametrize("case", [1, 2])
def test_graph(case): assert case == 1, "wrong sum"
@pytest.mark.skipif(True, reason="needs a GPU")
def test_later(): pass
def test_of_triton_dies(): os.abort()
def test_of_triton_never(): pass
"""


def test_one_shape_per_dtype_and_tests_that_need_a_gpu(tmp_path):
    file = tmp_path / "test_mixed.py"
    file.write_text(TESTS.replace("test_of_triton_dies", "test_dies").replace("test_of_triton_never", "test_never"))
    outcomes = run(tmp_path, file)[0]
    assert {name: test["outcome"] for name, test in outcomes.items()} == {
        "test_op[triton-dtype0-1]": "passed",
        "test_op[triton-dtype1-1]": "passed",
        "test_graph[1]": "passed",
        "test_graph[2]": "failed",
        "test_later": "skipped",
    }
    assert outcomes["test_graph[2]"]["problem"].endswith("AssertionError: wrong sum")


def test_outcomes_are_sent_immediately(tmp_path):
    file = tmp_path / "test_triton.py"
    file.write_text(TESTS)
    outcomes, problems = run(tmp_path, file)
    assert outcomes["test_op[triton-dtype0-1]"]["outcome"] == "passed" and "test_of_triton_never" not in outcomes
    assert problems == {"test_triton.py": "died of SIGABRT, see the log"}


def test_a_file_that_cannot_be_collected_is_a_failure(tmp_path):
    file = tmp_path / "test_broken.py"
    file.write_text("import no_such_module\n")
    outcomes, problems = run(tmp_path, file)
    assert outcomes["collection"]["outcome"] == "failed" and "no_such_module" in outcomes["collection"]["problem"]
    assert problems == {"test_broken.py": "RuntimeError: pytest ended with INTERRUPTED, see the log"}


def run(folder, file):
    results = {"tests": {}}
    task = gpu.Task(file.name, "gpu_tests.run", (str(file),))
    deadline = gpu.time.time() + 60
    take = lambda record: gpu.merge(results, record)  # noqa: E731
    problems = gpu.run_tasks([task], at_once=1, deadline=deadline, log=folder / "log", take=take)
    return results["tests"].get(file.name), problems


def test_the_tests_of_all_ops_are_found():
    names = {file.name for file in gpu_tests.test_files(toy=False)}
    assert {"test_dino_loss.py", "test_multicrop_triton.py", "test_gpu.py", "test_step.py", "test_loaders.py"} <= names
    assert "test_train.py" not in names
