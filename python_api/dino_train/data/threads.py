"""Threads for work that releases the GIL: reading, decoding, cropping, encoding."""

import atexit
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from weakref import WeakSet

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """Like concurrent.futures.ThreadPoolExecutor, but a thread can be added in place of one that hangs in a read, and a
    hanging thread does not block the exit of the process."""

    _all: "WeakSet[Threads]" = WeakSet()

    def __init__(self, number: int) -> None:
        if number < 1:
            raise ValueError(f"num_workers must be at least 1, got {number}")
        Threads._all.add(self)
        self._work: SimpleQueue[tuple[Future, Callable[..., Any], tuple] | None] = SimpleQueue()
        self._threads: list[Thread] = []
        for _ in range(number):
            self.add()

    def add(self) -> None:
        """Start one more thread."""
        self._threads.append(Thread(target=self._run, name="dino-train worker", daemon=True))
        self._threads[-1].start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        self._work.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Cancel work that has not started, and wait up to 2 seconds for the rest, since a read may hang."""
        while not self._work.empty():
            if entry := self._work.get():
                entry[0].cancel()
        for _ in self._threads:
            self._work.put(None)
        deadline = time.monotonic() + 2
        for thread in self._threads:
            if thread.is_alive():  # a signal may have come before its start
                thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while entry := self._work.get():
            future, function, arguments = entry
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del entry, future, arguments  # otherwise they stay alive until the next task


@atexit.register
def _close_all() -> None:
    """At exit, Python ends daemon threads that wait for the GIL; in the middle of C++ code this aborts the process."""
    for threads in list(Threads._all):
        threads.close()


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Result]:
    """`map` with several threads, at most `ahead` items ahead of the consumer."""
    pool, pending = Threads(threads), deque[Future]()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close()
