from .interface import (
    Behind,
    BlockWeights,
    ScanWeights,
    mamba_block,
    mamba_block_and_norm,
    mamba_block_onwards,
    serves,
)

__all__ = [
    "Behind",
    "BlockWeights",
    "ScanWeights",
    "mamba_block",
    "mamba_block_and_norm",
    "mamba_block_onwards",
    "serves",
]
