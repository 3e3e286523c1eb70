"""A Mamba block's fused step: against float64, and against the block of single operators."""

from importlib import import_module

import pytest
import torch

from polymamba.kernels import MambaWeights, mamba_step

FAST = ["numba", "triton"]
CASES = {  # rows, width, inner width, states, rank, taps, LayerNorm, stream
    "one": (1, 33, 66, 16, 3, 4, False, True),
    "first block": (2, 24, 40, 5, 2, 3, False, False),
    "layer norm": (3, 40, 80, 5, 3, 4, True, True),
    "no memory in the convolution": (2, 17, 34, 1, 2, 1, False, True),
    "many rows": (5, 24, 48, 16, 2, 4, True, True),
}


def problem(n_rows, width, n_channels, n_states, rank, taps, centred, has_stream):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    weights = MambaWeights(
        norm=1 + normal(width, scale=0.1),
        norm_bias=normal(width) if centred else None,
        in_proj=normal(2 * n_channels, width, scale=width**-0.5),
        conv=normal(n_channels, taps, scale=0.5),
        conv_bias=normal(n_channels) if has_stream else None,
        x_proj=normal(rank + 2 * n_states, n_channels, scale=n_channels**-0.5),
        dt_proj=normal(n_channels, rank),
        dt_bias=normal(n_channels) - 4,
        A_log=torch.rand(n_channels, n_states, generator=generator, dtype=torch.float64) * 3,
        D=normal(n_channels),
        out_proj=normal(width, n_channels, scale=n_channels**-0.5),
    )
    stream = 1 + 2 * normal(n_rows, width) if has_stream else None
    states = normal(n_rows, n_channels, taps - 1), normal(n_rows, n_channels, n_states)
    return (normal(n_rows, width), stream, *states), weights, centred


def results(tensors, weights, centred, backend, dtype, device="cpu"):
    """Of two steps, so that what the first leaves in the states is read."""
    weights = MambaWeights(*(None if t is None else t.to(device, dtype) for t in weights))
    x, stream, conv, ssm = (None if t is None else t.to(device, dtype).clone() for t in tensors)
    if dtype == torch.bfloat16:
        stream, ssm = (None if t is None else t.float() for t in (stream, ssm))
    out, stream = mamba_step(x, stream, conv, ssm, weights, 1e-5, centred=centred, backend=backend)
    out, stream = mamba_step(out, stream, conv, ssm, weights, 1e-5, centred=centred, backend=backend)
    return {"out": out, "stream": stream, "conv": conv, "ssm": ssm}


def wide_programs(monkeypatch):
    """Let a program of Triton's have several rows of a weight, in pieces, as at size: one row each would take long."""
    few = import_module("polymamba.kernels.mamba_step.triton_few")
    monkeypatch.setattr(few, "PROGRAMS", 4)
    monkeypatch.setattr(few, "SMALLEST", 8)


@pytest.mark.parametrize("products", ["fused", "PyTorch's"])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, backend, products, monkeypatch, device_of, assert_close):
    device = device_of(backend)
    module = import_module(f"polymamba.kernels.mamba_step.{'cpu' if backend == 'numba' else backend}")
    limit = 10**9 if products == "fused" else 0
    if backend == "triton" and case != "one":
        wide_programs(monkeypatch)
    monkeypatch.setattr(module, *(("ALONE", limit) if backend == "numba" else ("FEW", limit)))
    args = problem(*CASES[case])
    expected = results(*args, "reference", torch.float64)
    actual = results(*args, backend, torch.float32, device)
    assert_close({name: x.cpu() for name, x in actual.items()}, expected, 3e-6, case)


@pytest.mark.parametrize("n_rows", [1, 2, 11])
@pytest.mark.parametrize("backend", FAST)
def test_bf16(backend, n_rows, monkeypatch, device_of, assert_close):
    """Weights in bf16, states and sums in float32: as far from float64 as the rounding of what is stored."""
    device = device_of(backend)
    if backend == "triton":
        wide_programs(monkeypatch)
        if n_rows > 8:  # not row by row
            monkeypatch.setattr(import_module("polymamba.kernels.mamba_step.triton"), "FEW", 0)
    tensors, weights, centred = problem(n_rows, *CASES["layer norm"][1:])
    tensors, weights = ([None if t is None else t.bfloat16().double() for t in ts] for ts in (tensors, weights))
    weights = MambaWeights(*weights)
    expected = results(tensors, weights, centred, "reference", torch.float64)
    actual = results(tensors, weights, centred, backend, torch.bfloat16, device)
    assert_close({name: x.cpu() for name, x in actual.items()}, expected, 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("n_rows", [1, 2, 3, 5, 6, 64])
@pytest.mark.parametrize("width", [768, 1792, 2048])
def test_at_size(n_rows, width, assert_close):
    args = problem(n_rows, width, 2 * width, 16, width // 16, 4, False, True)
    expected = results(*args, "reference", torch.float64, "cuda")
    actual = results(*args, "triton", torch.float32, "cuda")
    assert_close({k: x.cpu() for k, x in actual.items()}, {k: x.cpu() for k, x in expected.items()}, 2e-5)


def test_says_what_is_wrong():
    (x, stream, conv, ssm), weights, _ = problem(*CASES["one"])
    with pytest.raises(ValueError, match=r"out_proj has shape \(66, 33\); expected \(33, 66\)"):
        mamba_step(x, stream, conv, ssm, weights._replace(out_proj=weights.out_proj.T))
    with pytest.raises(ValueError, match=r"ssm_state has shape \(1, 66, 15\); expected \(1, 66, 16\)"):
        mamba_step(x, stream, conv, ssm[..., 1:], weights)
    with pytest.raises(ValueError, match=r"ssm_state has strides .* it must be contiguous"):
        mamba_step(x, stream, conv, ssm.mT.contiguous().mT, weights)
