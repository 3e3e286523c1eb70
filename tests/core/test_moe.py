"""The mixture of experts against its formula, token by token in float64; padding, capacity, auxiliary losses, sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polymamba.core import Backbone, BackboneConfig, MoE, MoEConfig, aux_loss, parameter_counts
from polymamba.core import moe as moe_module
from polymamba.core.padding import Padding
from polymamba.kernels.expert_rows import interface as expert_rows

EXPERTS = ["relu", "gelu", "swiglu"]


def layer(d_model: int = 16, **options) -> MoE:
    torch.manual_seed(0)
    module = MoE(d_model, MoEConfig(**{"n_experts": 5, "d_expert": 24, **options}))
    nn.init.normal_(module.router.weight, std=0.5)  # sure enough of itself that the gates differ
    return module


def inputs(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def close(ours: Tensor, truth: Tensor, tolerance: float = 2e-5):
    assert ours.shape == truth.shape
    if not truth.numel():
        return
    error = (ours.double() - truth.double()).abs()
    scale = truth.double().abs().max().clamp(min=1e-30)
    assert error.max() <= tolerance * scale, f"{error.max() / scale:.2e} at {error.argmax().item()}"


# A token by itself


def of_token(module: MoE, x: Tensor) -> Tensor:
    """x (D,) -> (D,), by the formula."""
    p = torch.softmax(module.router.weight @ x, 0)
    y = torch.zeros_like(x)
    chosen = p.argsort(descending=True)[: module.config.top_k]
    if module.config.normalise:
        p = p / sum(p[e] for e in chosen)
    for e in chosen:
        inner = x @ module.in_proj.weight[e]
        if module.config.expert == "swiglu":
            gate, up = inner.chunk(2)
            inner = gate * torch.sigmoid(gate) * up
        else:
            inner = {"relu": torch.relu, "gelu": F.gelu}[module.config.expert](inner)
        y = y + p[e] * (inner @ module.out_proj.weight[e])
    return y


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize(("top_k", "normalise"), [(1, False), (2, False), (2, True), (5, False)])
def test_is_its_formula(expert, top_k, normalise):
    module, x = layer(expert=expert, top_k=top_k, normalise=normalise).double(), inputs(3, 7, 16, dtype=torch.float64)
    weights, gradients = inputs(3, 7, 16, dtype=torch.float64) + 1, []
    for run in (module, lambda x: torch.stack([of_token(module, row) for row in x.flatten(0, 1)]).view(x.shape)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (y * weights).sum().backward()
        gradients.append([y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for ours, truth in zip(*gradients, strict=True):
        close(ours, truth, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_row_alone_batch_and_steps_agree(batch, top_k):
    module, x = layer(top_k=top_k, capacity_factor=0.5).eval(), inputs(batch, 11, 16)
    y, state = module(x, return_state=True)
    close(module.train().step(x[:, 0], state), y[:, 0], 2e-6)  # a step never drops
    module.eval()
    close(torch.cat([module(row[None]) for row in x]), y, 2e-6)
    close(torch.stack([module.step(x[:, t], state) for t in range(11)], 1), y, 2e-6)
    close(module(x.flatten(0, 1)[None]).view(x.shape), y, 2e-6)


@torch.no_grad()
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_gathered_matrices_are_the_sorted_ones(expert, top_k):
    """The way of a GPU's small steps."""
    module, x = layer(expert=expert, top_k=top_k), inputs(7, 16)
    close(module._gathered(x), module(x[None])[0], 2e-6)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [3, 5, 70])  # few tokens gather matrices, many are sorted where that needs no host
