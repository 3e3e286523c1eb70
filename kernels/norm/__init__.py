from .interface import layer_norm, layer_norm_alone, rms_norm
from .reference import norm_reference

__all__ = ["layer_norm", "layer_norm_alone", "norm_reference", "rms_norm"]
