"""A mixture of experts but for its experts, in plain PyTorch: the definition that the kernels are tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def route(x: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `polymamba.kernels.route`, with PyTorch's own gradients."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.to(dtype), weight.to(dtype))
    probabilities = logits.softmax(-1)
    if top_k == 1:  # several times faster on a GPU
        gates, experts = probabilities.max(dim=-1, keepdim=True)
    else:
        gates, experts = probabilities.topk(top_k, dim=-1)
    return logits, probabilities, gates, experts


def sort_by_expert(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    small = torch.int16 if n_experts < 2**15 else torch.int32  # a GPU sorts by digits: fewer are faster
    keys, order = experts.to(small).sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    bounds = torch.arange(n_experts, device=order.device, dtype=small)
    ends = torch.searchsorted(keys, bounds, right=True, out_int32=True)
    return order, places, ends, ends.diff(prepend=ends.new_zeros(1))


def gather(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x (T, D) -> (T K, D): the row of each assignment, in sorted order."""
    return x.index_select(0, order if top_k == 1 else order // top_k)


def collect(rows: Tensor, gates: Tensor | None, places: Tensor, kept: Tensor | None, top_k: int) -> Tensor:
    """rows (T K, D) -> (T, D): the sum of each token's rows, each by its gate, less those from `kept` on."""
    rows = _placed(rows, places, kept).unflatten(0, (-1, top_k))
    if gates is not None:
        rows = rows * gates[..., None].to(rows.dtype)
    return rows[:, 0] if top_k == 1 else rows.sum(1)


def spread(
    dy: Tensor, rows: Tensor, gates: Tensor, order: Tensor, places: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and gates of `collect`."""
    top_k = gates.shape[1]
    drows = (dy[:, None] * gates[..., None].to(dy.dtype)).flatten(0, 1).index_select(0, order)
    dgates = (_placed(rows, places, kept).unflatten(0, (-1, top_k)) * dy[:, None]).sum(-1)
    return drows, dgates.to(gates.dtype)


def _placed(rows: Tensor, places: Tensor, kept: Tensor | None) -> Tensor:
    """The row of each assignment; 0 where it stands at `kept` or after."""
    found = rows.index_select(0, places)
    return found if kept is None else found.masked_fill((places >= kept)[:, None], 0)
