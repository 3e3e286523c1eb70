"""A mixture of experts by token choice (Switch Transformer, arXiv 2101.03961; in MoE-Mamba, arXiv 2401.04081).

    logits = router(x);  p = softmax(logits)                     in float32, over all E experts
    out    = sum over the top_k experts e of x:  p_e expert_e(x)           with `normalise`, of p_e / their sum
    expert_e(x) = act(x in_e) out_e;  for swiglu  (silu(x gate_e) * (x up_e)) out_e,  in_e = (gate_e, up_e)

and, in training, the auxiliary loss of a layer, which `core.aux_loss` collects:

    balance = E sum_e f_e P_e    f_e  share of the tokens that chose e, before any are dropped (they sum to top_k)
                                 P_e  mean of p_e over all tokens
    z       = mean of logsumexp(logits)^2                        ST-MoE, arXiv 2202.08906

No token is dropped, unless a capacity is set, and then in training only: so a token's result depends on no other token,
and a batch, a row alone and a step by step run agree. Padding neither routes nor counts.

The tokens are sorted by expert, and each projection is one grouped matrix product; on a GPU ReLU experts in bf16 are
one operation, and a step of few tokens gathers the matrices of its experts instead. The gradient of a permutation is
the inverse permutation: nothing is added in an order that may vary. Letters: T tokens, K = top_k, E experts, D d_model,
F inner width of an expert.
"""

import math
from functools import reduce
from operator import add
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Order, combine, dispatch, route, sort_by_expert
from ..kernels.expert_mlp import expert_mlp, fuses_experts
from .autocast import autocast_dtype
from .config import MoEConfig
from .expert_parallel import own_experts, through_experts
from .grouped import grouped_matmul, waits_for_host
from .mlp import NoState
from .padding import Padding
from .sharded import is_part

ACTIVATIONS = {"relu": torch.relu_, "gelu": F.gelu}  # in place where the result tells the gradient


class Routes(NamedTuple):
    """Where each token goes."""

    x: Tensor  # (T, D): the tokens; to read these is to let `route` add up their gradient
    logits: Tensor  # (T, E), float32
    probabilities: Tensor  # (T, E), their softmax
    gates: Tensor  # (T, K): the probabilities of the chosen ones, largest first; normalised, if that is asked for
    experts: Tensor  # (T, K) int64


class Router(nn.Module):
    """(T, D) -> Routes, in float32 at least, whatever autocast says."""

    def __init__(self, d_model: int, n_experts: int, top_k: int, normalise: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.top_k, self.normalise = top_k, normalise

    def forward(self, x: Tensor) -> Routes:
        x, logits, probabilities, gates, experts = route(x, self.weight, self.top_k)
        if self.normalise:
            gates = gates / gates.sum(-1, keepdim=True)
        return Routes(x, logits, probabilities, gates, experts)


class ExpertLinear(nn.Module):
    """A bias-free linear map for each expert, weight (E, in, out)."""

    def __init__(self, n_experts: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_in, n_out))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (A, in), sorted by expert, expert e's ending at ends[e] -> (A, out). Of spread experts: those here."""
        return grouped_matmul(x, own_experts(self.weight).to(x.dtype), ends)

    def gathered(self, x: Tensor, experts: Tensor) -> Tensor:
        """x (A, in), experts (A,) -> (A, out). For few rows, and no gradients: that of an indexed weight is as large
        as all of them."""
        return torch.bmm(x[:, None], self.weight[experts].to(x.dtype))[:, 0]


