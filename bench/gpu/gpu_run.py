"""Tasks in separate processes, each with a time limit. What a task has sent is kept, even if the task fails.

The processes are forked from a server that has already imported torch, which saves seconds per task. The server does
not use the GPU.
"""

import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from threading import Thread
from typing import Any

LEAST_SECONDS = 3  # with less time left, a task is not started
_context: BaseContext = multiprocessing.get_context("forkserver")

Send = Callable[[dict[str, Any]], None]


@dataclass
class Task:
    """Calls `run`, "module.function", with (send, *arguments), for at most `seconds`."""

    name: str
    run: str
    arguments: tuple[Any, ...] = ()
    seconds: float = 60


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _end_with_the_run() -> None:
    """If the run is killed, kill this task and all processes that it has started."""
    run = multiprocessing.parent_process()
    assert run is not None
    run.join()
    os.killpg(0, signal.SIGKILL)


def _child(connection: Connection, log: Path, task: Task) -> None:
    os.setsid()  # a new process group, so that child processes can be killed with it
    Thread(target=_end_with_the_run, daemon=True).start()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    print(f"--- {task.name}", flush=True)
    try:
        module, function = task.run.split(".")
        getattr(importlib.import_module(module), function)(connection.send, *task.arguments)
    except BaseException as error:
        traceback.print_exc()
        connection.send(one_line(error))


def probe(send: Send, device: str) -> None:
    import torch

    assert torch.ones(2, device=device).sum().item() == 2


def prepare(device: str, log: Path) -> None:
    """Start the server. If the device does not work in forked processes, use new processes (spawn) instead."""
    global _context
    # On a CPU, not preloaded: the tests need Triton's interpreter, the compilation must not use it.
    compilers = ["triton", "torch._dynamo"] if device == "cuda" else []
    multiprocessing.set_forkserver_preload(["torch", "numpy", "gpu_measure", *compilers])
    task = Task("probe", "gpu_run.probe", (device,))
    if run_tasks([task], at_once=1, deadline=time.time() + 60, log=log, take=lambda record: None):
        _context = multiprocessing.get_context("spawn")


class _Running:
    def __init__(self, task: Task, log: Path, deadline: float) -> None:
        self.task, self.problem, self.open = task, "", True
        self.connection, theirs = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_child, args=(theirs, log, task))
        self.process.start()
        theirs.close()
        self.started = time.time()
        self.until = min(deadline, self.started + task.seconds)

    def receive(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Take all messages: records, or one line with the reason of a failure."""
        try:
            while self.open and self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, str):
                    self.problem = message
                else:
                    take(message)
        except (EOFError, OSError):
            self.open = False

    def ended(self) -> bool:
        """Whether the process has ended, or was killed now because of the time limit."""
        late = time.time() >= self.until
        if not late and self.process.is_alive():
            return False
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join(5)
        code = self.process.exitcode
        if late:
            self.problem = self.problem or f"no result within {time.time() - self.started:.0f} s, see the log"
        elif code:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            name += " (perhaps the host's memory ran out)" * (name == "SIGKILL")
            self.problem = self.problem or f"died of {name}, see the log"
        return True


def run_tasks(
    tasks: Sequence[Task], *, at_once: int, deadline: float, log: Path, take: Callable[[dict[str, Any]], None]
) -> dict[str, str]:
    """Run tasks in order; `take` is called with each record when it arrives. Returns failures: name of task, reason."""
    waiting, running, problems = deque(tasks), list[_Running](), dict[str, str]()
    while waiting or running:
        while waiting and len(running) < at_once:
            task = waiting.popleft()
            if deadline - time.time() < LEAST_SECONDS:
                problems[task.name] = "skipped: the time was spent"
            else:
                running.append(_Running(task, log, deadline))
        if not running:
            continue
        timeout = max(0.0, min(one.until for one in running) - time.time())
        wait([x for one in running for x in (one.process.sentinel, *[one.connection] * one.open)], timeout)
        for one in list(running):
            over = one.ended()
            one.receive(take)
            if over:
                running.remove(one)
                one.connection.close()
                if one.problem:
                    problems[one.task.name] = one.problem
    return problems
