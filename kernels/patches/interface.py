"""The beginning of a model of patches, in inference on a GPU: patches times a matrix, with their positions."""

import torch
from torch import Tensor

from ..backends import choose, watched
from ..operators import module


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `embed_patches` takes these: on a GPU, all in one 16-bit dtype, and nothing watches."""
    dtype = x.dtype
    return (
        x.is_cuda
        and dtype in (torch.bfloat16, torch.float16)
        and all(other is not None and other.dtype == dtype for other in others)
        and choose(None, x.device, dtype) == "triton"
        and not torch.is_autocast_enabled("cuda")
        and not watched(x, *others)
    )


def embed_patches(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, gap: int) -> Tensor:
    """x (B, C, H, W), weight (D, C, P, P), bias (D,), positions (L, D) -> (B, L, D): of M patches side by side.

    What is beyond the last whole patch is not seen. Where L = M + 1, token `gap` is left as memory was: it is to be
    written. Without gradients; `serves` says of what.
    """
    return module(__package__ or "", "triton").embed_patches(x, weight, bias, positions, gap)
