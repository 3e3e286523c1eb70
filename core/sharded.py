"""Weights of which each process holds a part (FSDP2's, spread experts): to clip their gradients, to have them whole.

Such weights are DTensors. What makes them has loaded torch.distributed.tensor; to load it for a look at a model of one
process would take as long as to load torch.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_part(x: Any) -> bool:
    """Whether x is a DTensor."""
    return hasattr(x, "device_mesh")


def here(x: Any) -> Tensor:
    """What of x is on this process: all of it, if x is no DTensor."""
    return x.to_local() if is_part(x) else x


def is_sharded(model: nn.Module) -> bool:
    return any(map(is_part, model.parameters()))


def shard(model: nn.Module, mesh: Any = None, *, apart: set[nn.Parameter] | None = None) -> None:
    """Divide all weights among the processes of a mesh, or all, by FSDP2: a unit is what a model calls its Block, and
    what is left. apart: parameters to leave as they are, such as `spread_experts` returns.
    """
    from torch.distributed.fsdp import fully_shard

    marks = {name: dict(vars(p)) for name, p in model.named_parameters()}  # such as optim.py reads
    for module in model.modules():
        if type(module).__name__ == "Block":
            fully_shard(module, mesh=mesh, ignored_params=apart)
    fully_shard(model, mesh=mesh, ignored_params=apart)
    for name, p in model.named_parameters():
        vars(p).update(marks[name])


@contextmanager
def all_weights(model: nn.Module) -> Iterator[None]:
    """Within it each process has all weights of a model that `shard` divided, and may run it as often as it likes."""
    if not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    reshards = [unit is not model for unit in units]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit, reshard in zip(units, reshards, strict=True):
        unit.set_reshard_after_forward(reshard, recurse=False)
        unit.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state of a sharded model, whole, on the CPU: on the first process; None on others. All have to call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state if dist.get_rank() == 0 else None  # pyright: ignore[reportReturnType]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm, over the whole model, is `limit` at most. Returns the norm before.

    What `torch.nn.utils.clip_grad_norm_` does, which does not take plain and sharded gradients, or those of several
    meshes, together.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds: dict[object, list[Any]] = {}
    for gradient in gradients:
        kind = (gradient.device_mesh, gradient.placements) if is_part(gradient) else None  # pyright: ignore[reportAttributeAccessIssue]
        kinds.setdefault(kind, []).append(gradient)
    total = torch.zeros((), device=gradients[0].device)
    for own in kinds.values():
        square = torch.stack(torch._foreach_norm([here(g) for g in own])).float().square().sum()
        if is_part(own[0]):
            for dim, placement in enumerate(own[0].placements):
                if placement.is_shard():
                    dist.all_reduce(square, group=own[0].device_mesh.get_group(dim))
        total += square
    norm = total.sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([here(g) for g in gradients], factor)
    return norm
