"""Whether a Mamba block in training may run as one operation of autograd (kernels/mamba_block), or by its parts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..kernels.mamba_block import BlockWeights, mamba_block, serves
from . import parallel
from .autocast import autocast_dtype

_INNER = ("conv1d", "x_proj", "dt_proj")
_ALL = ("in_proj", *_INNER, "out_proj")


def as_made(*parts: Any, kinds: tuple[type, ...] = (nn.Linear, nn.Conv1d)) -> bool:
    """Whether nothing would be missed if the parts' weights were used and not the parts called.

    So none is an adapter or a quantised layer, has a hook, or a forward of its own.
    """
    return all(
        type(part) in kinds
        and not (
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
            or "forward" in part.__dict__
        )
        for part in parts
    )


def at_once(
    mixer: nn.Module, hidden: Tensor, cu_seqlens: Tensor | None, *, reverse: bool = False, projected: bool
) -> Tensor | None:
    """`mixer.forward` of hidden (B, L, M), or if not `projected` of (x, z) (B, L, 2E), where autograd alone looks on.

    None where the parts have to be run one after another: outside training, before a compiler, if a part is not what it
    was made as, wherever autocast or the weights' dtypes would have the parts compute otherwise, and where the sequence
    is cut into pieces (parallel.py).
    """
    if not torch.is_grad_enabled() or parallel.current() is not None:
        return None
    # Not by attribute: what nn.Module does to find one takes longer than the rest of this.
    parts: dict[str, Any] = {name: mixer._modules[name] for name in (_ALL if projected else _INNER)}
    own: Any = mixer._parameters
    if not as_made(*parts.values()) or all_modules._has_any_global_hook():
        return None
    weight: dict[str, Any] = {name: part._parameters["weight"] for name, part in parts.items()}
    bias: dict[str, Any] = {name: part._parameters["bias"] for name, part in parts.items()}
    if any(bias.get(name) is not None for name in ("in_proj", "x_proj", "out_proj")):
        return None
    dtype = autocast_dtype(hidden)
    if not projected and hidden.dtype != dtype:
        return None  # the convolution is in the dtype of its input, whatever autocast says
    if any(autocast_dtype(w) != dtype for name, w in weight.items() if name != "conv1d"):
        return None
    weights = BlockWeights(
        *(weight.get("in_proj"), weight["conv1d"], bias["conv1d"], weight["x_proj"], weight["dt_proj"]),
        *(bias["dt_proj"], own["A_log"], own["D"], weight.get("out_proj")),
    )
    if not serves(hidden, weights, dtype):
        return None
    return mamba_block(hidden, weights, dtype=dtype, cu_seqlens=cu_seqlens, reverse=reverse)
