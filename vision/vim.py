"""Vision Mamba (Vim, arXiv 2401.09417; hustvl/Vim): an image as one sequence of patches, scanned both ways.

    x = patches(image)                              row by row, with a class token among them, plus positions
    for block:  x = mixer(norm(stream + x))         the residual stream in float32
    y = norm_f(stream + x)
    logits = head(class token of y)

The mixer is core's bidirectional Mamba (the paper's figure 2, "v2" in its code), its two directions averaged. Initial
step sizes of the backward direction are those of the forward one; the official code leaves its bias at 0.
Letters: B batch, M patches, T class tokens, L = M + T length of the sequence, D channels, h, w patches down and across.
"""

import dataclasses
import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, lecun_normal_, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.utils.checkpoint import checkpoint

from ..core.mamba import BiMamba, SelectiveSSM
from ..core.mamba_at_once import as_made, at_once_and_norm
from ..core.norm import AddRMSNorm
from ..kernels.patches import embed_patches, serves
from ..kernels.streams import side_by_side
from .class_tokens import class_at, class_tokens, resized_positions, tokens_first, with_positions
from .config import VimConfig
from .model import ImageModel, drop_path_rates, feature_layout

NORM_EPS = 1e-5


@register_notrace_module
class VimMixer(BiMamba):
    """core's, with the sum of the directions halved."""

    def __init__(self, config: VimConfig):
        super().__init__(config.embed_dim, config.d_state)
        self.share = 0.5 if config.divide_out else 1.0

    def forward(self, hidden: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - no packs
        """(B, L, D) -> the same shape."""
        return super().forward(hidden, scale=self.share)

    def then(self, norm: AddRMSNorm, hidden: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        """norm(self(hidden), stream), in inference perhaps as one operation; of a norm that is as it was made."""
        scans = self.forwards, self.backwards
        if as_made(*scans, kinds=(SelectiveSSM,)):
            options: Any = {"scans": scans, "reverse": (False, True), "scale": self.share}
            found = at_once_and_norm(self, hidden, norm, stream, **options)
            if found is not None:
                return found
        return norm(self(hidden), stream, projected=True)

    def at(self, token: int, hidden: Tensor) -> Tensor:
        """self(hidden)[:, token : token + 1], of what it depends on alone: each direction runs up to that token."""

        def direction(i: int) -> Tensor:
            if i == 0:
                y, _ = self.forwards(self.in_proj(hidden[:, : token + 1]))
                return y[:, -1:]
            y, _ = self.backwards(self.in_proj(hidden[:, token:]), reverse=True)
            return y[:, :1]

        # Under autocast both would read the copy of in_proj's weight that the first of them makes.
        apart = not (torch.compiler.is_compiling() or torch.is_autocast_enabled(hidden.device.type))
        ahead, back = side_by_side(direction, 2, hidden, apart)
        return self.out_proj((ahead + back) * self.share)


@register_notrace_module
class Norm(AddRMSNorm):
    """core's, as one node of a traced graph."""


class Block(nn.Module):
    """(x, stream) -> (mixer(norm(stream + x)), stream + x): what comes next adds the two."""

    def __init__(self, config: VimConfig, drop_path: float):
        super().__init__()
        self.norm = Norm(config.embed_dim, NORM_EPS)
        self.mixer: Any = VimMixer(config)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm(x, stream, projected=True)
        return self.drop_path(self.mixer(normed)), residual


# What blocks are made of, as `Vim.forward` may leave them uncalled.
_PARTS = (Block, Norm, VimMixer, DropPath, nn.Identity, SelectiveSSM, nn.Linear, nn.Conv1d)


class _Add(nn.Module):
    """In the place of a final norm that was pruned away."""

    def forward(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
        return x + stream, stream


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, D, h, w); the patches may overlap.

    On a GPU patches side by side are multiplied as a matrix: for images of 3 channels cuDNN's kernels are slow.
    """

    def __init__(self, config: VimConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.step)

    def side_by_side(self, x: Tensor) -> bool:
        """Whether there are patches, that do not overlap, of a convolution that is as it was made."""
        size = self.proj.kernel_size[0]
        return self.proj.stride[0] == size and min(x.shape[2:]) >= size and as_made(self.proj, kinds=(nn.Conv2d,))

    def forward(self, x: Tensor) -> Tensor:
        proj, size = self.proj, self.proj.kernel_size[0]
        if not x.is_cuda or not self.side_by_side(x):
            return proj(x)
        height, width = x.shape[2] // size, x.shape[3] // size
        x = x[:, :, : height * size, : width * size]
        patches = rearrange(x, "b c (h i) (w j) -> b h w (c i j)", i=size, j=size)
        return F.linear(patches, proj.weight.flatten(1), proj.bias).permute(0, 3, 1, 2)


register_notrace_module(PatchEmbed)


class Vim(ImageModel):
    """Images of any size that holds a patch; at others than the configured one the positions are resized (bicubic)."""

    config_class = VimConfig
    default_architecture: ClassVar[str] = "vim_tiny_patch16_224"
    timm_names: ClassVar[dict[str, str]] = {"first_conv": "patch_embed.proj", "classifier": "head"}

    def __init__(self, config: VimConfig):
        super().__init__(config)
        self.config: VimConfig
        self.grid_size = config.grid(*config.img_size)
        self.patch_embed = PatchEmbed(config)
        n_tokens, width = config.n_tokens, config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, n_tokens, width)) if n_tokens else None
        # Rows in the order of the sequence: of a middle token, row M // 2 is the token's.
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid_size) + n_tokens, width))
        rates = drop_path_rates(config, config.depth)
        self.layers: Any = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm_f = Norm(width, NORM_EPS)
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head: nn.Module
        self.set_head()
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The official initialisation, where the blocks' own is not enough.

        cls_token, pos_embed, head.weight   normal(0, 0.02)
        patch_embed.proj.weight             normal with variance 1 / fan_in (LeCun), its bias 0
        out_proj.weight                     divided by sqrt(depth): GPT-2's scheme
        """
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # pyright: ignore[reportArgumentType] - there is one
        for block in self.layers:
            block.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    def set_head(self) -> None:
        self.head = nn.Identity()
        if self.num_classes:
            self.head = nn.Linear(self.num_features, self.num_classes)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @property
    def num_features(self) -> int:
        return self.config.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Class tokens at the beginning of what forward_features returns, as timm has it."""
        return self.config.n_tokens

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        step, depth = self.config.step, len(self.layers)
        return [{"num_chs": self.num_features, "reduction": step, "module": f"layers.{i}"} for i in range(depth)]

    # Forward

    def forward(self, x: Tensor) -> Tensor:
        """`forward_head(forward_features(x))`; where the head sees class tokens alone, no other is normed.

        In inference the last block, too, then makes nothing but what these depend on.
        """
        short = (
            self.config.global_pool == "token"
            and type(self).forward_features is Vim.forward_features
            and isinstance(x, Tensor)  # a tracer finds all tokens normed
            and as_made(self.norm_f, kinds=(Norm,))
        )
        if not short:
            return super().forward(x)
        if self._may_leave_out_tokens():
            found = self._at_token(x)
        else:
            found = (class_tokens(part, self.config.class_token) for part in self.residual_stream(x))
        x, _ = self.norm_f(*found)
        return self.forward_head(x)

    def _may_leave_out_tokens(self) -> bool:
        """Whether nobody would miss what the last block makes of tokens that its class token does not depend on."""
        if torch.is_grad_enabled() or self.config.class_token == "double" or all_modules._has_any_global_hook():
            return False
        blocks = [part for block in self.layers for part in (block, *block.children())]
        parts: list[Any] = [*blocks, *self.layers[-1].mixer.modules()]
        return not any(part.training for part in parts) and as_made(*parts, kinds=_PARTS)

    def _at_token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`residual_stream` at the class token, (B, 1, D): the last block makes what this depends on alone."""
        x, blocks = self.embed(x), list(self.layers)
        at = class_at(x.shape[1], self.config.class_token)
        x, stream = blocks[0].norm(x, None, projected=True)
        for block, following in pairwise(blocks):
            x, stream = block.mixer.then(following.norm, x, stream)
        return blocks[-1].mixer.at(at, x), stream[:, at : at + 1]

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, D): patches and class tokens in the order of the scan, with their positions."""
        token = self.config.class_token
        if self._embeds_at_once(x):
            proj, positions = self.patch_embed.proj, self.pos_embed[0]
            at = math.prod(self.grid_size) // 2 if token == "middle" else 0
            y = embed_patches(x, proj.weight, proj.bias, positions, at)  # pyright: ignore[reportArgumentType]
            if self.cls_token is not None:
                y[:, at] = self.cls_token[0, 0] + positions[at]
            return y
        return with_positions(self.patch_embed(x), self.cls_token, self.pos_embed, self.grid_size, token)

    def _embeds_at_once(self, x: Tensor) -> bool:
        """Whether patches and positions may come of one kernel: in inference on a GPU, at the model's own size."""
        patches = self.patch_embed
        return (
            isinstance(x, Tensor)
            and self.config.class_token != "double"
            and patches.side_by_side(x)
            and self.config.grid(*x.shape[-2:]) == self.grid_size
            and as_made(patches, kinds=(PatchEmbed,))
            and serves(x, patches.proj.weight, patches.proj.bias, self.pos_embed)
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T + M, D), normed: class tokens first, then the patches row by row."""
        x, _ = self.norm_f(*self.residual_stream(x))
        return tokens_first(x, self.config.class_token)

    def residual_stream(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> what the last block made and the stream before it, (B, L, D), to be added up."""
        x, stream = self.embed(x), None
        for block in self.layers:
            x, stream = self._run(block, x, stream)
        assert stream is not None  # there is a block
        return x, stream

    def _run(self, block: Block, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, stream, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return block(x, stream)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, T + M, D) -> logits (B, num_classes); with pre_logits what the head would see, (B, D)."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor) -> Tensor:
        """(B, T + M, D) -> (B, D), or as it is if global_pool is ""."""
        n, how = self.num_prefix_tokens, self.config.global_pool
        if how == "token":
            return x[:, :n].mean(dim=1)
        if how == "avg":
            return x[:, n:].mean(dim=1)
        if how == "max":
            return x[:, n:].amax(dim=1)
        return x[:, -1] if how == "last" else x

    def get_classifier(self) -> nn.Module:
        return self.head

    # timm's feature extraction

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The residual stream after some blocks, each (B, D, h, w); unless intermediates_only, (final, [those]).

        indices   blocks, or how many of the last ones; None for all
        norm      through the final norm
        output_fmt  NCHW, NHWC, or NLC for (B, M, D)
        With return_prefix_tokens each is a pair of it and the class tokens (B, T, D).
        """
        taken, last = feature_take_indices(len(self.layers), indices)
        height, width = self.config.grid(*x.shape[-2:])
        x, stream, found = self.embed(x), None, []
        for i, block in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x, stream = self._run(block, x, stream)
            if i in taken:
                y = tokens_first(self.norm_f(x, stream)[0] if norm else x + stream, self.config.class_token)
                found.append(y)
        n = self.num_prefix_tokens
        maps = [y[:, n:] for y in found]
        if output_fmt != "NLC":
            maps = [feature_layout(y.unflatten(1, (height, width)), output_fmt) for y in maps]
        out = [(y, all_[:, :n]) for y, all_ in zip(maps, found, strict=True)] if return_prefix_tokens else maps
        if intermediates_only:
            return out
        assert stream is not None  # there is a block
        return tokens_first(self.norm_f(x, stream)[0], self.config.class_token), out

    def get_intermediate_layers(
        self, x: Tensor, n: int | list[int] = 1, reshape: bool = False, return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:  # fmt: skip
        """The last n blocks' outputs, (B, M, D), or (B, D, h, w) with reshape."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one wanted. Returns the indices of those wanted."""
        taken, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = _Add()  # pyright: ignore[reportAttributeAccessIssue]
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by depth, for timm's layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make this the configured size, resizing the positions once for all."""
        if img_size is None:
            return
        config = dataclasses.replace(self.config, img_size=img_size)  # pyright: ignore[reportArgumentType]
        grid = config.grid(*config.img_size)
        resized = resized_positions(self.pos_embed, self.grid_size, grid, config.class_token)
        self.config, self.grid_size = config, grid
        self.pos_embed = nn.Parameter(resized)
        self.pos_embed._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
