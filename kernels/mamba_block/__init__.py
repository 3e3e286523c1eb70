from .interface import BlockWeights, ScanWeights, mamba_block, serves

__all__ = ["BlockWeights", "ScanWeights", "mamba_block", "serves"]
