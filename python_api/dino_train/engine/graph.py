"""A function of device tensors as one CUDA graph: one launch in place of thousands, and no Python between kernels."""

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from dino_train.common.device import Gpu

WARMUP = 3  # calls that run plainly first: kernels compile, tables are uploaded, memory finds its size

logger = logging.getLogger(__name__)


class Graphed:
    """Calls `body(inputs) -> outputs`, from the fourth call on as a graph captured then.

    Where the capture fails, a warning says why, and calls stay plain.

    body: uses nothing of the host but shapes, keeps what it changes in the same memory, and may be called again after
        it was left by an exception in a capture.
    Inputs must keep their shapes and dtypes. Outputs are the caller's own.
    """

    def __init__(self, gpu: Gpu, body: Callable[[list[Tensor]], tuple[Tensor, ...]]) -> None:
        self.gpu, self.body, self.calls = gpu, body, 0
        self.stream = gpu.stream()  # of all plain calls and of the capture: each stream has memory of its own
        self.replay: Callable[[], None] | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.calls == WARMUP + 1:
            self._capture(inputs)
        if self.replay is None:
            return self._plainly(inputs)
        for i, (mine, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if mine.shape != given.shape or mine.dtype != given.dtype:
                raise ValueError(
                    f"input {i} of a captured graph must have shape {list(mine.shape)} and {mine.dtype}, "
                    f"got {list(given.shape)} and {given.dtype}"
                )
            mine.copy_(given)
        self.replay()
        return tuple(x.clone() for x in self.outputs)

    def _plainly(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """In the stream of the capture, which asks for calls in it before."""
        ready = self.gpu.record()
        with self.gpu.using(self.stream):
            self.gpu.wait(ready)
            outputs = self.body(list(inputs))
            done = self.gpu.record()
        self.gpu.wait(done)
        return outputs

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]

        def body() -> None:
            self.outputs = self.body(self.inputs)

        try:
            self.replay = self.gpu.capture(body, self.stream)
        except RuntimeError as error:
            logger.warning("steps run without a CUDA graph, since the capture failed: %s", error)
            self.inputs = []
