"""A head's product and the choice of the likeliest as one: on the CPU by the emulator, on a GPU at size."""

import math

import pytest
import torch

from polymamba.kernels import WayOut, likeliest, nvrtc
from polymamba.kernels.likeliest import cuda


@pytest.fixture
def on_the_cpu(monkeypatch, emulated):
    """A GPU of three multiprocessors, with room for a few tiles."""
    pytest.importorskip("triton")
    monkeypatch.setattr(nvrtc, "EMULATED", True)
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, device: emulated(source, name))
    monkeypatch.setattr(nvrtc, "processors", lambda device: 3)
    cuda._kernel.cache_clear()
    yield
    cuda._kernel.cache_clear()


def problem(rows, height, width, device="cpu"):
    """With ties, and among several rows some of which nothing can be said."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, width, generator=generator, device=device).bfloat16()
    weight = (torch.randn(height, width, generator=generator, device=device) * width**-0.5).bfloat16()
    weight[height // 2 :: 3] = weight[: len(weight[height // 2 :: 3])].clone()
    if rows > 1:
        x[rows // 2, width // 3] = math.nan
        x[0, width // 5] = math.inf
    return x, weight


def check(x, weight, places, bad):
    """Of each row the first of the largest, short of the order of sums; none where float64 has none."""
    logits = x.double() @ weight.double().T
    assert bad.tolist() == (~logits.isfinite().all(1)).tolist()
    found, top = logits.gather(1, places[:, None])[:, 0], logits.max(1).values
    for row in (~bad).nonzero()[:, 0].tolist():
        place = places[row].item()
        assert found[row] >= top[row] - top[row].abs() * 2**-7, f"row {row}: {found[row]} at {place}, not {top[row]}"
        first = (weight == weight[place]).all(1).nonzero()[0].item()
        assert place == first, f"row {row}: {place} ties with {first}"


@pytest.mark.parametrize(
    ("rows", "height", "width"), [(3, 257, 72), (64, 64, 64), (65, 400, 136), (130, 130, 64), (300, 200, 64)]
)
def test_emulated(rows, height, width, on_the_cpu):
    x, weight = problem(rows, height, width)
    assert cuda.serves(x, weight)
    check(x, weight, *likeliest(x, weight, backend="cuda"))


def test_handed_over(on_the_cpu):
    """Twice, of more sequences than a launch takes; the second time the ring's other row."""
    x, weight = problem(260, 64, 64)
    out = WayOut(torch.full((260,), -7), torch.full((2, 260), -7), torch.arange(260) % 2)
    for _ in range(2):
        places, bad = likeliest(x, weight, out, backend="cuda")
    told = torch.where(bad, -1, places)
    assert bad.any()
    assert out.own.equal(places)
    assert out.ring.equal(torch.stack((told, told)))
    assert out.turn.equal(torch.arange(260) % 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_by_the_product(dtype):
    """Where no kernel serves, and what is handed over then."""
    x, weight = (t.to(dtype) for t in problem(7, 100, 24))
    out = WayOut(torch.zeros(7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64), torch.full((7,), 2))
    places, bad = likeliest(x, weight, out)
    check(x, weight, places, bad)
    assert out.own.equal(places)
    assert out.ring[2].equal(torch.where(bad, -1, places))
    assert out.turn.tolist() == [0] * 7


def test_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"x is \(2, 3\) and weight \(5, 4\)"):
        likeliest(torch.zeros(2, 3), torch.zeros(5, 4))
    whole = WayOut(*(torch.zeros(*shape, dtype=torch.int64) for shape in ((3,), (2, 3), (3,))))
    likeliest(torch.zeros(3, 4), torch.zeros(5, 4), whole)
    for name, other in (("own", torch.zeros(3)), ("ring", whole.ring[:, :2]), ("turn", whole.turn[:1])):
        with pytest.raises(ValueError, match=f"{name} must be contiguous, int64"):
            likeliest(torch.zeros(3, 4), torch.zeros(5, 4), whole._replace(**{name: other}))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 17, 64, 65, 128, 200, 256, 300])
@pytest.mark.parametrize(("height", "width"), [(50288, 768), (257, 2048), (1000, 512), (50288, 2048)])
def test_at_size(rows, height, width):
    """Against float64; twice to the bit the same, and for a sequence alone as among others of its number."""
    x, weight = problem(rows, height, width, "cuda")
    assert cuda.serves(x, weight)
    places, bad = likeliest(x, weight)
    check(x, weight, places, bad)
    again, alone = likeliest(x, weight)[0], likeliest(x[-1:], weight)[0]
    assert again.equal(places)
    assert alone.equal(places[-1:])
