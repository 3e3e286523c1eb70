from .interface import VSSWeights, serves, vss_block

__all__ = ["VSSWeights", "serves", "vss_block"]
