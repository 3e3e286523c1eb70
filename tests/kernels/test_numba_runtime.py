"""The elementary functions of the CPU kernels against float64."""

import numpy as np
import pytest

numba = pytest.importorskip("numba", exc_type=ImportError)

from polymamba.kernels import numba_runtime  # noqa: E402

UNIT = np.finfo(np.float32).eps
NEGATIVE = -np.logspace(-8, np.log10(87), 20_001)
BOTH_SIGNS = np.concatenate((NEGATIVE, -NEGATIVE, [0.0]))


def apply(name: str, x) -> np.ndarray:
    function = getattr(numba_runtime, name)

    @numba.njit
    def run(values):
        out = np.empty_like(values)
        for i in range(values.size):
            out[i] = function(values[i])
        return out

    return run(np.asarray(x, np.float32))


@pytest.mark.parametrize(
    ("name", "exact", "points"),
    [
        ("exp2", np.exp2, np.linspace(-126, 126.9, 50_001)),
        ("exp_negative", np.exp, NEGATIVE),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), BOTH_SIGNS),
        ("softplus", lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), BOTH_SIGNS),
    ],
)
def test_relative_error_of_a_few_units(name, exact, points):
    points = points.astype(np.float32)
    expected = exact(points.astype(np.float64))
    assert (np.abs(apply(name, points) - expected) / expected).max() < 3 * UNIT


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # at -inf, -1e4, 1e4, inf, nan
        ("exp2", [0, 0, 2.0**127, 2.0**127, np.nan]),
        ("sigmoid", [0, 0, 1, 1, np.nan]),
        ("softplus", [0, 0, 1e4, np.inf, np.nan]),
    ],
)
def test_at_the_ends_and_nan(name, expected):
    # What would underflow stays at the smallest normal numbers instead.
    ours = apply(name, [-np.inf, -1e4, 1e4, np.inf, np.nan])
    assert np.allclose(ours, np.float32(expected), rtol=0, atol=2e-38, equal_nan=True)
