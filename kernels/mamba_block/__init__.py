from .interface import (
    Front,
    mamba_block,
    mamba_block_and_norm,
    mamba_block_onwards,
    norm_and_block_pay,
    norm_and_mamba_block,
    serves,
)
from .passes import Behind, BlockWeights, ScanWeights

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
