import pytest
import torch
import torch.nn.functional as F
from checks import DTYPES, assert_as_accurate, use_backend

from dino_kernels import info_nce, info_nce_reference


@pytest.fixture(params=["cpu", "triton"])
def device(request, monkeypatch):
    use_backend(monkeypatch, "dino_loss", request.param, ["scale"])
    return use_backend(monkeypatch, "info_nce", request.param, ["forward"])


def inputs(rows, outputs, channels, dtype=torch.float32, device="cpu"):
    """(query, positive, keys, labels)"""
    g = torch.Generator().manual_seed(rows * 1000 + outputs)
    sizes = (rows, rows, outputs)
    query, positive, keys = (F.normalize(torch.randn(n, channels, generator=g), dim=1).to(device, dtype) for n in sizes)
    return query, positive, keys, torch.randint(outputs, (rows,), generator=g).to(device)


def run(op, query, positive, keys, labels=None, upstream=1.0, **options):
    query = query.detach().clone().requires_grad_()
    loss = op(query, positive, keys, labels=labels, **options)
    (loss * upstream).backward()
    return loss.detach(), query.grad


@pytest.mark.parametrize("form", ["positive", "labels"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, outputs, channels",
    [
        (3, 1024, 128),
        (1, 5, 1),
        (70, 333, 37),
        (64, 64, 256),
        (130, 129, 16),
        (1, 1, 128),
        pytest.param(5, 9000, 32, marks=pytest.mark.slow),
    ],
)
def test_against_float64(device, dtype, rows, outputs, channels, form):
    query, positive, keys, labels = inputs(rows, outputs, channels, dtype, device)
    given = (positive, keys) if form == "positive" else (None, keys, labels)
    actual, eager = (run(op, query, *given) for op in (info_nce, info_nce_reference))
    wide = (x.double() if x is not None and x.is_floating_point() else x for x in given)
    exact = run(info_nce_reference, query.double(), *wide)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    for ours, theirs, truth in zip(actual, eager, exact, strict=True):
        assert ours.shape == truth.shape
        # Triton's interpreter cuts bfloat16 off where hardware rounds.
        assert_as_accurate(ours, theirs, truth, floor=2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


def test_the_reference_has_the_gradient_of_its_loss():
    query, positive, keys, labels = inputs(3, 7, 4, torch.float64)
    query.requires_grad_()
    torch.autograd.gradcheck(lambda q: info_nce_reference(q, positive, keys), query)
    torch.autograd.gradcheck(lambda q: info_nce_reference(q, None, keys, labels=labels, temp=0.7, scale=3.0), query)


def test_the_order_of_the_keys_does_not_matter(device):
    query, positive, keys, _ = inputs(9, 700, 32, device=device)
    expected = run(info_nce, query, positive, keys)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0)).to(device)
    for ours, theirs in zip(run(info_nce, query, positive, keys[order]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_labels_are_positives_that_the_keys_hold(device):
    query, positive, keys, _ = inputs(1, 200, 32, device=device)
    expected = run(info_nce, query, positive, keys)
    among = torch.cat([keys[:70], positive, keys[70:]])
    label = torch.tensor([70], device=device)
    for ours, theirs in zip(run(info_nce, query, None, among, label), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("upstream", [1.0, -1.7])
def test_temperature_scale_and_upstream_gradient(device, upstream):
    query, positive, keys, _ = inputs(5, 300, 32, device=device)
    exact = run(info_nce_reference, *(x.double() for x in (query, positive, keys)), None, upstream, temp=0.07, scale=3)
    for temp in (0.07, torch.tensor(0.07, device=device)):
        actual = run(info_nce, query, positive, keys, None, upstream, temp=temp, scale=3.0)
        for ours, truth in zip(actual, exact, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)


def test_logits_that_would_overflow_and_one_that_decides_all(device):
    query, positive, keys, _ = inputs(3, 300, 32, device=device)
    query = 1e4 * query
    loss, grad = run(info_nce, query, positive, keys)
    exact = run(info_nce_reference, *(x.double() for x in (query, positive, keys)))
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact[1], rtol=1e-3, atol=1e-4)
    loss, grad = run(info_nce, query, 2 * F.normalize(query, dim=1), keys)
    assert loss == 0 and not grad.any()


def test_repeats_bitwise(device):
    query, positive, keys, labels = inputs(70, 1000, 64, torch.bfloat16, device)
    for given in ((positive, keys), (None, keys, labels)):
        first, second = run(info_nce, query, *given), run(info_nce, query, *given)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same(threads):
    query, positive, keys, _ = inputs(70, 5000, 32)
    expected = run(info_nce, query, positive, keys)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual = run(info_nce, query, positive, keys)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_unaligned_keys_are_read_where_they_are():
    query, positive, keys, _ = inputs(3, 100, 16)
    expected = run(info_nce, query, positive, keys)
    shifted = torch.empty(100 * 16 + 1)[1:].view(100, 16).copy_(keys)
    assert all(torch.equal(a, b) for a, b in zip(run(info_nce, query, positive, shifted), expected, strict=True))


def test_only_the_query_gets_a_gradient_and_once():
    query, positive, keys, _ = (x.requires_grad_(x.is_floating_point()) for x in inputs(4, 9, 8))
    loss = info_nce(query, positive, keys)
    loss.backward(retain_graph=True)
    assert query.grad is not None and positive.grad is None and keys.grad is None
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    with torch.no_grad():
        assert torch.equal(info_nce(query, positive, keys), loss)


def test_nan_reaches_the_loss(device):
    for i in range(3):
        x = list(inputs(2, 300, 16, device=device))
        x[i][1, 5] = float("nan")
        assert info_nce(*x[:3]).isnan()


@pytest.mark.parametrize("form", ["positive", "labels"])
def test_opcheck_and_compile(device, form):
    query, positive, keys, labels = inputs(5, 65, 16, torch.float16, device)
    given = (positive, keys, None) if form == "positive" else (None, keys, labels)
    args = (query.clone().requires_grad_(), *given, torch.tensor(0.2, device=device), 1.5)
    torch.library.opcheck(torch.ops.dino_kernels.info_nce.default, args)

    def doubled(query, positive, keys, labels):
        return 2 * info_nce(query, positive, keys, labels=labels)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(run(compiled, query, *given), run(doubled, query, *given), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(2, 3, 4)}, "query must be a contiguous matrix.*got shape"),
        ({"query": torch.zeros(0, 4), "positive": torch.zeros(0, 4)}, "query must.*at least one row"),
        ({"query": torch.zeros(4, 2).t()}, "query must be a contiguous matrix"),
        ({"keys": torch.zeros(6, 4).half()}, "keys must.*of the dtype of query, .*float16.*query is torch.float32"),
        ({"keys": torch.zeros(0, 4)}, "keys must.*at least one row"),
        ({"keys": torch.zeros(6, 5)}, r"shapes \[R, D\] and \[K, D\] with 1 <= D <= 256, got \[2, 4\] and \[6, 5\]"),
        ({"positive": torch.zeros(3, 4)}, r"positive must have the shape of query \[2, 4\], got \[3, 4\]"),
        ({"positive": None}, "exactly one of positive and labels"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "exactly one of positive and labels"),
        ({"positive": None, "labels": torch.zeros(2)}, r"labels must have shape \[2\], dtype int64"),
        ({"positive": None, "labels": torch.tensor([0, 6])}, r"labels must be in \[0, 6\), got 0 to 6"),
        ({"positive": None, "labels": torch.tensor([-1, 0])}, r"labels must be in \[0, 6\), got -1 to 0"),
        ({"keys": torch.zeros(6, 4, device="meta")}, "on one device"),
        ({"temp": 0.0}, "temp must be > 0, got 0.0"),
        ({"temp": torch.ones(2)}, "temp must be a float or a 0-d tensor"),
    ],
)
def test_bad_input(change, message):
    x = {"query": torch.zeros(2, 4), "positive": torch.zeros(2, 4), "keys": torch.zeros(6, 4)}
    info_nce(**x)
    with pytest.raises(ValueError, match=message):
        info_nce(**{**x, **change})
