"""ReLU experts as one operation, against a sum over single assignments in float64."""

import pytest
import torch
from torch import Tensor

from polymamba.kernels import sort_by_expert
from polymamba.kernels.expert_mlp import expert_mlp

SIZES = [  # assignments of each expert, of none, K, width, inner width
    ((5, 0, 131, 1), 0, 1, 24, 40),
    ((0, 0, 7), 3, 1, 8, 136),
    ((128, 129), 3, 2, 72, 16),
    ((10, 0, 25, 1), 0, 3, 16, 264),
    ((1,), 0, 1, 8, 8),
    ((0, 0), 4, 2, 16, 8),
    ((0, 0), 0, 1, 16, 8),
]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_assignment(x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, experts: Tensor) -> Tensor:
    """experts (T, K); the number of experts stands for none."""
    nothing = (0 * sum(t.sum() for t in (x, gates, w_in, w_out))).expand(x.shape[1])
    rows = [
        sum(
            (
                g * (torch.relu(row @ w_in[e]) @ w_out[e])
                for g, e in zip(gates_, experts_, strict=True)
                if e < len(w_in)
            ),
            nothing,
        )
        for row, gates_, experts_ in zip(x, gates, experts.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else nothing.expand_as(x)


@pytest.mark.parametrize(("counts", "n_lost", "top_k", "width", "inner"), SIZES)
def test_output_and_gradients(counts, n_lost, top_k, width, inner, device_of):
    device, n_experts = device_of("triton"), len(counts)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    experts = torch.arange(n_experts + 1).repeat_interleave(torch.tensor([*counts, n_lost]))
    experts = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))].view(-1, top_k)
    tensors = (
        normal(len(experts), width, seed=1),
        normal(len(experts), top_k, seed=5).sigmoid(),
        normal(n_experts, width, inner, seed=2) / width**0.5,
        normal(n_experts, inner, width, seed=3) / inner**0.5,
    )
    tensors = [t.to(torch.float32 if i == 1 else dtype).double() for i, t in enumerate(tensors)]  # what both see
    tensors[1][:1, :1] = 0  # a gate that has vanished
    dy = normal(len(experts), width, seed=4).to(dtype).double()
    leaves = [t.to(device, torch.float32 if i == 1 else dtype).requires_grad_() for i, t in enumerate(tensors)]
    order = sort_by_expert(experts.flatten().to(device), n_experts, backend="triton")
    y = expert_mlp(*leaves, order, some_lost=n_lost > 0)
    torch.autograd.backward(y, dy.to(device, dtype))
    others = [t.clone().requires_grad_() for t in tensors]
    expected = by_assignment(*others, experts)
    torch.autograd.backward(expected, dy)
    others[1].grad[:1, :1] = 0  # which its softmax multiplies by the gate
    for actual, wanted in [(y, expected), *((a.grad, b.grad) for a, b in zip(leaves, others, strict=True))]:
        actual = actual.cpu().double()
        assert actual.shape == wanted.shape
        scale = wanted.abs().max().clamp(min=1e-30) if wanted.numel() else 1
        assert ((actual - wanted).abs() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * scale).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_frozen_experts(top_k, device_of):
    """The other gradients are the same, to the bit, and those of the weights are not made."""
    device = device_of("triton")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, dy, w_in, w_out = (
        normal(*shape, seed=i).to(device, dtype) for i, shape in enumerate(((9, 8), (9, 8), (3, 8, 16), (3, 16, 8)))
    )
    gates = normal(9, top_k, seed=7).sigmoid().to(device, torch.float32)
    order = sort_by_expert(torch.arange(9 * top_k, device=device) % 3, 3, backend="triton")
    results = []
    for trained in (True, False):
        leaves = [t.clone().requires_grad_(trained or i < 2) for i, t in enumerate((x, gates, w_in, w_out))]
        expert_mlp(*leaves, order).backward(dy)
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*(found[:2] for found in results), strict=True))
    assert results[1][2:] == [None, None]


def test_no_gradient_and_nan(device_of):
    """What passes the ReLU passes it in inference, too; a NaN is not lost, and stays in its row."""
    device = device_of("triton")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, w_in, w_out = (normal(*shape, seed=5).to(device, dtype) for shape in ((9, 8), (2, 8, 16), (2, 16, 8)))
    order = sort_by_expert(torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1], device=device), 2, backend="triton")
    gates = torch.full((9, 1), 0.5, device=device)
    y = expert_mlp(x, gates, w_in, w_out, order)
    leaf = x.clone().requires_grad_()
    assert torch.equal(y, expert_mlp(leaf, gates, w_in, w_out, order).detach())
    x[3, 0] = float("nan")
    broken = expert_mlp(x, gates, w_in, w_out, order)
    assert broken[3].isnan().all()
    others = torch.arange(9, device=device) != 3
    assert torch.equal(broken[others], y[others])


def case(device: str) -> tuple[list[Tensor], object]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = ((9, 8), (9, 2), (3, 8, 16), (3, 16, 8))
    tensors = [normal(*shape, seed=6).to(device, dtype) for shape in shapes]
    tensors[1] = tensors[1].float().sigmoid()
    experts = torch.randint(4, (18,), generator=torch.Generator().manual_seed(0)).to(device)
    return [t.requires_grad_() for t in tensors], sort_by_expert(experts, 3, backend="triton")


@pytest.mark.slow
def test_operator(device_of):
    leaves, order = case(device_of("triton"))
    torch.library.opcheck(
        torch.ops.polymamba.expert_mlp.default,
        (*leaves, order.order, order.places, order.ends, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_as_one_graph(device_of):
    leaves, order = case(device_of("triton"))
    results = []
    for function in (expert_mlp, torch.compile(expert_mlp, fullgraph=True, backend="aot_eager")):
        y = function(*leaves, order, some_lost=True)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for eager, graph in zip(*results, strict=True):
        assert torch.equal(graph, eager)
