from .interface import VSSWeights, conv_norm_gelu, serves, vss_block

__all__ = ["VSSWeights", "conv_norm_gelu", "serves", "vss_block"]
