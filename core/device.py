"""Where a model runs, and how exactly: what `ComputeConfig` asks for."""

import torch

from .config import ComputeConfig
from .errors import InputError


def pick_device(compute: ComputeConfig) -> torch.device:
    """Raises InputError if the device asked for is not here."""
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA GPU is visible here; use --device cpu, or see `polymamba doctor`")
    if compute.device == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: not available here; use --device cpu")
    if compute.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(compute.device)


def uses_bf16(compute: ComputeConfig, device: torch.device) -> bool:
    return compute.precision == "bf16" or (compute.precision == "auto" and device.type == "cuda")


def autocast(compute: ComputeConfig) -> torch.autocast:
    """The precision that `compute` asks for, outside training."""
    device = pick_device(compute)
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(compute, device))
