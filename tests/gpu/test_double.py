"""The test double of a GPU raises errors for wrong use of a GPU, and only for that."""

import numpy as np
import pytest
import torch
from double import Double, Misuse


@pytest.fixture
def gpu():
    with Double().installed() as gpu:
        yield gpu


def test_a_result_is_used_only_after_its_event(gpu):
    with gpu.using(gpu.stream()):
        x = torch.ones(3) + 1
        done = gpu.record()
        later = x * 2
    with pytest.raises(Misuse, match="add.* uses memory that stream 1 wrote, and waited for no event"):
        x + 1
    gpu.wait(done)
    assert (x + 1).sum() == 9
    with pytest.raises(Misuse, match="stream 1 wrote"):  # the event was recorded before that write
        later.add_(1)


def test_memory_is_not_written_while_it_is_read(gpu):
    x = torch.ones(3) + 1
    ready, side = gpu.record(), gpu.stream()
    with gpu.using(side):
        gpu.wait(ready)
        x.sum()
        done = gpu.record()
    x.sum()  # concurrent reads are allowed
    with pytest.raises(Misuse, match="mul_.* uses memory that stream 1 reads"):
        x.mul_(2)
    gpu.wait(done)
    x.mul_(2)


def test_work_that_the_host_waited_for_needs_no_event(gpu):
    with gpu.using(gpu.stream()):
        x = torch.ones(3) + 1
        done = gpu.record()
    done.synchronize()
    assert (x + 1)[0].item() == 3 and gpu.waits == ["aten._local_scalar_dense.default"]


def test_pinned_memory_does_not_change_before_its_copy_is_complete(gpu):
    memory = gpu.pinned(4)
    memory.zero_()
    gpu.upload(memory[:3])
    done = gpu.record()
    with pytest.raises(Misuse, match="no event after its last copy was synchronized"):
        gpu.upload(memory[:2])
    done.synchronize()
    gpu.upload(memory[:2])
    memory.numpy()[0] = 7  # like a thread of the loader, not through torch
    with pytest.raises(Misuse, match="pinned memory changed before its copy had completed"):
        gpu.record().synchronize()
    with pytest.raises(Misuse, match="not pinned"):
        gpu.upload(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, bool, np.asarray]
)
def test_a_capture_does_not_synchronize(gpu, read):
    x = torch.ones(1)
    with pytest.raises(Misuse, match="waits for the device in a capture"):
        gpu.capture(lambda: read(x * 2), gpu.stream())
    read(x * 2)  # the device can still be used


def test_a_capture_uses_no_host_values(gpu):
    with pytest.raises(Misuse, match="tensor hands the device values of the host in a capture"):
        gpu.capture(lambda: torch.tensor([1.0]), gpu.stream())


def test_a_capture_runs_nothing_and_its_replay_uses_the_same_memory(gpu):
    weights, draws = torch.nn.Parameter(torch.ones(3)), []
    inputs = torch.arange(3.0)

    def body():
        draws.append(torch.rand(3))
        loss = (weights * inputs).sum()
        (grad,) = torch.autograd.grad(loss, weights)
        weights.data.sub_(grad)
        draws.append(loss.detach())

    torch.manual_seed(1)
    replay = gpu.capture(body, gpu.stream())
    assert weights.tolist() == [1, 1, 1]
    replay()
    assert weights.tolist() == [1, 0, -1] and draws[1] == 3
    inputs.copy_(torch.ones(3))
    replay()
    assert weights.tolist() == [0, -1, -2] and draws[1] == 0
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(draws[0], torch.rand(3))  # the capture drew no random numbers; each replay draws new ones
    weights.data = torch.zeros(3)
    with pytest.raises(Misuse, match=r"a tensor \[3\] of a captured graph has moved"):
        replay()
