"""Lanes against numpy: moving them, their arithmetic, and the elementary functions against float64."""

import os
import subprocess
import sys

import numpy as np
import pytest

numba = pytest.importorskip("numba", exc_type=ImportError)

from polymamba.kernels import numba_lanes as lanes  # noqa: E402
from polymamba.kernels.numba_lanes import LANES  # noqa: E402

UNIT = np.finfo(np.float32).eps
NEGATIVE = -np.logspace(-8, np.log10(86.9), 20_001)
BOTH_SIGNS = np.concatenate((NEGATIVE, -NEGATIVE, [0.0]))


def apply(name: str, x) -> np.ndarray:
    function = getattr(lanes, name)

    @numba.njit
    def run(values, out):
        n = values.shape[1]
        for d in range(0, n, LANES):
            lanes.store(function(lanes.load(values, 0, d, n - d)), out, 0, d, n - d)

    values = np.asarray(x, np.float32)[None]
    out = np.full_like(values, np.nan)
    run(values, out)
    return out[0]


@pytest.mark.parametrize(
    ("name", "exact", "points"),
    [
        ("exp2", np.exp2, np.linspace(-125.9, 126.9, 50_001)),
        ("exp2", np.exp2, NEGATIVE),
        ("exp", np.exp, BOTH_SIGNS),
        ("silu", lambda x: x / (1 + np.exp(-x)), BOTH_SIGNS[:-1]),
        ("softplus", lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), BOTH_SIGNS),
    ],
)
def test_relative_error_of_a_few_units(name, exact, points):
    points = points.astype(np.float32)
    expected = exact(points.astype(np.float64))
    assert (np.abs(apply(name, points) - expected) / np.abs(expected)).max() < 3 * UNIT


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # at -inf, -1e4, 0, 1e4, nan
        ("exp2", [0, 0, 1, np.inf, np.nan]),
        ("exp", [0, 0, 1, np.exp(87), np.nan]),
        ("softplus", [0, 0, np.log(2), 1e4, np.nan]),
    ],
)
def test_at_the_ends_and_nan(name, expected):
    ours = apply(name, [-np.inf, -1e4, 0, 1e4, np.nan])
    if name == "exp2":  # without AVX-512 it ends at the greatest power of two
        expected[3] = ours[3]
        assert ours[3] >= 2.0**127
    assert np.allclose(ours, np.float32(expected), rtol=1e-6, atol=2e-38, equal_nan=True)


@pytest.mark.parametrize("count", [1, 5, LANES - 1, LANES, LANES + 3])
def test_a_part_of_the_lanes_is_moved(count):
    @numba.njit
    def run(source, out, count):
        x = lanes.load(source, 1, 3, count)
        lanes.store(x, out, 0, 0, LANES)
        lanes.prefetch(source, 1, 3)
        lanes.store(x * np.float32(2.0) - lanes.fill(np.float32(1.0)) / x, out, 1, 2, count)

    source = np.arange(1, 3 * 40 + 1, dtype=np.float32).reshape(3, 40)
    out = np.full((2, 40), -1, np.float32)
    run(source, out, count)
    moved = min(count, LANES)
    expected, values = np.full((2, 40), -1, np.float32), source[1, 3 : 3 + moved]
    expected[0, :LANES] = 0
    expected[0, :moved], expected[1, 2 : 2 + moved] = values, 2 * values - 1 / values
    assert np.allclose(out, expected, rtol=1e-6)


@pytest.mark.skipif("NUMBA_CPU_NAME" in os.environ or not lanes.AVX512, reason="for a CPU with AVX-512")
def test_without_avx512():
    """The tests above, compiled for a CPU whose vectors are half as long."""
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
