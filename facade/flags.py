"""Flags of the commands that belong to no domain; free of torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

Kind = Literal["mamba-ssm", "hf-mamba", "moe-mamba", "mambabyte", "sashimi"]


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
    """Its folder: config.json and model.safetensors or pytorch_model.bin."""
    output: Positional[Path]
    """Folder to make."""
    debug: bool = False
    """Show a traceback when something fails."""
