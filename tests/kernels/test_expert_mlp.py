"""ReLU experts as one operation, against a loop over them in float64."""

import pytest
import torch
from torch import Tensor

from polymamba.kernels.expert_mlp import expert_mlp

SIZES = [  # rows of each expert, rows of none, width, inner width
    ((5, 0, 131, 1), 0, 24, 40),
    ((0, 0, 7), 3, 8, 136),
    ((128, 129), 2, 72, 16),
    ((1,), 0, 8, 8),
    ((0, 0), 0, 16, 8),
]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(x: Tensor, w_in: Tensor, w_out: Tensor, counts: tuple[int, ...]) -> Tensor:
    rows = x[: sum(counts)].split(counts)
    return torch.cat([torch.relu(row @ a) @ b for row, a, b in zip(rows, w_in, w_out, strict=True)])


@pytest.mark.parametrize(("counts", "n_lost", "width", "inner"), SIZES)
def test_output_and_gradients(counts, n_lost, width, inner, device_of):
    device, n = device_of("triton"), sum(counts)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = (
        normal(n + n_lost, width, seed=1),
        normal(len(counts), width, inner, seed=2) / width**0.5,
        normal(len(counts), inner, width, seed=3) / inner**0.5,
    )
    tensors = tuple(t.to(dtype).double() for t in tensors)  # what the other sees as well
    ends = torch.tensor(counts).cumsum(0).to(device, torch.int32)
    dy = normal(n + n_lost, width, seed=4).to(dtype).double()
    leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
    y = expert_mlp(*leaves, ends)
    assert y.shape == (n + n_lost, width)
    torch.autograd.backward(y, dy.to(device, dtype))
    others = [t.clone().requires_grad_() for t in tensors]
    expected = by_loop(*others, counts)
    torch.autograd.backward(expected, dy[:n])
    pairs = [(y[:n], expected), *((a.grad, b.grad) for a, b in zip(leaves, others, strict=True))]
    for actual, wanted in pairs:
        actual, wanted = (t[:n] if t.shape[0] == n + n_lost else t for t in (actual.cpu().double(), wanted))
        scale = wanted.abs().max().clamp(min=1e-30) if wanted.numel() else 1
        assert ((actual - wanted).abs() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * scale).all()


def test_no_gradient_and_nan(device_of):
    """What passes the ReLU passes it in inference, too; a NaN is not lost."""
    device = device_of("triton")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, w_in, w_out = (normal(*shape, seed=5).to(device, dtype) for shape in ((9, 8), (2, 8, 16), (2, 16, 8)))
    ends = torch.tensor([4, 9], dtype=torch.int32, device=device)
    y = expert_mlp(x, w_in, w_out, ends)
    assert torch.equal(y, expert_mlp(x.clone().requires_grad_(), w_in, w_out, ends).detach())
    x[3, 0] = float("nan")
    broken = expert_mlp(x, w_in, w_out, ends)
    assert broken[3].isnan().all()
    assert torch.equal(broken[4:], y[4:])
