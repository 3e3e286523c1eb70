from .interface import VSSWeights, conv_norm_gelu, serves, vss_block
from .reference import vss_block_reference

__all__ = ["VSSWeights", "conv_norm_gelu", "serves", "vss_block", "vss_block_reference"]
