"""The Triton scan of complex A: decays, real B and C, any shape, a row and its batch. (Options: in the main file.)"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from polymamba.kernels import selective_scan  # noqa: E402
from polymamba.kernels.selective_scan import triton_complex  # noqa: E402
from polymamba.kernels.selective_scan.triton_complex_kernels import decay_of  # noqa: E402


@triton.jit
def _decays(dt, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    re, im = decay_of(tl.load(dt + at, mask=at < n, other=0.0), 0.0, 1.0)
    tl.store(out + 2 * at, re, mask=at < n)
    tl.store(out + 2 * at + 1, im, mask=at < n)


def test_an_angle_of_many_turns_keeps_its_digits(device_of):
    """exp(i pi / 2 q) of q quarter turns in float32, whole ones and halves among them, to one unit of it."""
    quarters = np.concatenate([np.linspace(-9, 9, 7201), np.random.default_rng(0).uniform(-4e3, 4e3, 20_000)])
    q = torch.tensor(quarters, dtype=torch.float32, device=device_of("triton"))
    found = torch.empty(len(q), 2, device=q.device)
    _decays[(triton.cdiv(len(q), 4096),)](q, found, len(q), BLOCK=4096)
    angle = q.cpu().double() % 4 * (np.pi / 2)
    assert (found.cpu().double() - torch.stack((angle.cos(), angle.sin()), dim=-1)).abs().max() < 1.5e-7


@pytest.mark.parametrize("real", ["B", "C", "BC"])
@pytest.mark.parametrize("static", ["", "BC"])
def test_complex_decay_of_real_matrices(problem, static, real, results_of, cast, assert_close):
    tensors = problem(batch=2, length=9, channels=6, groups=3, static=static, is_complex=True)
    tensors |= {name: tensors[name].real.contiguous() for name in real}
    arguments = {"delta_softplus": True, "return_final_state": True}
    expected = results_of(selective_scan, tensors, "reference", **arguments)
    assert_close(results_of(selective_scan, cast(tensors, torch.float32), "triton", **arguments), expected, 3e-6)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_of_complex_decay(problem, data, results_of, cast, assert_close):
    groups = data.draw(st.integers(1, 2), label="groups")
    options = {
        "batch": data.draw(st.integers(1, 2), label="batch"),
        "length": data.draw(st.integers(1, 20), label="length"),
        "channels": groups * data.draw(st.integers(1, 40), label="channels of a group"),
        "states": data.draw(st.integers(1, 9), label="states"),
        "groups": groups,
        "static": data.draw(st.sampled_from(["", "B", "C", "BC"])),
        "absent": data.draw(st.sampled_from(["", "z", "D z", "delta_bias initial_state"])),
    }
    tensors = problem(**options, is_complex=True)
    arguments = {"delta_softplus": True, "return_final_state": True, "reverse": data.draw(st.booleans())}
    expected = results_of(selective_scan, tensors, "torch", **arguments)
    actual = results_of(selective_scan, cast(tensors, torch.float32), "triton", **arguments)
    assert_close(actual, expected, 2e-5, options)


def test_a_row_of_complex_decay_does_not_feel_its_batch(problem, device_of, monkeypatch, results_of, cast):
    """And the same again gives the same bits, those of the sums over rows, too."""
    device_of("triton")
    monkeypatch.setattr(triton_complex, "CHUNK", 16)
    tensors = cast(problem(batch=3, length=37, channels=5, states=3, is_complex=True), torch.float32)
    arguments = {"delta_softplus": True, "return_final_state": True}
    weight = torch.randn(3, 37, 5), torch.randn(3, 5, 3, dtype=torch.complex64)
    together = results_of(selective_scan, tensors, "triton", weight, **arguments)
    again = results_of(selective_scan, tensors, "triton", weight, **arguments)
    assert all(torch.equal(x, again[name]) for name, x in together.items())
    constant = ("A", "D", "delta_bias")
    row = {name: x if name in constant else x[1:2] for name, x in tensors.items()}
    alone = results_of(selective_scan, row, "triton", tuple(w[1:2] for w in weight), **arguments)
    for name in ("y", "final_state", *(f"grad_{name}" for name in row if name not in constant)):
        assert torch.equal(together[name][1:2], alone[name]), name
