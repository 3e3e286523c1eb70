"""The operations that must be fast, each one public function over several backends (backends.py chooses)."""

from .backends import info, plain_operations
from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .cross_scan import cross_scan
from .mamba_step import MambaWeights, mamba_step
from .norm import layer_norm, rms_norm
from .selective_scan import selective_scan, selective_scan_step

__all__ = [
    "MambaWeights",
    "causal_conv1d",
    "causal_conv1d_step",
    "cross_scan",
    "info",
    "layer_norm",
    "mamba_step",
    "plain_operations",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
]
