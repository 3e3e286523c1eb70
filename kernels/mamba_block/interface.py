"""The Mamba block, of one scan or of several, as one operation: what a model calls. How it goes: passes.py, cpu.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import IN_PYTORCH, choose, traced
from ..operators import module
from .passes import NARROW, Behind, Block, BlockWeights, Border, Settings, forward


def serves(hidden: Tensor, weights: BlockWeights, dtype: torch.dtype) -> bool:
    """Whether `mamba_block` does what the block's single operations would do.

    That is: no tracer looks on; kernels of ours are to run; no tensor is in float64.
    """
    tensors = [hidden, *(w for w in _flat(weights) if w is not None)]
    return (
        all(x.dtype != torch.float64 for x in tensors)
        and not traced(*tensors)
        and choose(None, hidden.device, dtype) not in IN_PYTORCH
    )


def mamba_block(
    hidden: Tensor, weights: BlockWeights, *, dtype: torch.dtype, cu_seqlens: Tensor | None = None,
    reverse: tuple[bool, ...] = (False,), scale: float = 1.0, border: Border | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """hidden (B, L, M), or (x, z) (B, L, 2E) without in_proj -> (B, L, M), or y (B, L, E) without out_proj.

    dtype: that of the matrix products and of what lies between them. cu_seqlens and, for each scan, reverse are
    `selective_scan`'s. scale: a factor of out_proj. border: where rows are pieces, without cu_seqlens. The gradients
    are deterministic; there are none of second order. Ask `serves` first: no tracer may see this, and it has no
    implementation in PyTorch's own operations (ValueError).
    """
    flat = _flat(weights)
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, *flat))
    settings = _settings(hidden, weights, dtype, backend, reverse=reverse, scale=scale, border=border, save=trained)
    if trained:
        return Block.apply(settings, cu_seqlens, hidden, *flat)
    return forward(settings, cu_seqlens, hidden, *flat)[0]


@torch.no_grad()
def mamba_block_and_norm(
    hidden: Tensor, weights: BlockWeights, behind: Behind, *, dtype: torch.dtype, reverse: tuple[bool, ...] = (False,),
    scale: float = 1.0, backend: str | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """`mamba_block` for inference with what comes behind it: (normed in `dtype`, the new stream), both (B, L, M).

    None where it would be no faster than one after the other. It is for two scans in CUDA C++, in 16 bits, of M up to
    what triton_onto_stream.py serves.
    """
    settings = _settings(hidden, weights, dtype, backend, reverse=reverse, scale=scale)
    if settings.scan_backend != "cuda" or len(weights.scans) != 2:
        return None
    if weights.in_proj is None or weights.out_proj is None:
        return None
    if not module(__package__ or "", "triton_onto_stream").serves(hidden, dtype):
        return None
    normed, (stream,) = forward(settings, None, hidden, *_flat(weights), behind=behind)
    return normed, stream


@torch.no_grad()
def mamba_block_onwards(
    hidden: Tensor, weights: BlockWeights, conv_state: Tensor | None, ssm_state: Tensor | None, *, dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`mamba_block` of one scan for inference, from a state and to the next: (out, conv_state, ssm_state).

    conv_state (B, E, W - 1), ssm_state (B, E, N): None at the beginning; they are not changed.
    """
    settings = _settings(hidden, weights, dtype, backend)
    states: list[tuple[Tensor, Tensor]] = []
    out, _ = forward(settings, None, hidden, *_flat(weights), before=(conv_state, ssm_state), after=states)
    return out, *states[0]


class Front(NamedTuple):
    """The norm before a block, of the stream with what was added to it: `layer_norm` where there is a bias."""

    weight: Tensor  # (M,)
    bias: Tensor | None
    eps: float


def norm_and_block_pay(x: Tensor, n_channels: int) -> bool:
    """Whether to ask `norm_and_mamba_block` for x and so many inner channels, as far as these tell."""
    if x.dim() != 3 or not x.numel() or choose(None, x.device, x.dtype) != "numba":
        return False
    return module(__package__ or "", "cpu").pays(x, n_channels)


@torch.no_grad()
def norm_and_mamba_block(
    x: Tensor, stream: Tensor | None, front: Front, weights: BlockWeights, conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None, *, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:  # fmt: skip
    """`mamba_block` of one scan for inference with the norm before it: (out, the new stream, conv_state, ssm_state).

    x and stream (B, L, M) as those of `rms_norm` and its residual; dtype and the states as of `mamba_block_onwards`.
    It is for a CPU, for float32 alone, and for batches that the threads can share out or, where weights lie ready
    (../unchanged.py), a few tokens. None for all else, for shapes that do not fit together, which the parts refuse, and
    where one after the other is no slower.
    """
    (scan, *more), given = weights.scans, (x, stream, *front[:2], *_flat(weights), conv_state, ssm_state)
    tensors = [t for t in given if t is not None]
    if more or dtype != torch.float32 or any(t.dtype != dtype for t in tensors) or traced(*tensors):
        return None
    n_channels, n_states, rank = *scan.A_log.shape, scan.dt_proj.shape[-1]
    if rank > NARROW or not norm_and_block_pay(x, n_channels):
        return None
    (n_seqs, _, width), taps = x.shape, scan.conv.shape[-1]
    expected = (
        *(x.shape, x.shape, (width,), (width,), (2 * n_channels, width), (width, n_channels)),
        *((n_channels, 1, taps), (n_channels,), (rank + 2 * n_states, n_channels), (n_channels, rank), (n_channels,)),
        *(scan.A_log.shape, (n_channels,), (n_seqs, n_channels, taps - 1), (n_seqs, n_channels, n_states)),
    )
    if weights.in_proj is None or weights.out_proj is None:
        return None
    if any(t is not None and t.shape != shape for t, shape in zip(given, expected, strict=True)):
        return None
    return module(__package__ or "", "cpu").forward(x, stream, front, weights, conv_state, ssm_state)


def _settings(
    hidden: Tensor, weights: BlockWeights, dtype: torch.dtype, backend: str | None, *,
    reverse: tuple[bool, ...] = (False,), scale: float = 1.0, border: Border | None = None, save: bool = False,
) -> Settings:  # fmt: skip
    scan = choose(backend, hidden.device, dtype, in_cuda=True)
    conv = "triton" if scan == "cuda" else scan
    if conv in IN_PYTORCH:
        raise ValueError(f"mamba_block runs on numba, triton or cuda, which do not serve {dtype}; got backend={scan!r}")
    n_channels, rank = weights.scans[0].dt_proj.shape
    shape = n_channels, rank, weights.scans[0].A_log.shape[1], hidden.shape[0]
    return Settings(dtype, *shape, reverse, scale, border, save, conv, scan)


def _flat(weights: BlockWeights) -> list[Tensor | None]:
    return [weights.in_proj, weights.out_proj, *(w for scan in weights.scans for w in scan)]
