from .interface import BlockWeights, mamba_block, serves

__all__ = ["BlockWeights", "mamba_block", "serves"]
