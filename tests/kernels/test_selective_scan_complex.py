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
from polymamba.kernels.selective_scan.triton_complex_numbers import decay_of  # noqa: E402


@triton.jit
def _decays(dt, A_im, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    re, im = decay_of(tl.load(dt + at, mask=inside, other=0.0), 0.0, tl.load(A_im + at, mask=inside, other=0.0))
    tl.store(out + 2 * at, re, mask=inside)
    tl.store(out + 2 * at + 1, im, mask=inside)


def test_an_angle_of_many_turns_keeps_its_digits(device_of):
    """exp(i x) of x in float32, near whole quarter turns and between them, to one unit of it."""
    angles = np.concatenate([np.linspace(-9, 9, 7201), np.pi / 2 * np.arange(-900, 900)])
    angles = np.concatenate([angles, np.random.default_rng(0).uniform(-6e3, 6e3, 20_000)])
    x = torch.tensor(angles, dtype=torch.float32, device=device_of("triton"))
    found = torch.empty(len(x), 2, device=x.device)
    _decays[(triton.cdiv(len(x), 4096),)](x, torch.ones_like(x), found, len(x), BLOCK=4096)
    exact = torch.stack((x.cpu().double().cos(), x.cpu().double().sin()), dim=-1)
    assert (found.cpu().double() - exact).abs().max() < 1.5e-7


def test_angles_over_a_long_memory(problem, results_of, cast, assert_close):
    """Frequencies as S4D's, and decays so slow that a state of hundreds of steps and turns ago still counts."""
    tensors = problem(length=300, channels=1, states=4, static="BC", absent="z D delta_bias", is_complex=True)
    tensors["A"] = torch.complex(torch.full((1, 4), -0.01), 4 * torch.pi * torch.arange(1, 5.0)[None]).to(
        torch.complex128
    )
    tensors["delta"] = 10 ** (tensors["delta"].sigmoid() * 2 - 3)  # 0.001 to 0.1
    single = cast(tensors, torch.float32)
    exact = {k: None if x is None else x.to(tensors[k].dtype) for k, x in single.items()}
    arguments = {"return_final_state": True}
    expected = results_of(selective_scan, exact, "torch", **arguments)
    assert_close(results_of(selective_scan, single, "triton", **arguments), expected, 1e-5)


def test_conjugates_as_pytorch_keeps_them(problem, device_of):
    """As a bit of a tensor, in inputs and, where the final state's conjugate is taken, in gradients."""
    device = device_of("triton")
    tensors = {k: x.to(device) for k, x in problem(length=6, is_complex=True).items()}
    tensors = {k: x.to(torch.complex64 if x.is_complex() else torch.float32) for k, x in tensors.items()}
    of_complex = [k for k, x in tensors.items() if x.is_complex()]
    found = {}
    for backend in ("torch", "triton"):
        leaves = {k: x.detach().requires_grad_() for k, x in tensors.items()}
        given = {k: x.conj() if k in of_complex else x for k, x in leaves.items()}
        y, final = selective_scan(**given, delta_softplus=True, return_final_state=True, backend=backend)
        loss = y.sum() + (final.conj() * final.mT.contiguous().mT * (1 + 2j)).imag.sum()
        found[backend] = torch.autograd.grad(loss, list(leaves.values()))
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_beside_complex_decay(problem, dtype, results_of, cast, assert_close):
    """u, delta, z and a real B in 16 bits: only the rounding of what is returned is left."""
    tensors = problem(batch=2, length=20, states=4, is_complex=True)
    tensors["B"] = tensors["B"].real.contiguous()
    mixed = {k: x.to(dtype if k in ("u", "delta", "z", "B") else x.dtype) for k, x in tensors.items()}
    single = {k: x if x.dtype == dtype else cast({k: x}, torch.float32)[k] for k, x in mixed.items()}
    arguments = {"delta_softplus": True, "return_final_state": True}
    actual = results_of(selective_scan, single, "triton", **arguments)
    assert all(actual[f"grad_{k}"].dtype == x.dtype for k, x in single.items())
    expected = results_of(selective_scan, cast(single, torch.float64), "torch", **arguments)
    assert_close(actual, expected, torch.finfo(dtype).eps)


def test_chunks_without_a_gradient_of_the_final_state(problem, device_of, monkeypatch, results_of, cast, assert_close):
    device_of("triton")
    monkeypatch.setattr(triton_complex, "CHUNK", 16)
    tensors = problem(length=50, channels=3, is_complex=True)
    tensors["C"] = tensors["C"].real.contiguous()
    expected = results_of(selective_scan, tensors, "torch", delta_softplus=True)
    actual = results_of(selective_scan, cast(tensors, torch.float32), "triton", delta_softplus=True)
    assert_close(actual, expected, 5e-6)


@pytest.mark.parametrize("real", ["B", "C", "BC"])
@pytest.mark.parametrize("static", ["", "BC"])
def test_complex_decay_of_real_matrices(problem, static, real, results_of, cast, assert_close):
    tensors = problem(batch=2, length=9, channels=6, groups=3, static=static, is_complex=True)
    tensors |= {name: tensors[name].real.contiguous() for name in real}
    arguments = {"delta_softplus": True, "return_final_state": True}
    expected = results_of(selective_scan, tensors, "reference", **arguments)
    assert_close(results_of(selective_scan, cast(tensors, torch.float32), "triton", **arguments), expected, 3e-6)


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_of_complex_decay(problem, data, results_of, cast, assert_close):
    groups = data.draw(st.integers(1, 2), label="groups")
    options = {
        "batch": data.draw(st.integers(1, 2), label="batch"),
        "length": data.draw(st.integers(1, 11), label="length"),
        "channels": groups * data.draw(st.integers(1, 35), label="channels of a group"),
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
    tensors = cast(problem(batch=3, length=21, channels=5, states=3, is_complex=True), torch.float32)
    arguments = {"delta_softplus": True, "return_final_state": True}
    weight = torch.randn(3, 21, 5), torch.randn(3, 5, 3, dtype=torch.complex64)
    together = results_of(selective_scan, tensors, "triton", weight, **arguments)
    again = results_of(selective_scan, tensors, "triton", weight, **arguments)
    assert all(torch.equal(x, again[name]) for name, x in together.items())
    constant = ("A", "D", "delta_bias")
    row = {name: x if name in constant else x[1:2] for name, x in tensors.items()}
    alone = results_of(selective_scan, row, "triton", tuple(w[1:2] for w in weight), **arguments)
    for name in ("y", "final_state", *(f"grad_{name}" for name in row if name not in constant)):
        assert torch.equal(together[name][1:2], alone[name]), name
