"""Weights of which each process holds a part (FSDP2's, spread experts): to clip their gradients, to have them whole."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state of a sharded model, whole, on the CPU: on the first process; None on others. All have to call it."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return state if dist.get_rank() == 0 else None  # pyright: ignore[reportReturnType]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm, over the whole model, is `limit` at most. Returns the norm before.

    What `torch.nn.utils.clip_grad_norm_` does, which does not take plain and sharded gradients, or those of several
    meshes, together.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        kind = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        kinds.setdefault(kind, []).append(gradient)
    total = torch.zeros((), device=gradients[0].device)
    for own in kinds.values():
        first = own[0]
        locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in own]
        square = torch.stack(torch._foreach_norm(locals_)).float().square().sum()
        if isinstance(first, DTensor):
            for dim, placement in enumerate(first.placements):
                if placement.is_shard():
                    dist.all_reduce(square, group=first.device_mesh.get_group(dim))
        total += square
    norm = total.sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
    return norm
