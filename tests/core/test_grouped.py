"""The grouped matrix product against one product after another, in each of its ways."""

import pytest
import torch
from torch import Tensor

from polymamba.core import grouped
from polymamba.core.grouped import grouped_matmul

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def inputs(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def close(ours: Tensor, truth: Tensor, tolerance: float):
    assert ours.shape == truth.shape
    if truth.numel():
        assert (ours - truth).abs().max() <= tolerance * truth.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("by_loop", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("counts", [(3, 0, 7, 1), (0, 0, 0, 5), (0, 0, 0, 0), (11, 1, 0, 0)])
def test_grouped_matmul(dtype, counts, device, by_loop, monkeypatch):
    if by_loop:
        monkeypatch.setattr(grouped, "_in_one_call", lambda x: False)
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    x, weight = inputs(sum(counts) + 2, 16, dtype=dtype).to(device), inputs(4, 16, 8, dtype=dtype).to(device)
    dy, n = inputs(len(x), 8, dtype=dtype).to(device), sum(counts)
    ours, truth = ((x.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2))
    y = grouped_matmul(*ours, ends)
    y.backward(dy)
    expected = torch.cat([rows @ w for rows, w in zip(truth[0][:n].split(counts), truth[1], strict=True)])
    expected.backward(dy[:n])
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    close(y[:n], expected, tolerance)
    close(ours[0].grad[:n], truth[0].grad[:n], tolerance)
    close(ours[1].grad, truth[1].grad, tolerance)


def test_which_way():
    """float64 has no grouped GEMM in PyTorch; what a compiler sees has one in bf16 only."""
    for dtype, one_call in ((torch.float32, True), (torch.bfloat16, True), (torch.float64, False)):
        assert grouped._in_one_call(torch.zeros(1, dtype=dtype)) == one_call
    assert grouped.waits_for_host(torch.zeros(1, dtype=torch.bfloat16)), "on a CPU"


def test_operator():
    ends = torch.tensor([1, 1, 4], dtype=torch.int32)
    leaves = [inputs(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 16), (3, 16, 8))]
    torch.library.opcheck(grouped._by_loop, (*leaves, ends))
