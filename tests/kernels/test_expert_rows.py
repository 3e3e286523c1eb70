"""Who takes a token, the sort by expert, and rows there and back: each backend against loops over single rows."""

import pytest
import torch
from torch import Tensor

from polymamba.kernels import combine, dispatch, route, sort_by_expert

BACKENDS = ["torch", "triton"]
SIZES = [(37, 5, 1, 24), (300, 33, 3, 70), (1, 1, 1, 1), (5, 4, 4, 4100), (0, 3, 2, 8)]  # tokens, experts, K, width


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str = ""):
    assert actual.shape == expected.shape, name
    if not expected.numel():
        return
    error = (actual.detach().cpu().double() - expected.detach()).abs()
    scale = expected.abs().max().clamp(min=1e-30)
    assert error.max() <= tolerance * scale, f"{name}: {error.max() / scale:.1e} at {error.argmax().item()}"


def choices(n: int, n_experts: int, seed: int = 0) -> Tensor:
    """n_experts: of none."""
    return torch.randint(0, n_experts + 1, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k", "width"), SIZES)
def test_route(n_tokens, n_experts, top_k, width, normalised, backend, device_of):
    x, weight = normal(n_tokens, width), normal(n_experts, width, seed=2) / width**0.5
    cotangents = normal(n_tokens, width), *(normal(n_tokens, n, seed=n) for n in (n_experts, n_experts, top_k))
    results = []
    for run in (True, False):
        dtype, device = (torch.float32, device_of(backend)) if run else (torch.float64, "cpu")
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
        if run:
            same_x, logits, p, gates, experts = route(*leaves, top_k, backend=backend)
            assert experts.dtype == torch.int64
            assert not experts.requires_grad
        else:
            same_x = leaves[0]
            logits = same_x @ leaves[1].T
            p = logits.exp() / logits.exp().sum(1, keepdim=True)
            experts = p.argsort(dim=1, descending=True)[:, :top_k]
            gates = p.gather(1, experts)
        if normalised:
            gates = gates / gates.sum(1, keepdim=True)
        outputs = same_x, logits, p, gates
        sum((y * c.to(device, dtype)).sum() for y, c in zip(outputs, cotangents, strict=True)).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves), experts])
    for ours, truth, name in zip(*results, ("x", "logits", "p", "gates", "dx", "dweight", "experts"), strict=True):
        close(ours, truth, 3e-6, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_route_in_bfloat16_loses_no_digit_of_the_gradient(backend, device_of):
    """Logits in float32, from the inputs as they are; gradients as exact as the dtype that they come in."""
    x, weight, cotangent = normal(150, 48).bfloat16(), normal(7, 48, seed=2).bfloat16() / 4, normal(150, 7, seed=3)
    truth = [t.double().requires_grad_() for t in (x, weight)]
    logits = truth[0] @ truth[1].T
    (logits.softmax(1) * cotangent).sum().backward()
    ours = [t.to(device_of(backend)).requires_grad_() for t in (x, weight)]
    _, found, p, *_ = route(*ours, 2, backend=backend)
    assert found.dtype == p.dtype == torch.float32
    close(found, logits, 1e-6)
    (p * cotangent.to(p)).sum().backward()
    digits = 0.008 if x.device == ours[0].device else 0.004  # Triton's interpreter cuts off where a GPU rounds
    for a, b in zip(ours, truth, strict=True):
        assert a.grad.dtype == torch.bfloat16
        error = (a.grad.cpu().double() - b.grad).abs()
        assert torch.all(error <= digits * b.grad.abs() + 2e-5 * b.grad.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["x", "logits", "probabilities", "gates"])
def test_gradients_of_one_output_of_route(used, backend, device_of):
    results = []
    for name in (backend, "reference"):
        leaves = [t.float().to(device_of(name)).requires_grad_() for t in (normal(9, 8), normal(5, 8, seed=2))]
        outputs = dict(zip(("x", "logits", "probabilities", "gates"), route(*leaves, 2, backend=name), strict=False))
        outputs[used].square().sum(0).sum().backward()  # an expanded gradient
        # Of x alone, the weight's is none or 0.
        results.append([torch.zeros_like(leaf).cpu() if leaf.grad is None else leaf.grad.cpu() for leaf in leaves])
    for ours, truth in zip(*results, strict=True):
        close(ours, truth.double(), 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_nan_and_of_equal_logits_are_routed_somewhere(backend, device_of):
    x = torch.ones(3, 8, device=device_of(backend))
    x[1] = torch.nan
    *_, gates, experts = route(x, torch.ones(5, 8, device=x.device), 1, backend=backend)
    assert experts.min() >= 0
    assert experts.max() < 5
    assert gates.isnan().flatten().tolist() == [False, True, False]
    close(gates[::2], torch.full((2, 1), 0.2).double(), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "n_experts"), [(0, 3), (1, 1), (129, 4), (700, 32), (150, 300), (300, 1100)])
def test_sort_by_expert(n, n_experts, backend, device_of, monkeypatch):
    experts = choices(n, n_experts)
    order = sort_by_expert(experts.to(device_of(backend)), n_experts, backend=backend)
    expected = sorted(range(n), key=lambda i: experts[i].item())
    assert order.order.tolist() == expected
    assert [order.places[i].item() for i in expected] == list(range(n))
    assert order.counts.tolist() == [(experts == e).sum().item() for e in range(n_experts)]
    assert order.ends.tolist() == [(experts <= e).sum().item() for e in range(n_experts)]


@pytest.mark.parametrize("n", [16_384, 100_001])
@pytest.mark.parametrize("n_experts", [8, 32, 128])
def test_sort_at_size(n, n_experts, device_of):
    device = device_of("triton")
    if device == "cpu":
        n //= 50  # in the interpreter
    experts = choices(n, n_experts)
    ours = sort_by_expert(experts.to(device), n_experts, backend="triton")
    for a, b in zip(ours, sort_by_expert(experts, n_experts, backend="reference"), strict=True):
        assert torch.equal(a.cpu().long(), b.long())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("some_lost", [False, True])
@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k", "width"), SIZES)
def test_there_and_back(n_tokens, n_experts, top_k, width, some_lost, backend, device_of):
    """Each assignment's row times a number of its expert; those without an expert come out as NaN, both ways."""
    experts = choices(n_tokens * top_k, n_experts if some_lost else n_experts - 1)
    of_expert = torch.cat((normal(n_experts, seed=5), torch.zeros(1).double()))
    x, gates, cotangent = normal(n_tokens, width), normal(n_tokens, top_k, seed=2), normal(n_tokens, width, seed=3)
    leaves = [t.clone().requires_grad_() for t in (x, gates)]
    truth = torch.zeros(n_tokens, width).double()
    for k in range(top_k):
        truth = truth + leaves[0] * (leaves[1][:, k] * of_expert[experts.view(n_tokens, top_k)[:, k]])[:, None]
    truth.backward(cotangent)

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, factors):
            ctx.save_for_backward(factors)
            return torch.where(factors == 0, torch.nan, rows * factors)

        @staticmethod
        def backward(ctx, dy):
            return Undefined.apply(dy, *ctx.saved_tensors), None

    device = device_of(backend)
    ours = [t.float().to(device).requires_grad_() for t in (x, gates)]
    order = sort_by_expert(experts.to(device), n_experts, backend=backend)
    factors = of_expert[experts].float().to(device)[order.order.long()][:, None]
    rows = Undefined.apply(dispatch(ours[0], order, top_k, some_lost=some_lost, backend=backend), factors)
    y = combine(rows, ours[1], order, some_lost=some_lost, backend=backend)
    y.backward(cotangent.to(y))
    for name, a, b in (("y", y, truth), *(("grad", a.grad, b.grad) for a, b in zip(ours, leaves, strict=True))):
        close(a, b, 2e-6, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_half_precision_and_views(backend, device_of):
    """Gates stay in float32; some columns of a wider matrix, an expanded gradient."""
    device = device_of(backend)
    experts = choices(2 * 41, 3).to(device)
    order = sort_by_expert(experts, 4, backend=backend)
    wide = normal(41, 40).bfloat16().to(device)
    x, gates = wide[:, 3:27].requires_grad_(), normal(41, 2).float().to(device).requires_grad_()
    y = combine(dispatch(x, order, 2, backend=backend), gates, order, backend=backend)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert gates.grad.dtype == torch.float32
    truth = wide[:, 3:27].cpu().double()
    close(y, truth * gates.detach().cpu().double().sum(1, keepdim=True), 0.02)
    close(x.grad, gates.detach().cpu().double().sum(1, keepdim=True).expand(-1, 24), 0.02)
    close(gates.grad, truth.sum(1, keepdim=True).expand(-1, 2), 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_operators(backend, device_of):
    device, operators = device_of(backend), torch.ops.polymamba
    x, weight = (t.float().to(device).requires_grad_() for t in (normal(9, 8), normal(5, 8, seed=2)))
    gates = normal(9, 2).float().to(device).requires_grad_()
    experts = choices(18, 5).to(device)
    order = sort_by_expert(experts, 5, backend=backend)
    if backend == "triton":  # in PyTorch it is no operator
        torch.library.opcheck(operators.route.default, (x, weight, 2, backend))
    torch.library.opcheck(operators.sort_by_expert.default, (experts, 5, backend))
    torch.library.opcheck(operators.dispatch.default, (x, order.order, order.places, order.ends[-1:], 2, backend))
    rows = dispatch(x, order, 2, backend=backend).detach().requires_grad_()
    torch.library.opcheck(operators.combine.default, (rows, gates, order.order, order.places, None, backend))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_compiles_as_one_graph(backend, device_of):
    device = device_of(backend)

    def layer(x, weight):
        x, _, p, gates, experts = route(x, weight, 2, backend=backend)
        order = sort_by_expert(experts.flatten(), 5, backend=backend)
        rows = dispatch(x, order, 2, backend=backend).square()
        return combine(rows, gates, order, backend=backend), p.sum(0) * order.counts

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    weight = normal(5, 8, seed=2).float().to(device)
    for n_tokens in (7, 11):
        results = []
        for function in (layer, compiled):
            leaves = [normal(n_tokens, 8).float().to(device).requires_grad_(), weight.clone().requires_grad_()]
            outputs = function(*leaves)
            sum(y.square().sum() for y in outputs).backward()
            results.append((*outputs, *(leaf.grad for leaf in leaves)))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-6)
