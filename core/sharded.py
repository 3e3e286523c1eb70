"""Weights of which each process holds a part (FSDP2's, spread experts): to clip their gradients, to have them whole.

Such weights are DTensors. What makes them has loaded torch.distributed.tensor; to load it for a look at a model of one
process would take as long as to load torch.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# To gather or reduce a unit takes a GPU's links half a millisecond for 2^25 weights (128 MiB), and the host about as
# long to begin it: fewer weights would make it wait for the host, more would save nothing.
UNIT = 1 << 25  # parameters of a unit, at least; all units but the last have so many
# Parameters (2 GiB) of a model that is gathered once a step and kept until its backward; a larger one is, twice.
KEPT = 1 << 29


def is_part(x: Any) -> bool:
    """Whether x is a DTensor."""
    return hasattr(x, "device_mesh")


def here(x: Any) -> Tensor:
    """What of x is on this process: all of it, if x is no DTensor."""
    return x.to_local() if is_part(x) else x


def is_sharded(model: nn.Module) -> bool:
    return any(map(is_part, model.parameters()))


def shard(model: nn.Module, mesh: Any = None, *, apart: Collection[nn.Parameter] = ()) -> None:
    """Divide all weights among the processes of a mesh, or all, by FSDP2.

    A unit, whose weights come and go together, is a run of what a model calls its Blocks (see UNIT), and what is left.
    apart: parameters to leave as they are, such as `spread_experts` returns.
    """
    from torch.distributed.fsdp import fully_shard

    marks = {name: dict(vars(p)) for name, p in model.named_parameters()}  # such as optim.py reads
    apart = set(apart)
    model.gathers_twice = _size(model, apart) > KEPT  # pyright: ignore[reportArgumentType] - for all_weights
    options: Any = {"mesh": mesh, "ignored_params": apart}
    units = _units(model, apart)
    for unit in units:
        fully_shard(unit, reshard_after_forward=model.gathers_twice, **options)
    fully_shard(model, **options)
    firsts: list[Any] = [model, *(unit[0] for unit in units)]
    for one, following in pairwise(firsts):
        one.set_modules_to_forward_prefetch([following])  # gathered while this one computes
    for name, p in model.named_parameters():
        vars(p).update(marks[name])


def experts_of(model: nn.Module) -> list[Any]:
    """The linear maps, grouped by expert, of all its mixtures."""
    return [linear for module in model.modules() for linear in getattr(module, "experts", ())]


def _size(module: nn.Module, apart: Collection[nn.Parameter]) -> int:
    return sum(p.numel() for p in module.parameters() if p not in apart)


def _units(model: nn.Module, apart: Collection[nn.Parameter]) -> list[list[nn.Module]]:
    units, size = [[]], 0
    for module in model.modules():
        if type(module).__name__ == "Block":
            units[-1].append(module)
            size += _size(module, apart)
            if size >= UNIT:
                units, size = [*units, []], 0
    return list(filter(None, units))


@contextmanager
def all_weights(model: nn.Module) -> Iterator[None]:
    """Within it each process has all weights of a model that `shard` divided, and may run it as often as it likes.

    Spread experts included.
    """
    if not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    spread = [(linear, linear.weight) for linear in experts_of(model) if is_part(linear.weight)]
    for linear, weight in spread:
        linear.weight = nn.Parameter(weight.full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        for linear, weight in spread:
            linear.weight = weight
        for unit in units:
            unit.set_reshard_after_forward(unit is not model and bool(model.gathers_twice), recurse=False)
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
