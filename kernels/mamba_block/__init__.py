from .interface import (
    Behind,
    BlockWeights,
    Front,
    ScanWeights,
    mamba_block,
    mamba_block_and_norm,
    mamba_block_onwards,
    norm_and_block_pay,
    norm_and_mamba_block,
    serves,
)

__all__ = [
    "Behind",
    "BlockWeights",
    "Front",
    "ScanWeights",
    "mamba_block",
    "mamba_block_and_norm",
    "mamba_block_onwards",
    "norm_and_block_pay",
    "norm_and_mamba_block",
    "serves",
]
