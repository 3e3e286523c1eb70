"""Expert parallelism: of each mixture of experts, every process holds some experts, and tokens travel to them.

    mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("expert",))
    experts = spread_experts(model, mesh["expert"])
    shard(model, apart=experts)                             what else there is, divided among all processes (sharded.py)

So does `train --expert-parallel` (division.py), in groups of processes, if there are more of them.

Process p of P holds the experts [p E / P, (p + 1) E / P). A layer's rows, sorted by expert, are then sorted by process
too: one all-to-all tells how many come (E numbers), a second one brings them, a third one takes the results back.
No row is padded or dropped.

Each process has batches and a loss of its own, of which the mean counts: so the gradient of an expert, which tokens of
all processes reach, is the sum of theirs over P. `save_pretrained`, called on every process, writes all experts.

Letters: T K assignments of tokens to experts, E experts, P processes, D width of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..kernels import Order, sort_by_expert
from .sharded import is_part


def spread_experts(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Leave each process of the mesh, of one dimension, its share of all experts. Returns these parameters: DTensors.

    All processes get the first one's weights. Make the optimizer after this. Raises ValueError if a layer's experts do
    not divide among the processes.
    """
    from torch.distributed.tensor import Shard, distribute_tensor  # which takes as long to load as torch

    spread = set()
    for name, module in model.named_modules():
        for linear in getattr(module, "experts", ()):
            n_experts = len(linear.weight)
            if n_experts % mesh.size():
                raise ValueError(f"{name}: {n_experts} experts do not divide among {mesh.size()} processes")
            weight = distribute_tensor(linear.weight.detach(), mesh, [Shard(0)])
            linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
            spread.add(linear.weight)
    return spread


def own_experts(weight: Any) -> Tensor:
    """The part of an expert's weight (E, ..) that is here: (E / P, ..), or all of a weight that is not spread."""
    if not is_part(weight):
        return weight
    n = weight.device_mesh.size()
    weight = weight.to_local()
    if weight.requires_grad:
        weight.register_hook(lambda gradient: gradient / n)
    return weight


def through_experts(
    experts: Callable[[Tensor, Tensor, Order], Tensor], rows: Tensor, counts: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """rows (T K, D), sorted by expert, counts (E,) of each -> what the experts, wherever they are, make of them.

    experts(rows (A, D), gates (A, 1), order by expert) does so for those here, times the gates. Rows after the counted
    ones come out as zero.
    """
    outgoing = counts.view(group.size(), -1)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing.contiguous(), group=group)
    sent, received = torch.stack((outgoing, incoming)).sum(2).tolist()
    n_sent, n_received = sum(sent), sum(received)
    x = _exchanged(rows[:n_sent], sent, received, group)
    expert = torch.arange(outgoing.shape[1], device=rows.device).repeat(group.size())
    expert = expert.repeat_interleave(incoming.flatten(), output_size=n_received)
    if not n_received:  # a row of zeros, so that kernels have one, and the weights a gradient
        x, expert = F.pad(x, (0, 0, 0, 1)), F.pad(expert, (0, 1))
    order = sort_by_expert(expert, outgoing.shape[1])
    y = experts(x, torch.ones(len(x), 1, device=x.device), order)
    y = _exchanged(y[:n_received], received, sent, group)
    return F.pad(y, (0, 0, 0, len(rows) - n_sent))


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    return _Exchanged.apply(rows, sent, received, group)  # pyright: ignore[reportReturnType]


class _Exchanged(torch.autograd.Function):
    """rows of which the first sent[0] go to process 0, and so on -> received[0] rows from process 0, and so on."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.exchange = received, sent, group
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchanged(dout, *ctx.exchange), None, None, None
