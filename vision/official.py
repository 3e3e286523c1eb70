"""Official checkpoints of Vim (hustvl/Vim) and VMamba (MzeroMiko/VMamba) by their own keys, into our models.

The configuration is the official constructor's arguments, or, where a checkpoint has none, what its tensors' shapes
tell. What is not supported is refused by name, never passed over.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.convert import load_strictly
from ..core.errors import InputError
from .class_tokens import resized_positions
from .config import VimConfig, VMambaConfig
from .vim import Vim
from .vmamba import VMamba

# Vim: what its code can do and this cannot, with the value that means it is not used.
_VIM_UNUSED: dict[str, Any] = {
    "if_rope": False,
    "if_rope_residual": False,
    "if_bidirectional": False,
    "flip_img_sequences_ratio": -1,
    "use_mixed_token_position": False,
    "if_random_cls_token_position": False,
    "if_random_token_rank": False,
    "init_layer_scale": None,
}
_VMAMBA_UNUSED: dict[str, Any] = {"gmlp": False, "posembed": False, "patch_norm": True, "ssm_drop_rate": 0.0}


def from_vim(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Vim:
    """hustvl/Vim's VisionMamba; `config` are its constructor's arguments, None: read off the tensors.

    Raises InputError if a tensor is missing, left over or of another shape, or for an option that is not supported.
    """
    model = Vim(vim_config(config) if config else vim_config_of(state_dict))
    load_strictly(model, {name: (key, tensor) for key, name, tensor in _renamed(state_dict, _vim_name)})
    return model.eval()


def from_vmamba(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VMamba:
    """MzeroMiko/VMamba's VSSM; as `from_vim`."""
    model = VMamba(vmamba_config(config) if config else vmamba_config_of(state_dict))
    load_strictly(model, {name: (key, tensor) for key, name, tensor in _renamed(state_dict, _vmamba_name)})
    return model.eval()


