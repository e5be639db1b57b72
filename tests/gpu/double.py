"""A test double of the trainer's GPU: it runs on the CPU, and raises errors for races and unwanted synchronization.

    with Double().installed() as gpu:
        pretrain(config)
    python tests/gpu/double.py pretrain --data photos ...     the command line with it

While it is installed, `dino_train` treats the CPU as a GPU. Work is executed immediately, but its order is checked as
if streams ran concurrently, with vector clocks of streams and host over every operation that torch dispatches. Errors:

- Memory that another stream wrote, or still reads, is used without waiting for an event of that stream.
- Pinned memory changes before an event after its upload was synchronized, or the uploaded memory is not pinned.
- During a capture, the host waits for the device or passes values to it. A capture changes nothing; its replay repeats
  the operations on the same memory, and is an error if a tensor has moved.

Not modelled: freed memory that the allocator gives to another stream, and threads other than the training thread.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Clock = dict[int, int]  # for each stream, the number of its operations that have happened before

_READS = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__array__,
}  # they wait for a GPU, but are not dispatched
_UPLOADS = {torch.tensor, torch.as_tensor, torch.from_numpy}
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
_REPEAT = torch.ops.aten.repeat_interleave.Tensor  # waits for the length of its result, if not given
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "detach")


class Misuse(AssertionError):
    """An operation that on a GPU would be a race, an error or an unwanted wait."""


def _merge(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


class _Stream:
    def __init__(self, number: int) -> None:
        self.number, self.clock = number, Clock({number: 0})


class _Event:
    def __init__(self, gpu: "Double", clock: Clock) -> None:
        self.gpu, self.clock = gpu, clock

    def synchronize(self) -> None:
        self.gpu._host_knows(self.clock)


class _Use:
    """The last accesses to a storage: (stream, number of its operation)."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = StorageWeakRef(storage)
        self.written: tuple[int, int] | None = None
        self.read: Clock = {}


