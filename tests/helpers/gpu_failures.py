"""A program that runs gpu.py on a test double of a GPU, with some failing tasks between the others."""

import importlib
import os
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))  # the module of the test double


def crash(send) -> None:
    send({"checks": {"before the crash": {"errors": {"x": 0.0}, "eager": {"x": 0.0}, "bitwise": True}}})
    os.abort()


def hang(send) -> None:
    print(f"hangs: {os.getpid()}", flush=True)
    if not os.fork():  # like a worker of a compiler, which keeps the pipe open
        time.sleep(1000)
    time.sleep(1000)


def exhaust(send) -> None:
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    torch.empty(1 << 36, dtype=torch.uint8)


def killed_by_the_host(send) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_double(send, function: str, *arguments) -> None:
    """A task whose trainer treats the CPU as a GPU."""
    from double import Double

    module, name = function.split(".")
    with Double().installed():
        getattr(importlib.import_module(module), name)(send, *arguments)


def doubled(item: gpu.Item) -> gpu.Item:
    def tasks(options: gpu.Options) -> list[gpu.Task]:
        given = item.tasks(options)
        return [replace(task, run="gpu_failures.on_double", arguments=(task.run, *task.arguments)) for task in given]

    return replace(item, tasks=tasks)


def tasks(seconds: float = 60) -> list[gpu.Task]:
    names = ("crash", "hang", "exhaust", "killed_by_the_host")
    return [gpu.Task(name, f"gpu_failures.{name}", (), 4 if name == "hang" else seconds) for name in names]


if __name__ == "__main__":
    if "only-hang" in sys.argv:
        sys.argv.remove("only-hang")
        hangs = gpu.Task("hang", "gpu_failures.hang", (), 600)
        gpu.ITEMS[1:] = [gpu.Item("hangs", 600, lambda options: [hangs])]
        gpu.ITEMS[0] = gpu.Item("ceilings", 600, lambda o: [gpu.Task("ceilings", "gpu_measure.ceilings", o.where)])
    else:
        gpu.ITEMS[:] = [doubled(item) if item.name[0] in "35" else item for item in gpu.ITEMS]
        gpu.ITEMS.insert(4, gpu.Item("fails", 20, lambda options: tasks(), len(tasks())))
    sys.exit(gpu.main())
