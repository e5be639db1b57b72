"""A function of device tensors as one CUDA graph: one launch instead of thousands, and no Python between kernels."""

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from dino_train.common.device import Gpu

WARMUP = 3  # eager calls before the capture: they compile kernels, upload tables and allocate memory

logger = logging.getLogger(__name__)


class Graphed:
    """Calls `body(inputs) -> outputs`. The fourth call captures it in a graph, which is replayed from then on.

    If the capture fails, a warning gives the reason, and all calls run eagerly.

    body: depends on no host values but shapes, updates its state in place, and can be called again after an exception
        during the capture.
    Inputs must keep their shapes and dtypes. Outputs are copies that later calls do not overwrite.
    """

    def __init__(self, gpu: Gpu, body: Callable[[list[Tensor]], tuple[Tensor, ...]]) -> None:
        self.gpu, self.body, self.calls = gpu, body, 0
        self.stream = gpu.stream()  # for eager calls and the capture: the allocator keeps memory per stream
        self.replay: Callable[[], None] | None = None

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.calls += 1
        if self.calls == WARMUP + 1:
            self._capture(inputs)
        if self.replay is None:
            return self._eager(inputs)
        for i, (static, given) in enumerate(zip(self.inputs, inputs, strict=True)):
            if static.shape != given.shape or static.dtype != given.dtype:
                raise ValueError(
                    f"input {i} of a captured graph must have shape {list(static.shape)} and {static.dtype}, "
                    f"got {list(given.shape)} and {given.dtype}"
                )
            static.copy_(given)
        self.replay()
        return tuple(x.clone() for x in self.outputs)

    def _eager(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run `body` in the stream of the capture, which needs warm-up calls in the same stream."""
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
            logger.warning("steps run without a CUDA graph, because the capture failed: %s", error)
            self.inputs = []