def to_our_keys(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """timm's `pretrained_filter_fn`: our keys for official ones; positions resized to the model's grid.

    Of a checkpoint with "model" or "model_ema" in it, "model" is taken.
    """
    for wrapper in ("model", "model_ema"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
            break
    is_vim = isinstance(model, Vim)
    found = {name: tensor for _, name, tensor in _renamed(state_dict, _vim_name if is_vim else _vmamba_name)}
    if is_vim and "pos_embed" in found and found["pos_embed"].shape != model.pos_embed.shape:
        config = model.config
        side = math.isqrt(found["pos_embed"].shape[1] - config.n_tokens)
        if side**2 == found["pos_embed"].shape[1] - config.n_tokens:
            found["pos_embed"] = resized_positions(
                found["pos_embed"], (side, side), model.grid_size, config.class_token
            )
    return found


# Names


def _vim_name(key: str) -> str:
    key = re.sub(r"\.mixer\.(conv1d|x_proj|dt_proj)_b\.", r".mixer.backwards.\1.", key)
    key = re.sub(r"\.mixer\.(conv1d|x_proj|dt_proj)\.", r".mixer.forwards.\1.", key)
    key = re.sub(r"\.mixer\.(A|D)_b(_log)?$", r".mixer.backwards.\1\2", key)
    return re.sub(r"\.mixer\.(A_log|D)$", r".mixer.forwards.\1", key)


_VMAMBA_NAMES = [
    # of older releases
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^head\.(weight|bias)$", r"classifier.head.\1"),
    (r"^norm\.", "classifier.norm."),
    # to ours
    (r"^patch_embed\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.2\.", "patch_embed.norm1."),
    (r"^patch_embed\.5\.", "patch_embed.conv2."),
    (r"^patch_embed\.7\.", "patch_embed.norm2."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
    (r"^classifier\.head\.", "head.fc."),
    (r"^classifier\.norm\.", "norm."),
]


def _vmamba_name(key: str) -> str:
    for pattern, replacement in _VMAMBA_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _renamed(state_dict: Mapping[str, Tensor], name_of: Any) -> list[tuple[str, str, Tensor]]:
    """(its key, our name, tensor) of each."""
    found = []
    for key, tensor in state_dict.items():
        name = name_of(key)
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and re.search(r"(_proj|fc\d|reduction)\.weight$", name):
            tensor = tensor[:, :, 0, 0]  # VMamba saved linear layers as 1 x 1 convolutions once
        if name == "cls_token_tail":
            continue
        if name == "cls_token_head" and "cls_token_tail" in state_dict:
            name, tensor = "cls_token", torch.cat((tensor, state_dict["cls_token_tail"]), dim=1)
        found.append((key, name, tensor))
    return found


# Configurations


def vim_config(official: Mapping[str, Any]) -> VimConfig:
    """From the arguments of VisionMamba."""
    c = dict(official)
    _refuse(c, _VIM_UNUSED)
    for name, expected in (("bimamba_type", "v2"), ("rms_norm", True), ("if_abs_pos_embed", True)):
        if c.get(name, expected) != expected:
            raise InputError(f"cannot convert this checkpoint: {name} is {c[name]!r}; only {expected!r} is supported")
    token = "none"
    if c.get("if_cls_token", False):
        token = "middle" if c.get("use_middle_cls_token") else "double" if c.get("use_double_cls_token") else "head"
    pools = {"none": "last", "mean": "avg", "max": "max", "all": ""}
    pool = c.get("final_pool_type", "none")
    if pool not in pools:
        raise InputError(f"cannot convert this checkpoint: final_pool_type {pool!r} is none of {', '.join(pools)}")
    stride = c.get("stride", c.get("patch_size", 16))
    return VimConfig(
        img_size=c.get("img_size", 224),
        patch_size=c.get("patch_size", 16),
        stride=stride,
        in_chans=c.get("channels", 3),
        num_classes=c.get("num_classes", 1000),
        embed_dim=c["embed_dim"],
        depth=c["depth"],
        d_state=c.get("d_state", 16),
        class_token=token,
        global_pool="token" if token != "none" else pools[pool],  # with a token the official code never pools
        divide_out=c.get("if_divide_out", c.get("if_devide_out", True)),
        drop_path_rate=c.get("drop_path_rate", 0.0),
    )


def vim_config_of(state_dict: Mapping[str, Tensor]) -> VimConfig:
    """From the tensors' shapes: that of a published model (a middle token, the directions halved)."""
    try:
        proj, positions = state_dict["patch_embed.proj.weight"], state_dict["pos_embed"]
        d_state = state_dict["layers.0.mixer.A_log"].shape[1]
    except KeyError as missing:
        raise InputError(f"no Vim checkpoint: no tensor {missing}") from None
    depth = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("layers."))
    token = "middle" if "cls_token" in state_dict else "double" if "cls_token_head" in state_dict else "none"
    n_patches = positions.shape[1] - {"middle": 1, "double": 2, "none": 0}[token]
    side, patch = math.isqrt(n_patches), proj.shape[-1]
    if side**2 != n_patches:
        raise InputError(f"the checkpoint's positions, {n_patches}, are of no square; give its config.json beside it")
    strides = [s for s in (patch, patch // 2) if s and (224 - patch) // s + 1 == side]
    stride = strides[0] if strides else patch
    size = 224 if strides else side * patch
    return VimConfig(
        img_size=(size, size),
        patch_size=patch,
        stride=stride,
        in_chans=proj.shape[1],
        num_classes=state_dict["head.weight"].shape[0] if "head.weight" in state_dict else 0,
        embed_dim=proj.shape[0],
        depth=depth,
        d_state=d_state,
        class_token=token,
        global_pool="avg" if token == "none" else "token",
    )


_FORWARD_TYPES = {"v05_noz": False, "v05": True, "v0": True}  # -> whether it has a gate


def vmamba_config(official: Mapping[str, Any]) -> VMambaConfig:
    """From the arguments of VSSM."""
    c = dict(official)
    _refuse(c, _VMAMBA_UNUSED)
    kind = c.get("forward_type", "v05_noz")
    if kind not in _FORWARD_TYPES:
        raise InputError(
            f"cannot convert this checkpoint: forward_type {kind!r}; supported are {', '.join(_FORWARD_TYPES)}, "
            "those of the published weights"
        )
    for name, expected in (
        ("ssm_dt_rank", "auto"),
        ("ssm_act_layer", "silu"),
        ("mlp_act_layer", "gelu"),
        ("ssm_conv", 3),
    ):
        if c.get(name, expected) != expected:
            raise InputError(f"cannot convert this checkpoint: {name} is {c[name]!r}; only {expected!r} is supported")
    dims = c.get("dims", 96)
    first = dims if isinstance(dims, int) else dims[0]
    if not isinstance(dims, int) and list(dims) != [first * 2**i for i in range(len(dims))]:
        raise InputError(f"cannot convert this checkpoint: dims {list(dims)}; each must be twice the one before")
    stems, downsamples = {"v1": "patch", "v2": "conv"}, {"v1": "merge", "v3": "conv"}
    stem, downsample = c.get("patchembed_version", "v1"), c.get("downsample_version", "v2")
    if stem not in stems or downsample not in downsamples:
        raise InputError(
            f"cannot convert this checkpoint: patchembed_version {stem!r} (supported: v1, v2), downsample_version "
            f"{downsample!r} (supported: v1, v3)"
        )
    return VMambaConfig(
        patch_size=c.get("patch_size", 4),
        in_chans=c.get("in_chans", 3),
        num_classes=c.get("num_classes", 1000),
        depths=tuple(c.get("depths", (2, 2, 9, 2))),
        embed_dim=first,
        d_state=c.get("ssm_d_state", 16),
        ssm_ratio=c.get("ssm_ratio", 2.0),
        mlp_ratio=c.get("mlp_ratio", 4.0),
        gate=_FORWARD_TYPES[kind],
        conv_bias=c.get("ssm_conv_bias", True),
        stem=stems[stem],
        downsample=downsamples[downsample],
        drop_path_rate=c.get("drop_path_rate", 0.1),
    )


def vmamba_config_of(state_dict: Mapping[str, Tensor]) -> VMambaConfig:
    """From the tensors' shapes."""
    ours = {name: tensor for _, name, tensor in _renamed(state_dict, _vmamba_name)}
    block = "layers.0.blocks.0"
    try:
        dim, d_inner = ours[f"{block}.op.out_proj.weight"].shape
        in_proj, stem = ours[f"{block}.op.in_proj.weight"], ours["patch_embed.conv1.weight"]
        d_state = ours[f"{block}.op.A_logs"].shape[1]
    except KeyError as missing:
        raise InputError(f"no VMamba checkpoint: no tensor for {missing}") from None
    depths: dict[int, int] = {}
    for key in ours:
        if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", key):
            stage, number = map(int, found.groups())
            depths[stage] = max(depths.get(stage, 0), number + 1)
    mlp = ours.get(f"{block}.mlp.fc1.weight")
    return VMambaConfig(
        patch_size=stem.shape[-1] if "patch_embed.conv2.weight" not in ours else 4,
        in_chans=stem.shape[1],
        num_classes=ours["head.fc.weight"].shape[0] if "head.fc.weight" in ours else 0,
        depths=tuple(depths[stage] for stage in sorted(depths)),
        embed_dim=dim,
        d_state=d_state,
        ssm_ratio=d_inner / dim,
        mlp_ratio=0.0 if mlp is None else mlp.shape[0] / dim,
        gate=in_proj.shape[0] == 2 * d_inner,
        conv_bias=f"{block}.op.conv2d.bias" in ours,
        stem="conv" if "patch_embed.conv2.weight" in ours else "patch",
        downsample="merge" if "layers.0.downsample.reduction.weight" in ours else "conv",
    )


def _refuse(config: Mapping[str, Any], unused: Mapping[str, Any]) -> None:
    for name, value in unused.items():
        if config.get(name, value) != value:
            raise InputError(f"cannot convert this checkpoint: {name} is {config[name]!r}; only {value!r} is supported")
