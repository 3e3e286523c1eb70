"""VMamba (arXiv 2401.10166; MzeroMiko/VMamba): four stages of blocks around a 2-D selective scan.

    x = stem(image)                                 1/4 of the side, C channels
    for stage:
        for block:  x += scan(norm(x));  x += mlp(norm2(x))
        x = downsample(x)                           half the side, twice the channels; not after the last stage
    logits = head(mean(norm(x)))

Channels stand last, (B, H, W, C), throughout: a convolution sees the same memory as channels-last NCHW.
Letters: B batch, H, W height and width, C channels of a stage, E inner width, K = 4 directions, N states, R rank.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import ClassifierHead, DropPath, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.autocast import autocast_dtype
from ..core.mamba import initial_dt_bias
from ..core.mamba_at_once import as_made
from ..kernels import cross_scan
from ..kernels.backends import choose, traced
from ..kernels.norm import layer_norm, layer_norm_alone
from ..kernels.norm.interface import implementation
from ..kernels.vss_block import conv_norm_gelu
from .config import VMambaConfig
from .conv import Conv
from .mlp import Mlp
from .model import ImageModel, drop_path_rates, feature_layout
from .vss_at_once import at_once

NORM_EPS = 1e-5
K = 4  # directions


class Norm(nn.LayerNorm):
    """LayerNorm of (.., C), in the dtype of its weights: on a GPU by our kernel, PyTorch's being slow where C is small.

    projected: nothing but a linear map reads the result. Under autocast the kernel then gives it in the dtype to which
    that would cast it, and takes its gradient in the same.
    """

    def forward(self, x: Tensor, *, projected: bool = False) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.by_kernel(x, projected) if has_kernel(x) else super().forward(x)

    def by_kernel(self, x: Tensor, projected: bool) -> Tensor:
        return layer_norm_alone(x, self.weight, self.bias, self.eps, dtype=self.result_dtype(projected))

    def result_dtype(self, projected: bool) -> torch.dtype:
        return autocast_dtype(self.weight) if projected else self.weight.dtype


class AddNorm(Norm):
    """(x, y) -> (the norm of x + y, x + y): one kernel where x is a stream in float32."""

    def forward(self, x: Tensor, y: Tensor, *, projected: bool = False) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not has_kernel(x) or x.dtype != torch.float32:
            x = x + y
            return super().forward(x, projected=projected), x
        dtype = self.result_dtype(projected)
        return layer_norm(y, self.weight, self.bias, self.eps, residual=x, dtype=dtype)


class ScanNorm(Norm):
    """The same of the scan's sum, which is float32 whatever the weights are: PyTorch does not mix dtypes everywhere."""

    def forward(self, x: Tensor, *, projected: bool = False) -> Tensor:
        return self.by_kernel(x, projected)


def normed(conv: Any, norm: Any, x: Tensor) -> Tensor:
    """norm(conv(x)). In inference on a GPU the norm's kernel adds the convolution's bias."""
    if not may_join(conv, norm, x) or traced(x):
        return norm(conv(x))
    y = conv.without_bias(x)
    rows, _ = implementation("triton", "forward")(
        y.flatten(0, 2), None, norm.weight, norm.bias, norm.eps, True, norm.weight.dtype, before=conv.bias
    )
    return rows.view(y.shape)


def may_join(conv: Any, norm: Any, x: Tensor) -> bool:
    """Whether, without gradients, a kernel of ours may stand for more than one of these."""
    return (
        isinstance(x, Tensor)
        and x.is_cuda
        and not torch.is_grad_enabled()
        and conv.bias is not None
        and choose(None, x.device, torch.promote_types(x.dtype, norm.weight.dtype)) == "triton"
        and as_made(conv, norm, kinds=(Conv, Norm))
    )