class _Captured:
    """Operations of a capture, and the memory that existed before."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.made: dict[int, StorageWeakRef] = {}  # storages created in it
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # bytes of changed storages, and their old values
        self.addresses: dict[int, tuple[Tensor, int]] = {}


class Double(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.streams = [_Stream(0)]
        self.current, self.host = self.streams[0], Clock()
        self.uses: dict[int, _Use] = {}
        self.pins: dict[int, Tensor] = {}
        self.uploads: dict[int, tuple[Tensor, Tensor, tuple[int, int]]] = {}
        self.captured: _Captured | None = None
        self.waits: list[str] = []  # operations for which the host waited
        self.captures = self.replays = 0

    @contextmanager
    def installed(self) -> Iterator["Double"]:
        from dino_train.common import device
        from dino_train.data import loader

        crop = loader.multicrop_packed

        def multicrop_packed(pixels: Tensor, places: Any, crops: Any, out: list[Tensor], *, scale: Any) -> None:
            with torch._C.DisableTorchFunction():
                crop(pixels, places, crops, out, scale=scale)  # not seen by the dispatcher
            self._use("multicrop_packed", [pixels], out)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(device._GPUS, {"cpu": lambda _: self}))
            stack.enter_context(mock.patch("dino_kernels._core.device.GPU_TYPES", {"cpu"}))
            stack.enter_context(mock.patch.object(loader, "multicrop_packed", multicrop_packed))
            stack.enter_context(self)
            stack.enter_context(_HostCalls(self))
            yield self

    # --- the interface dino_train.common.device.Gpu --------------------------------------------------------------

    def describe(self) -> str:
        return "a double of a GPU, 0 GiB"

    def memory(self) -> tuple[int, int]:
        return 64 << 30, 64 << 30

    def of_rank(self, number: int) -> torch.device:
        return torch.device("cpu")

    def group(self) -> dict[str, Any]:
        return {"backend": "gloo"}

    def tune_convolutions(self) -> None:
        pass

    def stream(self) -> _Stream:
        self.streams.append(_Stream(len(self.streams)))
        return self.streams[-1]

    @contextmanager
    def using(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self) -> _Event:
        return _Event(self, dict(self.current.clock))

    def wait(self, event: _Event) -> None:
        _merge(self.current.clock, event.clock)

    def pinned(self, count: int) -> Tensor:
        memory = torch.empty(count, dtype=torch.uint8)
        self.pins[memory.untyped_storage()._cdata] = memory
        return memory

    def is_pinned(self, memory: Tensor) -> bool:
        return memory.untyped_storage()._cdata in self.pins

    def upload(self, pinned: Tensor) -> Tensor:
        key = pinned.untyped_storage()._cdata
        if not self.is_pinned(pinned):
            raise Misuse("an upload of memory that is not pinned waits for the device")
        if key in self.uploads:
            raise Misuse("pinned memory is uploaded again, but no event after its last copy was synchronized")
        copy = pinned.clone()
        with _disable_current_modes():
            self.uploads[key] = pinned, copy.clone(), (self.current.number, self.current.clock[self.current.number])
        return copy

    def capture(self, body: Callable[[], None], stream: _Stream) -> Callable[[], None]:
        self._wait("a capture's begin")
        random, self.captured = torch.get_rng_state(), _Captured()
        captured = self.captured
        try:
            with self.using(stream):
                body()
        finally:
            self.captured = None
            with _disable_current_modes():
                for memory, values in captured.before.values():
                    memory.copy_(values)
            torch.set_rng_state(random)
        self.captures += 1
        return lambda: self._replay(captured)

    def random_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    # --- the rules ---------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in _WAITS or (func is _REPEAT and kwargs.get("output_size") is None):
            self._wait(str(func))
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if views or name in _ALLOCATIONS:
            out = func(*args, **kwargs)
            if self.captured:
                self._made(out, args)
            return out
        reads, writes = _touched(func, args, kwargs)
        if self.captured:
            self._keep(writes)
        out = func(*args, **kwargs)
        if self.captured:
            self._made(out, args)
            self._record(func, args, kwargs, out)
        else:
            self._use(str(func), reads, writes + [x for x in tree_leaves(out) if isinstance(x, Tensor)])
        return out

    def _use(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """An operation in the current stream."""
        stream, clock = self.current.number, self.current.clock
        _merge(clock, self.host)
        clock[stream] += 1
        now = clock[stream]
        reads, writes = ([x for x in part if not self.is_pinned(x)] for part in (reads, writes))  # see `upload`
        for tensor in reads:
            use = self._use_of(tensor)
            self._after(name, use.written, "wrote")
            use.read[stream] = now
        for tensor in writes:
            use = self._use_of(tensor)
            self._after(name, use.written, "wrote")
            for other in use.read.items():
                self._after(name, other, "reads")
            use.written, use.read = (stream, now), {}

    def _after(self, name: str, point: tuple[int, int] | None, did: str) -> None:
        if point and self.current.clock.get(point[0], 0) < point[1]:
            raise Misuse(
                f"{name} in stream {self.current.number} uses memory that stream {point[0]} {did}, "
                "and waited for no event after that"
            )

    def _use_of(self, tensor: Tensor) -> _Use:
        storage = tensor.untyped_storage()
        use = self.uses.get(storage._cdata)
        if use is None or use.storage.expired():
            if len(self.uses) > 20000:
                self.uses = {key: use for key, use in self.uses.items() if not use.storage.expired()}
            use = self.uses[storage._cdata] = _Use(storage)
        return use

    def _wait(self, name: str) -> None:
        """The host waits for all work queued so far in the current stream."""
        if self.captured:
            raise Misuse(f"{name} waits for the device in a capture")
        self.waits.append(name)
        self._host_knows(self.current.clock)

    def _host_knows(self, clock: Clock) -> None:
        _merge(self.host, clock)
        for key, (pinned, copy, (stream, count)) in list(self.uploads.items()):
            if self.host.get(stream, 0) >= count:
                with _disable_current_modes():
                    same = torch.equal(pinned, copy)
                if not same:
                    raise Misuse("pinned memory changed before its copy had completed")
                del self.uploads[key]

    # --- captures ----------------------------------------------------------------------------------------

    def _made(self, out: Any, args: tuple) -> None:
        assert self.captured
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in given:
                self.captured.made[key] = StorageWeakRef(tensor.untyped_storage())

    def _keep(self, writes: list[Tensor]) -> None:
        """Save the values of memory that existed before the capture."""
        assert self.captured
        for tensor in writes:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.captured.made and storage._cdata not in self.captured.before:
                with _disable_current_modes():
                    memory = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self.captured.before[storage._cdata] = memory, memory.clone()

    def _record(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        assert self.captured
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.captured.addresses.setdefault(id(tensor), (tensor, tensor.data_ptr()))
        self.captured.operations.append((func, args, kwargs, out))

    def _replay(self, captured: _Captured) -> None:
        self.replays += 1
        for tensor, address in captured.addresses.values():
            if tensor.data_ptr() != address:
                raise Misuse(f"a tensor {list(tensor.shape)} of a captured graph has moved since the capture")
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in captured.operations:
                values = func(*args, **kwargs)
                for to, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
                    if isinstance(to, Tensor) and to.data_ptr() != value.data_ptr():
                        to.copy_(value)


class _HostCalls(TorchFunctionMode):
    """Calls in which the host reads or passes values, and which torch does not dispatch on a CPU."""

    def __init__(self, gpu: Double) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READS and not self.gpu.is_pinned(args[0]):
            self.gpu._wait(func.__name__)
        elif func in _UPLOADS and self.gpu.captured:
            raise Misuse(f"{func.__name__} hands the device values of the host in a capture")
        return func(*args, **(kwargs or {}))


def _touched(func: Any, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that an operation reads, and tensors that it writes."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    parameters = func._schema.arguments
    for i, parameter in enumerate(parameters):
        value = args[i] if i < len(args) else kwargs.get(parameter.name)
        into = writes if parameter.alias_info and parameter.alias_info.is_write else reads
        into += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return reads, writes


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_api"))
    from dino_train.cli import main as command_line

    with Double().installed():
        return command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
