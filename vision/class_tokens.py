"""Where Vim's class tokens stand among its patches, and the positions that are added to both.

token says where: "middle", "head", "double" (both ends), "none". Letters: B batch, T class tokens, M patches, L = M + T
length of the sequence, D channels, h, w patches down and across.
"""

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models._features_fx import register_notrace_function
from torch import Tensor


def class_at(length: int, token: str) -> int:
    """The place of a single class token in a sequence."""
    return (length - 1) // 2 if token == "middle" else 0


@register_notrace_function
def class_tokens(x: Tensor, token: str) -> Tensor:
    """A sequence (B, L, D) in the order of the scan -> (B, T, D)."""
    if token == "double":
        return torch.cat((x[:, :1], x[:, -1:]), dim=1)
    at = class_at(x.shape[1], token)
    return x[:, at : at + (token != "none")]


def split_tokens(x: Tensor, token: str) -> tuple[Tensor, Tensor]:
    """The same -> class tokens (B, T, D), patches (B, M, D)."""
    if token == "middle":
        at = class_at(x.shape[1], token)
        patches = torch.cat((x[:, :at], x[:, at + 1 :]), dim=1)
    elif token == "double":
        patches = x[:, 1:-1]
    else:
        patches = x[:, 1:] if token == "head" else x
    return class_tokens(x, token), patches


def join_tokens(tokens: Tensor, patches: Tensor, token: str) -> Tensor:
    """The reverse of `split_tokens`."""
    if token == "middle":
        at = patches.shape[1] // 2
        return torch.cat((patches[:, :at], tokens, patches[:, at:]), dim=1)
    if token == "double":
        return torch.cat((tokens[:, :1], patches, tokens[:, 1:]), dim=1)
    return torch.cat((tokens, patches), dim=1)


@register_notrace_function
def tokens_first(x: Tensor, token: str) -> Tensor:
    """A sequence in the order of the scan -> class tokens, then patches."""
    return x if token in ("head", "none") else torch.cat(split_tokens(x, token), dim=1)


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], token: str) -> Tensor:
    """Positions (1, L, D) of a grid of patches for another grid. A class token keeps its own."""
    if old == new:
        return positions
    of_tokens, of_patches = split_tokens(positions, token)
    resample: Any = resample_abs_pos_embed  # scripted: of no type that a checker knows
    of_patches = resample(of_patches, list(new), list(old), num_prefix_tokens=0)
    return join_tokens(of_tokens, of_patches, token)


@register_notrace_function
def with_positions(
    patches: Tensor, tokens: Tensor | None, positions: Tensor, grid: tuple[int, int], token: str
) -> Tensor:
    """Patches (B, D, h, w) -> (B, L, D)."""
    height, width = patches.shape[-2:]
    x = patches.flatten(2).transpose(1, 2)
    if tokens is not None:
        x = join_tokens(tokens.expand(x.shape[0], -1, -1), x, token)
    return x + resized_positions(positions, grid, (height, width), token)
