"""A head's product and the choice of the likeliest as one: on the CPU by the emulator, on a GPU at size."""

import math

import pytest
import torch

from polymamba.kernels import likeliest, nvrtc
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


def problem(rows, height, width):
    """With ties, and rows of which nothing can be said."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).bfloat16()
    weight = (torch.randn(height, width, generator=generator) * width**-0.5).bfloat16()
    weight[height // 2 :: 3] = weight[: len(weight[height // 2 :: 3])]
    x[rows // 2, width // 3] = math.nan
    x[0, width // 5] = math.inf
    return x, weight


def check(x, weight, places, bad):
    """Of each row the first of the largest, short of the order of sums; none where float64 has none."""
    logits = x.double() @ weight.double().T
    assert bad.tolist() == (~logits.isfinite().all(1)).tolist()
    for row in (~bad).nonzero()[:, 0].tolist():
        place, rounded = places[row].item(), logits[row].bfloat16()
        found, top = logits[row, place].item(), logits[row].max().item()
        assert found >= top - abs(top) * 2**-8, f"row {row}: {found} at {place}, the largest is {top}"
        equal = (weight[:place] == weight[place]).all(1)
        assert not equal.any(), f"row {row}: {place} ties with {equal.nonzero()[0].item()}"
        if (rounded == rounded.max()).sum() == 1 and (rounded.max() - rounded.topk(2).values[1]) > abs(top) * 2**-6:
            assert place == rounded.argmax().item()


@pytest.mark.parametrize(
    ("rows", "height", "width"), [(3, 257, 72), (64, 64, 64), (65, 400, 136), (130, 130, 64), (300, 200, 64)]
)
def test_emulated(rows, height, width, on_the_cpu):
    x, weight = problem(rows, height, width)
    assert cuda.serves(x, weight)
    check(x, weight, *likeliest(x, weight, backend="cuda"))