def has_kernel(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()  # a compiler joins it to what comes before and after


for _norm in (Norm, AddNorm, ScanNorm):
    register_notrace_module(_norm)


@register_notrace_module
class SS2D(nn.Module):
    """The scan block: projections around a depthwise convolution and `cross_scan`. (B, H, W, C) -> the same shape."""

    def __init__(self, dim: int, config: VMambaConfig):
        super().__init__()
        d_inner, rank = int(config.ssm_ratio * dim), -(-dim // 16)
        self.d_state, self.dt_rank, self.gate = config.d_state, rank, config.gate
        self.in_proj = nn.Linear(dim, d_inner * (2 if config.gate else 1), bias=False)
        self.conv2d = Conv(d_inner, d_inner, 3, padding=1, groups=d_inner, bias=config.conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(K, rank + 2 * config.d_state, d_inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, d_inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, d_inner))
        self.A_logs = nn.Parameter(torch.empty(K * d_inner, config.d_state))
        self.Ds = nn.Parameter(torch.empty(K * d_inner))
        self.out_norm = ScanNorm(d_inner, NORM_EPS)
        self.out_proj = nn.Linear(d_inner, dim, bias=False)
        for parameter in (self.A_logs, self.Ds, self.dt_projs_bias):
            parameter._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue] - read by core's optim.py
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """The official initialisation ("v0" of its code), which is mamba-ssm's in each direction."""
        nn.init.uniform_(
            self.x_proj_weight, -(self.x_proj_weight.shape[2] ** -0.5), self.x_proj_weight.shape[2] ** -0.5
        )
        nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_projs_bias.copy_(initial_dt_bias(tuple(self.dt_projs_bias.shape)))
        self.A_logs.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_logs))
        nn.init.ones_(self.Ds)

    @property
    def A(self) -> Tensor:
        logs = self.A_logs if self.A_logs.dtype == torch.float64 else self.A_logs.float()
        return -torch.exp(logs).unflatten(0, (K, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        z = None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = F.silu(self.conv2d(x))
        # Projections commute with any order of the pixels: one product for all directions, on the image as it is.
        projected = rearrange(F.linear(x, self.x_proj_weight.flatten(0, 1)), "b h w (k r) -> b h w k r", k=K)
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        skip = self.Ds.unflatten(0, (K, -1))
        y = cross_scan(x, dt, self.A, B, C, skip, self.dt_projs_weight, self.dt_projs_bias)
        y = self.out_norm(y, projected=z is None)
        return self.out_proj(y if z is None else y * F.silu(z))


PARTS = (Norm, AddNorm, ScanNorm, SS2D, Conv, Mlp, DropPath, nn.Linear, nn.GELU, nn.Identity)  # as they are made


class Block(nn.Module):
    """x += scan(norm(x)); x += mlp(norm2(x)). On a GPU one operation, unless a part is special."""

    def __init__(self, dim: int, config: VMambaConfig, drop_path: float):
        super().__init__()
        self.norm = Norm(dim, NORM_EPS)
        self.op = SS2D(dim, config)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = self.mlp = None
        if config.mlp_ratio:
            self.norm2 = AddNorm(dim, NORM_EPS)
            self.mlp = Mlp(dim, int(config.mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        found = at_once(self, x, PARTS)
        return self.by_parts(x) if found is None else found

    def by_parts(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.op(self.norm(x, projected=True)))
        if self.mlp is None or self.norm2 is None:
            return x + y
        normed, x = self.norm2(x, y, projected=True)
        return x + self.drop_path(self.mlp(normed))


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions: (B, H, W, C) -> (B, H / s, W / s, D), sides rounded up."""

    def __init__(self, config: VMambaConfig):
        super().__init__()
        half, dim = config.embed_dim // 2, config.embed_dim
        self.conv1, self.norm1 = Conv(config.in_chans, half, 3, 2, 1), Norm(half, NORM_EPS)
        self.conv2, self.norm2 = Conv(half, dim, 3, config.patch_size // 2, 1), Norm(dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.conv2, self.norm2, self.first(x))

    def first(self, x: Tensor) -> Tensor:
        conv: Any = self.conv1
        norm: Any = self.norm1
        if not self.at_once(x):
            return F.gelu(norm(conv(x)))
        dtype = autocast_dtype(x)
        return conv_norm_gelu(x.permute(0, 3, 1, 2), conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, dtype)

    def at_once(self, x: Tensor) -> bool:
        """Whether the first convolution, its norm and GELU may be one kernel, without gradients."""
        weight: Any = self.conv1.weight
        return (
            may_join(self.conv1, self.norm1, x)
            and weight.dtype == x.dtype
            and weight[0].numel() <= 128
            and len(weight) <= 128
        )


class PatchStem(nn.Module):
    """One convolution of the patch's size; what is beyond the last whole patch is not seen."""

    def __init__(self, config: VMambaConfig):
        super().__init__()
        self.conv1 = Conv(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        self.norm1 = Norm(config.embed_dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x))


class ConvDownsample(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, 2 C), sides rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.norm = Conv(dim, 2 * dim, 3, 2, 1), Norm(2 * dim, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.conv, self.norm, x)


@register_notrace_module
class MergeDownsample(nn.Module):
    """The same by 2 x 2 pixels side by side, odd sides padded with zeros (Swin's patch merging)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.reduction = Norm(4 * dim, NORM_EPS), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # the official order of the four: down the first column, then the second
        x = rearrange(x, "b (h i) (w j) c -> b h w (j i c)", i=2, j=2)
        return self.reduction(self.norm(x, projected=True))


class Stage(nn.Module):
    def __init__(self, dim: int, rates: list[float], config: VMambaConfig, *, last: bool):
        super().__init__()
        self.blocks: Any = nn.ModuleList(Block(dim, config, rate) for rate in rates)
        kinds = {"conv": ConvDownsample, "merge": MergeDownsample}
        self.downsample = nn.Identity() if last else kinds[config.downsample](dim)


class VMamba(ImageModel):
    """Images of any size and shape."""

    config_class = VMambaConfig
    default_architecture: ClassVar[str] = "vmamba_tiny_s1l8"
    timm_names: ClassVar[dict[str, str]] = {"first_conv": "patch_embed.conv1", "classifier": "head.fc"}
    output_fmt = "NHWC"  # of forward_features, as timm asks

    def __init__(self, config: VMambaConfig):
        super().__init__(config)
        self.config: VMambaConfig
        self.patch_embed = ConvStem(config) if config.stem == "conv" else PatchStem(config)
        rates = drop_path_rates(config, sum(config.depths))
        self.layers: Any = nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(config.depths, config.dims, strict=True)):
            begin = sum(config.depths[:i])
            last = i + 1 == len(config.depths)
            self.layers.append(Stage(dim, rates[begin : begin + depth], config, last=last))
        self.norm: nn.Module = Norm(config.dims[-1], NORM_EPS)
        self.head: ClassifierHead
        self.set_head()
        self.apply(_init_linear)

    def set_head(self) -> None:
        c = self.config
        self.head = ClassifierHead(
            self.num_features, c.num_classes, pool_type=c.global_pool, drop_rate=c.drop_rate, input_fmt="NHWC"
        )
        self.head.apply(_init_linear)

    @property
    def num_features(self) -> int:
        return self.config.dims[len(self.layers) - 1]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        first = self.config.patch_size
        return [
            {"num_chs": dim, "reduction": first * 2**i, "module": f"layers.{i}"} for i, dim in enumerate(self._dims)
        ]

    @property
    def _dims(self) -> tuple[int, ...]:
        return self.config.dims[: len(self.layers)]

    # Forward

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h, w, D), normed."""
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        for stage in self.layers:
            x = stage.downsample(self._run(stage, x))
        return self.norm(x)

    def _run(self, stage: Any, x: Tensor) -> Tensor:
        for block in stage.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, h, w, D) -> logits (B, num_classes); with pre_logits what the head would see, (B, D)."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    # timm's feature extraction

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What some stages made, before it is downsampled, (B, D, h, w) each; unless intermediates_only, (final, [..]).

        indices   stages, or how many of the last ones; None for all
        norm      the last stage's through the final norm
        stop_early  run no stage beyond the last one wanted; if that is not the very last, `final` is not normed
        """
        taken, last = feature_take_indices(len(self.layers), indices)
        x, found = self.patch_embed(x.permute(0, 2, 3, 1)), []
        for i, stage in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = self._run(stage, x)
            if i in taken:
                y = self.norm(x) if norm and i + 1 == len(self.layers) else x
                found.append(feature_layout(y, output_fmt))
            x = stage.downsample(x)
        if intermediates_only:
            return found
        complete = last + 1 == len(self.layers) or not stop_early
        return self.norm(x) if complete else x, found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted. Returns the indices of those wanted."""
        taken, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by depth, for timm's layer-wise learning rates."""
        blocks = [
            (r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}


def _init_linear(module: nn.Module) -> None:
    """The official initialisation: linear layers normal(0, 0.02), biases 0; convolutions as PyTorch has them."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
