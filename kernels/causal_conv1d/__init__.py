from .interface import causal_conv1d, causal_conv1d_step
from .reference import causal_conv1d_reference, causal_conv1d_step_reference

__all__ = ["causal_conv1d", "causal_conv1d_reference", "causal_conv1d_step", "causal_conv1d_step_reference"]
