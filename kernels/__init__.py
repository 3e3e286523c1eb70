"""The operations that must be fast, each one public function over several backends (backends.py chooses)."""

from .backends import info, plain_operations
from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .cross_scan import cross_scan
from .expert_rows import Order, combine, dispatch, route, sort_by_expert
from .largest import WayOut, hand_over, largest
from .likeliest import likeliest
from .linear_cross_entropy import linear_cross_entropy
from .mamba_step import Journal, MambaWeights, mamba_stack_step, mamba_step
from .norm import layer_norm, rms_norm
from .selective_scan import selective_scan, selective_scan_step

__all__ = [
    "Journal",
    "MambaWeights",
    "Order",
    "WayOut",
    "causal_conv1d",
    "causal_conv1d_step",
    "combine",
    "cross_scan",
    "dispatch",
    "hand_over",
    "info",
    "largest",
    "layer_norm",
    "likeliest",
    "linear_cross_entropy",
    "mamba_stack_step",
    "mamba_step",
    "plain_operations",
    "rms_norm",
    "route",
    "selective_scan",
    "selective_scan_step",
    "sort_by_expert",
]
