"""Sums of step sizes; a scan backwards against the gradient that autograd gives the initial state."""

import pytest
import torch

from polymamba.kernels import selective_scan
from polymamba.kernels.scan_steps import backward_scan_inputs, step_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]


def inputs(batch, length, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    # dy, delta, z; each a part of something wider, as in a block
    wide = torch.randn(batch, length, 3, channels, generator=generator).to(DEVICE, dtype)
    return *wide.unbind(2), torch.randn(channels, generator=generator).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 1, 3), (2, 37, 130), (1, 1030, 5)])
@pytest.mark.parametrize("softplus", [True, False])
def test_sums(backend, batch, length, channels, softplus):
    _, delta, _, bias = inputs(batch, length, channels)
    dt = delta.double() + bias.double()
    dt = torch.nn.functional.softplus(dt) if softplus else dt
    found = step_sums(delta, bias, softplus, backend=backend)
    assert (found - dt.sum(1)).abs().max() < 1e-4 * length**0.5
    assert (step_sums(delta, None, False, backend=backend) - delta.sum(1)).abs().max() < 1e-4 * length**0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("batch", "length", "channels"), [(1, 1, 3), (2, 37, 130)])
def test_backward_scan(backend, reverse, gated, batch, length, channels):
    """What the scan ends with, decayed by the step that it lacks, is the gradient of the initial state."""
    dy, delta, z, bias = inputs(batch, length, channels)
    z = z if gated else None
    A = -torch.rand(channels, 3, device=DEVICE) - 0.1
    B, C = torch.randn(2, batch, length, 3, device=DEVICE)
    state = torch.zeros(batch, channels, 3, device=DEVICE, requires_grad=True)
    options = {"delta_bias": bias, "delta_softplus": True}
    y = selective_scan(dy, delta, A, B, C, z=z, initial_state=state, reverse=reverse, **options)
    (truth,) = torch.autograd.grad(y, state, dy)
    u, moved = backward_scan_inputs(dy, delta, z, bias, True, reverse, backend=backend)
    _, end = selective_scan(u, moved, A, C, C, return_final_state=True, reverse=not reverse, **options)
    border = torch.nn.functional.softplus(delta[:, -1 if reverse else 0] + bias)
    found = end * torch.exp(border[..., None] * A)
    assert (found - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    dy, delta, z, bias = inputs(1, 40, 8, torch.bfloat16)
    found = backward_scan_inputs(dy, delta, z, bias, True, False, backend=backend)
    truth = backward_scan_inputs(dy.double(), delta.double(), z.double(), bias.double(), True, False, backend="torch")
    assert torch.equal(found[1][:, :-1].double(), truth[1][:, :-1])
    assert ((found[0] - truth[0])[:, :-1].abs() <= 2**-7 * truth[0][:, :-1].abs()).all()
