"""polymamba.convert: official checkpoints -> our models."""

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polymamba.core.errors import InputError
from polymamba.core.files import new_folder, require_new_folder, write_json
from polymamba.core.hub import PretrainedModel
from polymamba.core.unpickle import read_pickled, tensors_of
from polymamba.flags import Convert

FROM_TENSORS = ("vim", "vmamba")  # whose configuration is read off the tensors where there is no config.json
KINDS = {
    "mamba-ssm": "polymamba.core.convert:from_mamba_ssm",
    "hf-mamba": "polymamba.core.convert:from_hf_mamba",
    "moe-mamba": "polymamba.core.convert:from_moe_mamba",
    "mambabyte": "polymamba.bytes.model:from_mambabyte",
    "sashimi": "polymamba.audio.sashimi:from_sashimi",
    "vim": "polymamba.vision.official:from_vim",
    "vmamba": "polymamba.vision.official:from_vmamba",
    "caduceus": "polymamba.genomics.official:from_caduceus",
}

BACK = {"caduceus": "polymamba.genomics.official:official_of"}  # a folder of ours -> its tensors and config.json there


def convert(kind: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> PretrainedModel:
    """The model that an official checkpoint describes, in evaluation mode.

    kind         one of KINDS
    state_dict   its tensors under their official keys
    config       its config.json as a dict; of vim and vmamba the constructor's arguments, {} for the tensors to tell

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
    except (TypeError, ValueError) as error:  # of a configuration that our own refuses
        if isinstance(error, InputError):
            raise
        raise InputError(f"the {kind} config: {error}") from None


def run(args: Convert) -> None:
    """The verb: a checkpoint in, a model folder out; or the other way."""
    require_new_folder(args.output)
    if args.back:
        _write_back(args)
        return
    if args.checkpoint.is_file() and args.kind in FROM_TENSORS:
        config, weights = {}, _read_file(args)
    else:
        config, weights = _read_config(args.checkpoint), _read_weights(args.checkpoint)
        if args.weights:
            raise InputError("--weights chooses among those of a .pth file; of a folder leave it out")
    model = convert(args.kind, weights, config)
    with new_folder(args.output) as beside:
        model.save_pretrained(beside)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {n_parameters:,} parameters -> {args.output}", file=sys.stderr)


def _write_back(args: Convert) -> None:
    if args.kind not in BACK:
        raise InputError(f"--back: there is no way back to {args.kind}, only to {', '.join(BACK)}")
    module, function = BACK[args.kind].split(":")
    tensors, config = getattr(import_module(module), function)(args.checkpoint)
    with new_folder(args.output) as beside:
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        write_json(beside / "config.json", config)
    print(f"{config['architectures'][0]} -> {args.output}", file=sys.stderr)


def _read_config(folder: Path) -> dict[str, Any]:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"{folder}: no config.json in it; expected the folder of an official checkpoint")
    try:
        return json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config_file}: not JSON ({error})") from None


def _read_file(args: Convert) -> dict[str, Tensor]:
    """The state dict of a single file; says which one it took."""
    path = args.checkpoint
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: weights cannot be read ({error})") from None
    else:
        content = read_pickled(path)
    tensors, name = tensors_of(content, args.weights, path)
    if name:
        print(f"taking the weights {name!r} of {path}", file=sys.stderr)
    return tensors


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
