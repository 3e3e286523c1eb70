"""Whether a Mamba block may run as one operation (kernels/mamba_block), or has to run by its parts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..kernels.mamba_block import (
    Behind,
    BlockWeights,
    Front,
    ScanWeights,
    mamba_block,
    mamba_block_and_norm,
    mamba_block_onwards,
    norm_and_block_pay,
    norm_and_mamba_block,
    serves,
)
from . import parallel
from .autocast import autocast_dtype
from .norm import AddLayerNorm, AddRMSNorm
from .pieces import border_of


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
    mixer: nn.Module, hidden: Tensor, cu_seqlens: Tensor | None, *, scans: tuple[nn.Module, ...] = (),
    reverse: tuple[bool, ...] = (False,), projected: bool, scale: float = 1.0,
) -> Tensor | None:  # fmt: skip
    """`mixer.forward` of hidden (B, L, M), or if not `projected` of (x, z) (B, L, 2E), where autograd alone looks on.

    scans: the mixer's selective SSMs, if it is none itself; the results of all are added up. scale: of out_proj. None
    where the parts have to be run one after another: before a compiler, if a part is not what it was made as, wherever
    autocast or the weights' dtypes would have the parts compute otherwise, and where a sequence that is cut into pieces
    (parallel.py) is packed or padded.
    """
    context = parallel.current()
    border = None if context is None else border_of(context, cu_seqlens)
    if (context is not None and border is None) or all_modules._has_any_global_hook():
        return None
    found = _weights_and_dtype(mixer, hidden, scans or (mixer,), projected)
    if found is None:
        return None
    weights, dtype = found
    return mamba_block(hidden, weights, dtype=dtype, cu_seqlens=cu_seqlens, reverse=reverse, scale=scale, border=border)


def at_once_and_norm(
    mixer: nn.Module, hidden: Tensor, norm: AddRMSNorm, stream: Tensor, *, scans: tuple[nn.Module, ...],
    reverse: tuple[bool, ...], scale: float,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """`norm(mixer(hidden), stream)`, of a norm that is as it was made; None where the two have to be run by themselves.

    That is as of `at_once`, if autograd looks on, if a sequence is cut into pieces, or if it would not be faster.
    """
    if not hidden.is_cuda or autocast_dtype(hidden).itemsize != 2 or torch.is_grad_enabled():
        return None  # at once: the host would ask again for the block alone
    if parallel.current() is not None or all_modules._has_any_global_hook():
        return None
    found = _weights_and_dtype(mixer, hidden, scans, True)
    if found is None:
        return None
    weights, dtype = found
    if autocast_dtype(norm.weight) != dtype:  # that of what is normed
        return None
    behind = Behind(stream, norm.weight, norm.eps)
    return mamba_block_and_norm(hidden, weights, behind, dtype=dtype, reverse=reverse, scale=scale)


def at_once_onwards(
    mixer: nn.Module, hidden: Tensor, states: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`mixer.forward` of hidden (B, L, M) from states (of the convolution, of the scan), with those at the end.

    None where the parts have to be run one after another: as of `at_once`, if autograd looks on, or if a sequence is
    cut into pieces; and for states of the wrong shape, which the parts refuse.
    """
    if torch.is_grad_enabled() or parallel.current() is not None or all_modules._has_any_global_hook():
        return None
    found = _weights_and_dtype(mixer, hidden, (mixer,), True)
    if found is None or not hidden.numel():
        return None
    scan = found[0].scans[0]
    shapes = (hidden.shape[0], len(scan.conv), scan.conv.shape[2] - 1), (hidden.shape[0], *scan.A_log.shape)
    if any(state is not None and state.shape != shape for state, shape in zip(states, shapes, strict=True)):
        return None
    return mamba_block_onwards(hidden, found[0], *states, dtype=found[1])


def norm_and_at_once(
    norm: AddRMSNorm, mixer: nn.Module, x: Tensor, stream: Tensor | None, states: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`mixer` of `norm(x, stream)` from states, as of `at_once_onwards`: (out, the new stream, the states at the end).

    None where the two have to be run by themselves: as of `at_once_onwards`, if one is not what it was made as, or if
    it would not be faster.
    """
    own: dict[str, Any] = mixer._parameters
    if x.device.type != "cpu" or torch.is_grad_enabled() or not norm_and_block_pay(x, len(own["D"])):
        return None  # at once: the host would ask again for the block alone
    if parallel.current() is not None or all_modules._has_any_global_hook():
        return None
    if not as_made(norm, mixer, kinds=(AddRMSNorm, AddLayerNorm, type(mixer))):
        return None
    found = _weights_and_dtype(mixer, x, (mixer,), True)
    if found is None:
        return None
    front = Front(norm.weight, norm.bias if isinstance(norm, AddLayerNorm) else None, norm.eps)
    return norm_and_mamba_block(x, stream, front, found[0], *states, dtype=found[1])


def _weights_and_dtype(
    mixer: nn.Module, hidden: Tensor, scans: tuple[nn.Module, ...], projected: bool
) -> tuple[BlockWeights, torch.dtype] | None:
    dtype = autocast_dtype(hidden)
    if not projected and hidden.dtype != dtype:
        return None  # the convolution is in the dtype of its input, whatever autocast says
    outer = _linear_weights(mixer, "in_proj", "out_proj") if projected else [None, None]
    inner = [_scan_weights(scan) for scan in scans]
    if outer is None or None in inner:
        return None
    in_proj, out_proj = outer
    weights = BlockWeights(in_proj, out_proj, tuple(filter(None, inner)))
    matrices = in_proj, out_proj, *(w for scan in weights.scans for w in (scan.x_proj, scan.dt_proj))
    if any(w is not None and autocast_dtype(w) != dtype for w in matrices) or not serves(hidden, weights, dtype):
        return None
    return weights, dtype


def _linear_weights(module: nn.Module, *names: str) -> list[Any] | None:
    """Of these linear maps without bias, if they are as they were made."""
    # Not by attribute: what nn.Module does to find one takes longer than the rest of this.
    parts: list[Any] = [module._modules[name] for name in names]
    if not as_made(*parts) or any(part._parameters["bias"] is not None for part in parts):
        return None
    return [part._parameters["weight"] for part in parts]


def _scan_weights(module: nn.Module) -> ScanWeights | None:
    parts: Any = module._modules
    conv, dt, x_proj = parts["conv1d"], parts["dt_proj"], _linear_weights(module, "x_proj")
    if x_proj is None or not as_made(conv, dt):
        return None
    own: dict[str, Any] = module._parameters  # pyright: ignore[reportAssignmentType] - all are there
    conv, dt = conv._parameters, dt._parameters
    return ScanWeights(*(conv["weight"], conv["bias"], x_proj[0], dt["weight"], dt["bias"], own["A_log"], own["D"]))
