"""Products within the CPU kernels against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", exc_type=ImportError)

from polymamba.kernels import numba_products as products
from polymamba.kernels.numba_lanes import AVX512

pytestmark = pytest.mark.skipif(not AVX512, reason="for a CPU with AVX-512")


@settings(deadline=None)
@given(rows=st.integers(0, 30), depth=st.integers(1, 70), columns=st.integers(1, 200), seed=st.integers(0, 99))
def test_is_the_product(rows, depth, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, depth, generator=generator)
    a = torch.randn(rows + 2, depth + 3, generator=generator).numpy()
    panels = products.packed(weight)
    assert panels.ctypes.data % 64 == 0
    out = np.full((rows + 3, panels.shape[0] * panels.shape[2] + 5), np.nan, np.float32)
    products.multiply(a, rows, panels, out, 1)
    exact = a[:rows, :depth].astype(np.float64) @ weight.double().numpy().T
    scale = np.abs(a[:rows, :depth]).astype(np.float64) @ weight.double().abs().numpy().T
    assert np.all(np.abs(out[1 : 1 + rows, :columns] - exact) <= 1e-6 * scale)
    # Columns that the weight lacks are zeros; nothing else is written.
    assert np.all(out[1 : 1 + rows, columns:-5] == 0)
    assert np.isnan(out[0]).all()
    assert np.isnan(out[1 + rows :]).all()
    assert np.isnan(out[:, -5:]).all()


def test_a_row_does_not_depend_on_the_others():
    weight = torch.randn(100, 33)
    a = torch.randn(23, 33).numpy()
    panels = products.packed(weight)
    whole, single = (np.zeros((23, panels.shape[0] * panels.shape[2]), np.float32) for _ in range(2))
    products.multiply(a, 23, panels, whole, 0)
    for i in range(23):
        products.multiply(a[i : i + 1], 1, panels, single, i)
    assert np.array_equal(whole, single)
