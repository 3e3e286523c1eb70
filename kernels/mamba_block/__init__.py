from .interface import BlockWeights, ScanWeights, mamba_block, mamba_block_onwards, serves

__all__ = ["BlockWeights", "ScanWeights", "mamba_block", "mamba_block_onwards", "serves"]
