"""The interface between the trainer and a GPU.

    gpu = gpu_of(device)      # None on a CPU
    if gpu is not None:
        side = gpu.stream()
        with gpu.using(side):
            ...
            done = gpu.record()
        gpu.wait(done)

All GPU code of this package goes through `gpu_of` and does not call torch.cuda directly. Tests replace the entry in
`_GPUS` with a test double that runs on the CPU and checks the order of the calls: so they run this code without a GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Block the host until the work before the event is complete."""


class Gpu(Protocol):
    """A GPU as the trainer uses it; work is queued in the current stream."""

    def describe(self) -> str:
        """Its name and memory."""

    def memory(self) -> tuple[int, int]:
        """Bytes in all and free."""

    def of_rank(self, number: int) -> torch.device:
        """The device of the process with this local rank; it becomes the current device."""

    def group(self) -> dict[str, Any]:
        """Keyword arguments of torch.distributed.init_process_group; called on the device of this rank."""

    def tune_convolutions(self) -> None:
        """Choose the fastest deterministic convolution algorithms; shapes are the same in every step."""

    def stream(self) -> Any:
        """A new stream."""

    def using(self, stream: Any) -> AbstractContextManager[Any]:
        """Context in which `stream` is the current stream."""

    def record(self) -> Event:
        """An event at the current end of the current stream."""

    def wait(self, event: Any) -> None:
        """Work queued in the current stream from now on starts after the event."""

    def pinned(self, count: int) -> Tensor:
        """Pinned host memory for uploads, uint8 [count]."""

    def upload(self, pinned: Tensor) -> Tensor:
        """Asynchronous copy to the device: `pinned` must not change until an event recorded after it is complete."""

    def capture(self, body: Callable[[], None], stream: Any) -> Callable[[], None]:
        """Capture the work of `body` in a graph without running it; returns the function that replays the graph.

        Raises:
            RuntimeError: it cannot be captured. Nothing has run, and the device can still be used.
        """

    def random_state(self) -> Tensor:
        """State of the device's random generator, uint8, on the CPU."""

    def set_random_state(self, state: Tensor) -> None:
        """Set the state that `random_state` returned."""


class Cuda:
    """An NVIDIA GPU (or an AMD GPU, which torch also calls cuda)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def describe(self) -> str:
        properties = torch.cuda.get_device_properties(self.device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        return total, free

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
            # The outer context restores the stream if the capture fails.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                body()
        except RuntimeError:
            # After a failed capture, the old state cannot be used outside a graph.
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)


_GPUS: dict[str, Callable[[torch.device], Gpu]] = {"cuda": Cuda}


def gpu_of(device: torch.device) -> Gpu | None:
    """The interface to the device if it is a GPU, else None."""
    make = _GPUS.get(device.type)
    return None if make is None else make(device)


def pick_device(name: str) -> torch.device:
    """The device of --device; ValueError if cuda is requested but not available."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was requested, but torch sees no GPU: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
