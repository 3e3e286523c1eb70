"""Whether a block of VMamba may run as one operation (kernels/vss_block), or has to run by its parts."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..core.autocast import autocast_dtype
from ..core.mamba_at_once import as_made
from ..kernels.vss_block import VSSWeights, serves, vss_block


def at_once(block: nn.Module, x: Tensor, kinds: tuple[type, ...]) -> Tensor | None:
    """`block.forward` of x (B, H, W, C), whose parts are of these kinds as they are made. None where the parts have to
    be run one after another: off a GPU, before a compiler that wants gradients, if a part is special, or of a dtype of
    its own."""
    if not isinstance(x, Tensor) or all_modules._has_any_global_hook():
        return None
    weights, dtype = _weights(block, kinds), autocast_dtype(x)
    if weights is None or not serves(x, weights, dtype):
        return None
    parts: Any = block._modules
    return vss_block(x, weights, dtype=dtype, eps=parts["norm"].eps, factors=_factors(parts["drop_path"], x))


def _weights(block: nn.Module, kinds: tuple[type, ...]) -> VSSWeights | None:
    # Not by attribute: what nn.Module does to find one takes longer than the rest of this.
    parts: Any = block._modules
    op, mlp = parts["op"], parts.get("mlp")
    if mlp is None or not as_made(op, mlp, parts["drop_path"], kinds=kinds) or op.gate or op.d_state != 1:
        return None
    inner, of_mlp, own = op._modules, mlp._modules, op._parameters
    norms, conv = (parts["norm"], inner["out_norm"], parts["norm2"]), inner["conv2d"]
    linear = inner["in_proj"], inner["out_proj"], of_mlp["fc1"], of_mlp["fc2"]
    if not as_made(*norms, conv, *linear, of_mlp["act"], kinds=kinds):
        return None
    if norms[0].eps != norms[1].eps or norms[0].eps != norms[2].eps:
        return None
    n_1, n_2, n_3 = (norm._parameters for norm in norms)
    in_proj, out_proj, fc1, fc2 = (part._parameters for part in linear)
    return VSSWeights(
        *(n_1["weight"], n_1["bias"], in_proj["weight"], conv._parameters["weight"], conv._parameters["bias"]),
        *(own["x_proj_weight"], own["dt_projs_weight"], own["dt_projs_bias"], own["A_logs"], own["Ds"]),
        *(n_2["weight"], n_2["bias"], out_proj["weight"], n_3["weight"], n_3["bias"]),
        *(fc1["weight"], fc1["bias"], fc2["weight"], fc2["bias"]),
    )


def _factors(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """Of what the two halves of the block add, for each image: timm's DropPath, drawn at once."""
    if not isinstance(drop_path, DropPath) or not drop_path.training or not drop_path.drop_prob:
        return None
    keep = 1 - drop_path.drop_prob
    factors = torch.empty(2, len(x), device=x.device).bernoulli_(keep)
    return factors.div_(keep) if keep > 0 and drop_path.scale_by_keep else factors
