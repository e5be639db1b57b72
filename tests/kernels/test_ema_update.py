import pytest
import torch
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import ema_update_, ema_update_reference_

SHAPES = [(1,), (37,), (199, 3), (0,), (), (4096,), (5, 4097), (300, 507)]


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    return use_backend(monkeypatch, "ema_update", request.param, ["update"])


def lists(device="cpu", dtypes=(torch.float32,), shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    targets = [torch.randn(shape, generator=g).to(device) for shape in shapes]
    sources = [torch.randn(shape, generator=g).to(device, dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    return targets, sources


@pytest.mark.parametrize("momentum", [0.996, 0.5, 0.9999])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_against_float64(device, momentum, as_tensor):
    targets, sources = lists(device, DTYPES)
    eager = [t.clone() for t in targets]
    exact = [t.double() for t in targets]
    ema_update_reference_(eager, [s.float() for s in sources], momentum)
    ema_update_reference_(exact, [s.double() for s in sources], momentum)
    kept = [s.clone() for s in sources]
    m = torch.tensor(momentum, dtype=torch.float64, device=device) if as_tensor else momentum
    ema_update_(targets, sources, m)
    for ours, theirs, truth in zip(targets, eager, exact, strict=True):
        if truth.numel():
            assert_as_accurate(ours, theirs, truth, floor=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(kept, sources, strict=True))


def test_momentum_one_keeps_and_zero_copies(device):
    targets, sources = lists(device)
    before = [t.clone() for t in targets]
    ema_update_(targets, sources, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, targets, strict=True))
    ema_update_(targets, sources, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(sources, targets, strict=True))


def test_repeats_bitwise_and_never_writes_outside(device):
    base = torch.randn(1000, device=device)
    copies = [base.clone() for _ in range(2)]
    source = torch.randn(333, device=device)
    for copy in copies:
        ema_update_([copy[500:833]], [source], 0.9)  # a slice of a larger buffer
    assert torch.equal(*copies)
    assert torch.equal(copies[0][:500], base[:500]) and torch.equal(copies[0][833:], base[833:])
    assert not torch.equal(copies[0][500:833], base[500:833])


def test_follows_a_changed_list(device):
    """Each call must see the addresses and sizes of its own lists."""
    for size in (10, 5000, 20):
        targets, sources = lists(device, shapes=[(size,), (3,)])
        expected = [0.25 * t + 0.75 * s for t, s in zip(targets, sources, strict=True)]
        ema_update_(targets, sources, 0.25)
        for ours, truth in zip(targets, expected, strict=True):
            torch.testing.assert_close(ours, truth)


def test_parameters_and_empty_lists():
    linear, source = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.5 * linear.weight + 0.5 * source.weight
    ema_update_(linear.parameters(), source.parameters(), 0.5)
    torch.testing.assert_close(linear.weight, expected)
    assert linear.weight.requires_grad and linear.weight.grad_fn is None
    ema_update_([], [], 0.5)


def test_opcheck_and_compile(device):
    targets, sources = lists(device, shapes=[(5,), (7, 2)])
    momentum = torch.tensor(0.9, device=device)
    torch.library.opcheck(torch.ops.dino_kernels.ema_update_.default, (targets, sources, momentum))
    expected = [0.9 * t + 0.1 * s for t, s in zip(targets, sources, strict=True)]
    torch.compile(ema_update_, fullgraph=True, backend="aot_eager")(targets, sources, momentum)
    for ours, truth in zip(targets, expected, strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "targets, sources, momentum, message",
    [
        ([torch.zeros(2)], [], 0.5, "as many, got 1 and 0"),
        (
            [torch.zeros(2), torch.zeros(3)],
            [torch.zeros(2), torch.zeros(4)],
            0.5,
            r"targets\[1\] has shape \[3\]",
        ),
        (
            [torch.zeros(2)],
            [torch.zeros(2, device="meta")],
            0.5,
            r"targets\[0\] is on cpu, sources\[0\] on meta",
        ),
        ([torch.zeros(2).half()], [torch.zeros(2)], 0.5, r"targets\[0\] must be float32"),
        (
            [torch.zeros(2)],
            [torch.zeros(2).double()],
            0.5,
            r"sources\[0\] float32, float16 or bfloat16.*float64",
        ),
        (
            [torch.zeros(2, 3).T],
            [torch.zeros(3, 2)],
            0.5,
            r"targets\[0\] and sources\[0\] must be contiguous",
        ),
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, r"momentum must be in \[0, 1\], got 1.5"),
        ([torch.zeros(2)], [torch.zeros(2)], torch.zeros(2), "0-d tensor on cpu"),
    ],
)
def test_bad_input(targets, sources, momentum, message):
    with pytest.raises(ValueError, match=message):
        ema_update_(targets, sources, momentum)
