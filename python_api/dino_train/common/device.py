"""All that the trainer asks of a GPU, in one place.

    gpu = gpu_of(device)      # None on a CPU
    if gpu is not None:
        side = gpu.stream()
        with gpu.using(side):
            ...
            done = gpu.record()
        gpu.wait(done)

Every branch for a GPU in this package asks `gpu_of`, and calls nothing of torch.cuda itself: tests put a double into
`_GPUS` that runs on the CPU and checks the order of what is asked, and so run these branches without a GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Make the host wait until the work before it is done."""


class Gpu(Protocol):
    """What a GPU does for the trainer; work is queued in the current stream."""

    def describe(self) -> str:
        """Its name and memory."""

    def of_rank(self, number: int) -> torch.device:
        """The device of a machine's process of this number, made the current one."""

    def group(self) -> dict[str, Any]:
        """How torch.distributed.init_process_group connects such devices; called on the rank's own."""

    def tune_convolutions(self) -> None:
        """Have convolutions of one shape, which come every step, use the fastest deterministic algorithm."""

    def stream(self) -> Any:
        """A new stream beside the current one."""

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """Makes a stream the current one."""

    def record(self) -> Event:
        """The current end of the current stream."""

    def wait(self, event: Any) -> None:
        """The current stream's next work starts after the event."""

    def pinned(self, count: int) -> Tensor:
        """Host memory for uploads, uint8 [count]."""

    def upload(self, pinned: Tensor) -> Tensor:
        """A copy on the device, without waiting: `pinned` must not change until an event after it is synchronized."""

    def capture(self, body: Callable[[], None], stream: Any) -> Callable[[], None]:
        """Queue `body`'s work into a graph instead of running it; what is returned runs the graph.

        Raises:
            RuntimeError: it cannot be captured. Nothing has run, and the device is usable as before.
        """

    def random_state(self) -> Tensor:
        """Of its generator, uint8, on the CPU."""

    def set_random_state(self, state: Tensor) -> None:
        """The inverse."""


class Cuda:
    """An NVIDIA GPU (or one of AMD, under torch's same names)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def describe(self) -> str:
        properties = torch.cuda.get_device_properties(self.device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"

    def of_rank(self, number: int) -> torch.device:
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        return device

    def group(self) -> dict[str, Any]:
        return {"backend": "nccl", "device_id": self.device}

    def tune_convolutions(self) -> None:
        torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def using(self, stream: torch.cuda.Stream) -> torch.cuda.StreamContext:
        return torch.cuda.stream(stream)

    def record(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def pinned(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def upload(self, pinned: Tensor) -> Tensor:
        return pinned.to(self.device, non_blocking=True)

    def capture(self, body: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        try:
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):  # the outer one undoes a failed end
                body()
        except RuntimeError:
            generator.graphsafe_set_state(
                generator.clone_state()
            )  # the old one would refuse to be used outside a graph
            raise
        return graph.replay

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)


_GPUS: dict[str, Callable[[torch.device], Gpu]] = {"cuda": Cuda}


def gpu_of(device: torch.device) -> Gpu | None:
    """What the device is asked by, if it is a GPU."""
    make = _GPUS.get(device.type)
    return None if make is None else make(device)


def pick_device(name: str) -> torch.device:
    """The device of --device; ValueError where cuda is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no GPU: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
