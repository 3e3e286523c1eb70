from .interface import layer_norm, rms_norm
from .reference import norm_reference

__all__ = ["layer_norm", "norm_reference", "rms_norm"]
