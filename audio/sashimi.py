"""Official SaShiMi checkpoints (state-spaces/s4, models/sashimi/sashimi.py) into our models, by their own keys.

Its residual blocks stand in lists: d_layers the pools down (layout unet: with the blocks before each), c_layers the
middle, u_layers[s] a pool up and the blocks after it, the innermost first. What its S4 learns as C belongs to the
length l_kernel that it saw last: see core/s4.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.s4 import S4, plain_C
from .codec import SILENCE
from .config import N_CODES, START, AudioConfig, UNetConfig
from .model import AudioModel
from .unet import UNet

_OF_S4 = {
    "D": "layer.layer.D",
    **{name: f"layer.layer.kernel.{name}" for name in ("C", "B", "P", "A_real", "A_imag", "inv_dt")},
    "out_proj.weight": "layer.output_linear.0.weight",
    "out_proj.bias": "layer.output_linear.0.bias",
}
_OF_MLP = {
    "in_proj.weight": "layer.ff.0.0.weight",
    "in_proj.bias": "layer.ff.0.0.bias",
    "out_proj.weight": "layer.ff.2.weight",
    "out_proj.bias": "layer.ff.2.bias",
}
_ENCODER, _DECODER = "encoder.0.weight", "decoder.0.output_transform"


def from_sashimi(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> UNet | AudioModel:
    """The backbone Sashimi(**config) as a `UNet`, in evaluation mode; with an encoder and a decoder an `AudioModel`.

    config holds the constructor's arguments (d_model, n_layers, pool, expand, ff, unet, dropout). Of a whole model the
    keys begin with "model."; encoder.0.weight is an embedding of 256 codes, decoder.0.output_transform (older: decoder.
    output_transform) the head; config may then hold sample_rate and codec, too. The code that the official generator
    begins with, 128, becomes START's row.
    Raises InputError if tensors are missing, left over, or of other shapes, and for what is not supported.
    """
    if config.get("bidirectional", False):
        raise InputError("cannot convert this checkpoint: bidirectional is true; only causal models are supported")
    unet = UNetConfig(
        d_model=config["d_model"],
        n_blocks=config["n_layers"],
        pool=tuple(config["pool"]),
        layout="unet" if config.get("unet", False) else "sashimi",
        stages=("s4+mlp" if config.get("ff", 2) else "s4",),
        widen=config.get("expand", 2),
        ff=config.get("ff", 2) or 1,
        norm="layer",
        dropout=config.get("dropout", 0.0),
    )
    rest = {key.replace("decoder.output", "decoder.0.output"): value for key, value in state_dict.items()}
    problems: list[str] = []
    if _ENCODER not in rest:
        model = UNet(unet)
        _fill(model, rest, problems)
    else:
        options = {name: config[name] for name in ("sample_rate", "codec") if name in config}
        model = AudioModel(AudioConfig(unet=unet, **options))
        table = rest.pop(_ENCODER)
        if table.shape == (N_CODES, unet.d_model):
            with torch.no_grad():
                model.embedding.table.weight[:N_CODES] = table
                model.embedding.table.weight[START] = table[SILENCE]
        else:
            problems.append(f"{_ENCODER} is {tuple(table.shape)}, not {(N_CODES, unet.d_model)}")
        for name in ("weight", "bias"):
            _take(model.head.get_parameter(name), f"{_DECODER}.{name}", rest, problems)
        of_backbone = {key.removeprefix("model."): rest.pop(key) for key in list(rest) if key.startswith("model.")}
        _fill(model.unet, of_backbone, problems)
        rest |= of_backbone
    problems += [f"no place for {key}" for key in rest]
    if problems:
        raise InputError(f"the checkpoint does not fit its config: {'; '.join(sorted(problems))}")
    return model.eval()


def _fill(unet: UNet, rest: dict[str, Tensor], problems: list[str]) -> None:
    """Move the backbone's tensors from `rest` to their places."""
    for prefix, module in official_places(unet):
        if not hasattr(module, "mixer"):  # a pool, or the last norm
            name = "linear." if isinstance(module, nn.Linear) else ""
            for ours, parameter in module.named_parameters():
                _take(parameter, f"{prefix}{name}{ours}", rest, problems)
            continue
        for ours, parameter in module.norm.named_parameters():
            _take(parameter, f"{prefix}norm.{ours}", rest, problems)
        for ours, theirs in (_OF_S4 if isinstance(module.mixer, S4) else _OF_MLP).items():
            _take(module.mixer.get_parameter(ours), prefix + theirs, rest, problems)
        if isinstance(module.mixer, S4):
            length = rest.pop(f"{prefix}layer.layer.kernel.l_kernel", None)
            if length is None:
                problems.append(f"no tensor for {prefix}layer.layer.kernel.l_kernel")
            elif not problems:
                with torch.no_grad():
                    module.mixer.C.copy_(plain_C(module.mixer, module.mixer.C, int(length)))


def official_places(unet: UNet) -> Iterator[tuple[str, Any]]:
    """The official prefix of each block, pool and norm of ours, in the order in which they run."""
    i = 0
    for blocks, pool in zip(unet.down_blocks, unet.down_pools, strict=True):
        for module in (*blocks, pool):
            yield f"d_layers.{i}.", module
            i += 1
    for i, block in enumerate(unet.center):
        yield f"c_layers.{i}.", block
    for s, (blocks, pool) in enumerate(reversed(list(zip(unet.up_blocks, unet.up_pools, strict=True)))):
        for k, module in enumerate((pool, *blocks)):
            yield f"u_layers.{s}.{k}.", module
    yield "norm.", unet.norm


def _take(parameter: Tensor, key: str, rest: dict[str, Tensor], problems: list[str]) -> None:
    """Copy rest[key] to the parameter: short of axes of size 1, a channel's or a convolution's."""
    if key not in rest:
        problems.append(f"no tensor for {key}")
        return
    given = rest.pop(key)
    if [n for n in given.shape if n > 1] != [n for n in parameter.shape if n > 1]:
        problems.append(f"{key} is {tuple(given.shape)}, not {tuple(parameter.shape)}")
        return
    with torch.no_grad():
        parameter.copy_(given.reshape(parameter.shape))