class MoE(nn.Module):
    """(.., d_model) -> (.., d_model). Raises ValueError for widths that `MoEConfig.width` refuses."""

    projects_input = False  # the router reads it in float32

    def __init__(self, d_model: int, config: MoEConfig | None = None):
        super().__init__()
        self.config = c = config or MoEConfig()
        width = c.width(d_model)
        self.router = Router(d_model, c.n_experts, c.top_k, c.normalise)
        self.in_proj = ExpertLinear(c.n_experts, d_model, 2 * width if c.expert == "swiglu" else width)
        self.out_proj = ExpertLinear(c.n_experts, width, d_model)
        self.aux_loss: Tensor | None = None  # of the last forward in training, read by core.aux_loss
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, scale: float = 0.1) -> None:
        """Switch Transformer's (section 2.4): all weights from a normal of variance 0.1 / fan-in, cut at 2 deviations.

        The small scale keeps the router near indifference, and so the load near balance, when training begins.
        """
        d_model, width = self.in_proj.weight.shape[1], self.out_proj.weight.shape[1]
        weights = ((self.router.weight, d_model), (self.in_proj.weight, d_model), (self.out_proj.weight, width))
        for weight, fan_in in weights:
            std = math.sqrt(scale / fan_in)
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    @property
    def experts(self) -> tuple[ExpertLinear, ExpertLinear]:
        """What has a weight for each expert: `spread_experts` divides these among processes."""
        return self.in_proj, self.out_proj

    def forward(
        self,
        hidden: Tensor,
        state: NoState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,  # nothing to do: tokens do not see each other
    ) -> Tensor | tuple[Tensor, NoState]:
        """hidden (B, L, d_model) -> the same shape, or (that, the empty state) iff return_state."""
        y = self._mixed(hidden.flatten(0, 1), None, self.training).view(hidden.shape)
        return (y, ()) if return_state else y

    def forward_padded(
        self, hidden: Tensor, padding: Padding, *, state: NoState | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, NoState]:
        """`forward` of rows that hold padding, which no expert sees; it comes out as 0."""
        real = padding.real(hidden.shape[1]).flatten()
        y = self._mixed(hidden.flatten(0, 1), real, self.training).view(hidden.shape)
        return (y, ()) if return_state else y

    def step(self, hidden: Tensor, state: NoState) -> Tensor:
        """hidden (B, d_model) -> (B, d_model)."""
        # To gather is to copy matrices: no gain on a CPU, nor for more assignments than experts. But sorted ones may
        # have to wait for the host, which a CUDA graph cannot.
        spread = is_part(self.in_proj.weight)
        few = len(hidden) * self.config.top_k <= self.config.n_experts
        if not spread and hidden.device.type != "cpu" and (few or waits_for_host(_as_autocast(hidden))):
            return self._gathered(hidden)
        return self._mixed(hidden, None, training=False)

    def init_state(self, batch_size: int, max_length: int | None = None) -> NoState:
        return ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "aux_loss": None}  # a copy has had no forward; and no graph of autograd can be copied

    def _mixed(self, x: Tensor, real: Tensor | None, training: bool) -> Tensor:
        """x (T, D), real bool (T,) -> (T, D). In training with an auxiliary loss, and within the capacity."""
        c = self.config
        routes = self.router(x)
        experts = routes.experts.flatten()
        if real is not None:
            experts = torch.where(real.repeat_interleave(c.top_k), experts, c.n_experts)
        n_tokens = len(x) if real is None else real.sum()
        order = sort_by_expert(experts, c.n_experts)
        weighted = training and torch.is_grad_enabled() and (c.balance_weight or c.z_weight)
        self.aux_loss = self._auxiliary(routes, order.counts, real, n_tokens) if weighted else None
        factor = c.capacity_factor if training else None
        if factor is not None:
            experts = within_capacity(experts, order, n_tokens * factor * c.top_k / c.n_experts)
            order = sort_by_expert(experts, c.n_experts)
        some_lost = factor is not None or real is not None
        x, weight = _as_autocast(routes.x), cast(Any, self.in_proj.weight)
        if not is_part(weight):
            return self._of_experts(x, routes.gates, order, some_lost)
        rows = dispatch(x, order, c.top_k, some_lost=some_lost)
        rows = through_experts(self._of_experts, rows, order.counts, weight.device_mesh.get_group())
        return combine(rows, routes.gates, order, some_lost=some_lost)

    def _of_experts(self, x: Tensor, gates: Tensor, order: Order, some_lost: bool = False) -> Tensor:
        """x (T, D), gates (T, K) -> (T, D): each token's sum of what its experts, which are here, make of it."""
        if self.config.expert == "relu" and fuses_experts(x):
            w_in, w_out = (own_experts(linear.weight).to(x.dtype) for linear in self.experts)
            return expert_mlp(x, gates, w_in, w_out, order, some_lost=some_lost)
        # What belongs to no expert comes out of the grouped products undefined, and so does its gradient: both end
        # in `combine` and `dispatch`.
        rows = dispatch(x, order, gates.shape[1], some_lost=some_lost)
        rows = self.out_proj(self._activated(self.in_proj(rows, order.ends)), order.ends)
        return combine(rows, gates, order, some_lost=some_lost)

    def _gathered(self, x: Tensor) -> Tensor:
        """The same for few tokens, and no gradients."""
        routes = self.router(x)
        experts = routes.experts.flatten()
        rows = _as_autocast(x).repeat_interleave(self.config.top_k, 0)
        y = self.out_proj.gathered(self._activated(self.in_proj.gathered(rows, experts)), experts)
        y = y.unflatten(0, routes.gates.shape) * routes.gates[..., None].to(y.dtype)
        return y[:, 0] if self.config.top_k == 1 else y.sum(1)

    def _activated(self, inner: Tensor) -> Tensor:
        if self.config.expert == "swiglu":
            gate, up = inner.chunk(2, dim=-1)
            return F.silu(gate) * up
        return ACTIVATIONS[self.config.expert](inner)

    def _auxiliary(self, routes: Routes, counts: Tensor, real: Tensor | None, n_tokens: int | Tensor) -> Tensor:
        """The auxiliary losses that have a weight, of which there is one at least; counts (E,) of choices."""
        c = self.config
        n_tokens = n_tokens.clamp(min=1) if isinstance(n_tokens, Tensor) else max(n_tokens, 1)

        def total(x: Tensor) -> Tensor:
            """Of the real tokens: (T, ..) -> (..)."""
            return (x if real is None else x.masked_fill(~real.view(-1, *[1] * (x.dim() - 1)), 0)).sum(0)

        losses = []
        if c.balance_weight:
            # The factor goes to the counts, for which autograd need not follow it.
            counts = counts.to(routes.probabilities.dtype) * (c.balance_weight * c.n_experts / n_tokens**2)
            losses.append(torch.dot(total(routes.probabilities), counts))
        if c.z_weight:
            losses.append(total(routes.logits.logsumexp(-1).square()) * (c.z_weight / n_tokens))
        return reduce(add, losses)


def within_capacity(experts: Tensor, order: Order, capacity: float | Tensor) -> Tensor:
    """experts (T K,) with those that come too late for their expert's capacity (rounded down) at no expert."""
    starts = F.pad(order.ends, (1, 0))  # (E + 1,), the last one of those without an expert
    rank = order.places - starts[experts]
    n_experts = len(order.ends)
    return torch.where(rank + 1 <= capacity, experts, n_experts)


def _as_autocast(x: Tensor) -> Tensor:
    """x in the dtype in which autocast would compute a linear map of it."""
    return x.to(autocast_dtype(x))


def parameter_counts(model: nn.Module, n_tokens: int = 1) -> tuple[int, int]:
    """(all parameters, the active ones: those that so many tokens are computed with, if no two share an expert)."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for module in model.modules():
        if isinstance(module, MoE):
            n_experts = module.config.n_experts
            n_idle = max(0, n_experts - n_tokens * module.config.top_k)
            idle += sum(p.weight.numel() // n_experts * n_idle for p in (module.in_proj, module.out_proj))
    return total, total - idle