def test_steps_in_a_cuda_graph(batch, dtype):
    module, x = layer(expert="swiglu").to("cuda", dtype), inputs(batch, 16, dtype=dtype).cuda()
    state, given = module.init_state(batch), x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        module.step(given, state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module.step(given, state)
    for other in (x, x.flip(0)):  # other experts get other numbers of tokens
        given.copy_(other)
        graph.replay()
        close(y, module(other[None])[0], 2e-5 if dtype == torch.float32 else 2e-2)


# What else a batch may hold


class Poisoned(torch.autograd.Function):
    """x with NaN in the rows from `end` on, and the same in its gradient."""

    @staticmethod
    def forward(ctx, x, end):
        ctx.end = int(end)
        return torch.cat((x[: ctx.end], torch.full_like(x[ctx.end :], torch.nan)))

    @staticmethod
    def backward(ctx, dy):
        return Poisoned.apply(dy, ctx.end), None


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity_factor", [None, 0.7])
def test_padding_neither_routes_nor_counts(capacity_factor, top_k, monkeypatch):
    """And nothing of what a grouped product leaves undefined comes through."""
    product = moe_module.grouped_matmul
    monkeypatch.setattr(
        moe_module,
        "grouped_matmul",
        lambda x, weight, ends: Poisoned.apply(product(Poisoned.apply(x, ends[-1]), weight, ends), ends[-1]),
    )
    module = layer(capacity_factor=capacity_factor, z_weight=0.1, top_k=top_k)
    mask = torch.tensor([[False, True, True, True, False], [True] * 5, [False] * 5])
    x, weights, results = inputs(3, 5, 16), inputs(8, 16), []
    for padded in (True, False):
        module.zero_grad()
        leaf = (x.masked_fill(~mask[..., None], 1e4) if padded else x[mask][None]).clone().requires_grad_()
        y = module.forward_padded(leaf, Padding.of(mask)) if padded else module(leaf)
        if padded:
            assert torch.all(y[~mask] == 0)
            y = y[mask]
        ((y * weights).sum() + aux_loss(module)).backward()
        assert leaf.grad.isfinite().all()
        gradient = leaf.grad[mask] if padded else leaf.grad[0]
        results.append([y.view(8, 16), aux_loss(module), gradient, *(p.grad.clone() for p in module.parameters())])
    for padded, alone in zip(*results, strict=True):
        close(padded, alone, 2e-6)


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize(("top_k", "capacity_factor"), [(1, None), (2, 0.7)])
def test_kernels_of_a_gpu_are_the_same_layer(expert, top_k, capacity_factor, monkeypatch):
    """With padding, a capacity and both losses; in Triton's interpreter."""
    pytest.importorskip("triton")
    module = layer(expert=expert, top_k=top_k, capacity_factor=capacity_factor, z_weight=0.1)
    mask = torch.arange(9) < torch.tensor([[9], [0], [5]])
    x, results = inputs(3, 9, 16), []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(expert_rows, "_backend", lambda *_, backend=backend: backend)
        monkeypatch.setattr(moe_module, "fuses_experts", lambda _, backend=backend: backend == "triton")
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        y = module.forward_padded(leaf, Padding.of(mask))
        (y.square().sum() + aux_loss(module)).backward()
        results.append([y, aux_loss(module), leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for plain, kernels in zip(*results, strict=True):
        close(kernels, plain, 3e-6)


def test_nothing_but_padding():
    module = layer(capacity_factor=1.0, z_weight=0.1)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    y = module.forward_padded(inputs(2, 3, 16), Padding.of(mask))
    (y.sum() + aux_loss(module)).backward()
    assert torch.all(y == 0)
    assert aux_loss(module) == 0
    assert all(torch.all(p.grad == 0) for p in module.parameters())


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 4),
    st.floats(0.05, 3),
)
@settings(max_examples=60, deadline=None)
def test_capacity_keeps_the_first(experts, n_experts, factor):
    experts = [min(e, n_experts) for e in experts]  # n_experts: none
    capacity = factor * len(experts) / n_experts
    given = torch.tensor(experts)
    ours = moe_module.within_capacity(given, moe_module.sort_by_expert(given, n_experts), capacity)
    seen, expected = [0] * (n_experts + 1), []
    for e in experts:
        seen[e] += 1
        expected.append(e if seen[e] <= int(capacity) else n_experts)
    assert ours.tolist() == expected


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_is_float32_under_autocast_and_experts_are_not(top_k):
    module, x, seen = layer(top_k=top_k), inputs(2, 9, 16), []
    module.router.register_forward_hook(lambda *args: seen.append(args[-1]))
    module.in_proj.register_forward_hook(lambda *args: seen.append(args[-1]))
    truth = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        step = module.step(x[:, 0], module.init_state(2))
    assert seen[2].logits.dtype == torch.float32
    assert torch.equal(seen[2].logits, seen[0].logits)
    assert seen[3].dtype == y.dtype == step.dtype == torch.bfloat16
    close(y, truth, 0.03)
    close(step, truth[:, 0], 0.03)
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


# The auxiliary loss


def test_balance_is_one_where_all_experts_get_as_much():
    module = layer(balance_weight=1.0, n_experts=16, d_expert=8)
    with torch.no_grad():
        module.router.weight.copy_(10 * torch.eye(16))
    module(torch.eye(16).repeat(3, 1)[None])
    close(aux_loss(module), torch.tensor(1.0), 1e-6)
    module(torch.eye(16)[:1].expand(48, 16)[None])  # all to one: E times its probability, here nearly 1
    assert 15.9 < aux_loss(module) < 16


def test_no_loss_outside_training():
    module, x = layer(z_weight=0.1), inputs(2, 5, 16)
    module(x)
    assert aux_loss(module) > 0
    module.eval()(x)
    assert aux_loss(module) == 0
    module.train()
    with torch.no_grad():
        module(x)
    assert aux_loss(module) == 0
    assert aux_loss(MoE(16, MoEConfig(balance_weight=0))) == 0


def test_copies_after_a_forward():
    module, x = layer(), inputs(1, 5, 16)
    module(x)
    twin = copy.deepcopy(module)
    assert aux_loss(twin) == 0
    assert aux_loss(module) > 0
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("pattern", [("mamba", "moe"), ("mamba+moe",)])
def test_loss_of_a_backbone_is_that_of_each_layer_once(pattern, gradient_checkpointing):
    """In value and in gradient, against the formula applied to what the routers say."""
    torch.manual_seed(0)
    moe = MoEConfig(n_experts=4, balance_weight=0.5, z_weight=0.01)
    model, x = Backbone(BackboneConfig(d_model=16, n_layer=4, pattern=pattern, moe=moe)), inputs(2, 13, 16)
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    assert len(routers) == (2 if pattern == ("mamba", "moe") else 4)
    routes = []
    hooks = [router.register_forward_hook(lambda *args: routes.append(args[-1])) for router in routers]
    model(x)
    truth = 0
    for r in routes:
        share = F.one_hot(r.experts[:, 0], 4).double().mean(0)
        truth = truth + 0.5 * 4 * (share * r.probabilities.mean(0)).sum()
        truth = truth + 0.01 * r.logits.exp().sum(-1).log().square().mean()
    expected = torch.autograd.grad(truth, [router.weight for router in routers])
    for hook in hooks:
        hook.remove()
    model.gradient_checkpointing = gradient_checkpointing
    model(x)
    close(aux_loss(model), truth, 1e-6)
    aux_loss(model).backward()
    for router, gradient in zip(routers, expected, strict=True):
        close(router.weight.grad, gradient, 1e-6)


def test_checkpoint_of_the_layer_alone():
    module, x = layer(), inputs(2, 9, 16).requires_grad_()
    gradients = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        module.zero_grad()
        y = run(x)
        (y.sum() + aux_loss(module)).backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# Sizes


PUBLISHED = {  # arXiv 2401.04081, tables 2 and 9, millions: total, active; without embedding and head
    "Mamba25M": (BackboneConfig(d_model=512, n_layer=16), 27, 27),
    "Mamba100M": (BackboneConfig(d_model=768, n_layer=32), 121, 121),
}
for _name, _d, _n, _total, _active in (("25M", 512, 16, 542, 26), ("100M", 768, 32, 2439, 117)):
    _config = BackboneConfig(d_model=_d, n_layer=_n, pattern=("mamba", "moe"))
    PUBLISHED[f"MoE-Mamba{_name}"] = (_config, _total, _active)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    config, *published = PUBLISHED[name]
    with torch.device("meta"):
        counts = parameter_counts(Backbone(config))
    assert [int(n / 1e6 + 0.5) for n in counts] == published


def test_active_parameters_are_those_that_a_token_reaches():
    module = layer(top_k=2, expert="swiglu")
    module(inputs(1, 1, 16)).sum().backward()
    reached = [module.router.weight.numel()]
    reached += [
        (p.grad.abs().sum((1, 2)) > 0).sum() * p[0].numel() for p in (module.in_proj.weight, module.out_proj.weight)
    ]
    total, active = parameter_counts(module)
    assert total == sum(p.numel() for p in module.parameters())
    assert active == int(sum(reached))
    router = module.router.weight.numel()
    of_one = (total - router) // 5
    assert [parameter_counts(module, n)[1] - router for n in (1, 2, 3, 9)] == [
        2 * of_one,
        4 * of_one,
        *[5 * of_one] * 2,
    ]


def test_initialisation():
    torch.manual_seed(0)
    module = MoE(256, MoEConfig(n_experts=4))
    for weight, fan_in in ((module.router.weight, 256), (module.in_proj.weight, 256), (module.out_proj.weight, 768)):
        std = (0.1 / fan_in) ** 0.5
        assert weight.abs().max() <= 2 * std + 1e-7
        assert 0.8 * std < weight.std() < 0.95 * std  # what a cut at 2 deviations leaves: 0.88


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("top_k is 9; it must be between 1 and n_experts, which is 8", {"top_k": 9, "n_experts": 8}),
        ("top_k is 0; it must be between 1 and n_experts", {"top_k": 0}),
        ("n_experts is 0; it must be at least 1", {"n_experts": 0}),
        ("normalise is set with top_k 1: its one weight would always be 1", {"normalise": True}),
        ("expert is 'silu'; it must be one of relu, gelu, swiglu", {"expert": "silu"}),
        ("capacity_factor is 0; it must be above 0 and finite, or None", {"capacity_factor": 0}),
        ("balance_weight is -1; it must be a number of at least 0", {"balance_weight": -1}),
        ("z_weight is nan; it must be", {"z_weight": float("nan")}),
    ],
)
def test_says_what_is_wrong(message, options):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**options)


@pytest.mark.parametrize(("d_model", "options"), [(20, {}), (16, {"d_expert": 12}), (16, {"d_expert": 0})])
def test_says_which_sizes_can_be_taken(d_model, options):
    for make in (
        lambda: MoE(d_model, MoEConfig(**options)),
        lambda: BackboneConfig(d_model=d_model, n_layer=2, pattern=("mamba+moe",), moe=MoEConfig(**options)),
    ):
        with pytest.raises(ValueError, match="must be a multiple of 8: the grouped matrix product"):
            make()
