"""polymamba.convert: official checkpoints -> our models."""

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polymamba.core.errors import InputError
from polymamba.core.files import require_new_folder
from polymamba.core.hub import PretrainedModel
from polymamba.flags import Convert

KINDS = {
    "mamba-ssm": "polymamba.core.convert:from_mamba_ssm",
    "hf-mamba": "polymamba.core.convert:from_hf_mamba",
    "mambabyte": "polymamba.bytes.model:from_mambabyte",
    "vim": "polymamba.vision.official:from_vim",
    "vmamba": "polymamba.vision.official:from_vmamba",
}


def convert(kind: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> PretrainedModel:
    """The model that an official checkpoint describes, in evaluation mode.

    kind         one of KINDS
    state_dict   its tensors under their official keys
    config       its config.json as a dict

    Strict: raises InputError with a report of every tensor that is missing, left over or of another shape, and for a
    config that asks for what is not supported. ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    module, function = KINDS[kind].split(":")
    try:
        return getattr(import_module(module), function)(state_dict, config)
    except KeyError as missing:
        raise InputError(f"the {kind} config has no {missing}") from None


def run(args: Convert) -> None:
    """The verb: a checkpoint folder in, a model folder out."""
    config_file = args.checkpoint / "config.json"
    if not config_file.is_file():
        raise InputError(f"{args.checkpoint}: no config.json in it; expected the folder of an official checkpoint")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config_file}: not JSON ({error})") from None
    require_new_folder(args.output)
    model = convert(args.kind, _read_weights(args.checkpoint), config)
    model.save_pretrained(args.output)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {n_parameters:,} parameters -> {args.output}", file=sys.stderr)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """model.safetensors, or pytorch_model.bin read as plain tensors (never as general pickle)."""
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    try:
        if safe.is_file():
            return load_file(safe)
        if pickled.is_file():
            return torch.load(pickled, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{folder}: weights cannot be read ({' '.join(str(error).split())[:200]})") from None
    except Exception as error:  # pickle.UnpicklingError: torch refuses what is not a plain tensor
        raise InputError(f"{pickled}: not a plain state dict ({' '.join(str(error).split())[:200]})") from None
    raise InputError(f"{folder}: no model.safetensors or pytorch_model.bin in it")
