"""Flags of the commands that belong to no domain; free of torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

Kind = Literal["mamba-ssm", "hf-mamba", "moe-mamba", "mambabyte", "sashimi", "vim", "vmamba", "caduceus"]


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what is installed, which devices are here, which backend each kernel takes, and whether it computes right."""

    debug: bool = False
    """Show a traceback when something fails."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn an official checkpoint into a polymamba model folder."""

    kind: Positional[Kind]
    """Where the checkpoint comes from."""
    checkpoint: Positional[Path]
    """Its folder: config.json and model.safetensors or pytorch_model.bin. Of vim and vmamba also the .pth that was
    released, or safetensors; none of its code is run, and what the tensors' shapes tell is not asked for."""
    output: Positional[Path]
    """Folder to make."""
    back: bool = False
    """Of caduceus: the other way, from a folder of ours to one that the official code loads."""
    weights: str | None = None
    """Which weights of a .pth with several: mostly model, those trained, or model_ema, their moving average."""
    debug: bool = False
    """Show a traceback when something fails."""
