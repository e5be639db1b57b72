"""All-reduce of gradients over the ranks, during the backward pass. With a single process, it does nothing."""

from torch import Tensor

from dino_kernels.nn import FlatParameters
from dino_train.common.parallel import Pending, size

BUCKETS = 4  # few large all-reduces: all but the last overlap with the backward


class GradientSum:
    """Sums a net's flat gradient over the ranks in a few large slices, each when the backward has computed it.

    Create a new one when the set of trained parameters changes.
    """

    def __init__(self, flat: FlatParameters) -> None:
        self.pending = Pending()
        self.slices: list[Tensor] = []
        self.members: list[int] = []  # parameters with a gradient in each slice
        self.missing: list[int] = []  # of these, not yet computed in this backward
        self._hooks: list = []
        if size() == 1:
            return
        whole, limit, begin = flat.offsets[-1], 0.0, 0
        for i, parameter in enumerate(flat.parameters.values()):
            if flat.offsets[i] >= limit:
                begin, limit = flat.offsets[i], limit + whole / BUCKETS
                self.slices.append(flat.grad[begin:])
                self.members.append(0)
            self.slices[-1] = flat.grad[begin : flat.offsets[i + 1]]
            if parameter.requires_grad:
                self.members[-1] += 1
                # The node and its hook run even if a layer wrote the gradient itself.
                view = parameter.expand_as(parameter)
                assert view.grad_fn is not None
                node = view.grad_fn.next_functions[0][0]
                assert node is not None
                self._hooks.append((node, node.register_hook(self._counter(len(self.members) - 1))))
        self.missing = [0] * len(self.members)

    def _counter(self, bucket: int):
        def count(*_: object) -> None:
            self.missing[bucket] -= 1
            if self.missing[bucket] == 0:
                self.pending.add(self.slices[bucket])

        return count

    def start(self) -> None:
        """Call before the last backward of a step, which completes the gradient."""
        self.missing = list(self.members)

    def wait(self) -> None:
        """Call after that backward: wait for the sums."""
        assert not any(self.missing), self.missing
        self.pending.wait()

    def remove(self) -> None:
        for _, hook in self._hooks:
            hook.remove()
