"""Waveforms as codes of 8 bits.

    mu-law   code = round((y + 1) / 2 * 255),  y = sign(x) log(1 + 255 |x|) / log 256     ITU-T G.711's law, continuous
    linear   code = round((x + 1) / 2 * 255)

of values in [-1, 1]; what is outside is clipped. A code decodes to the value that gives it exactly. As 0 lies between
two codes, silence is the code above it, 128. mu-law is the same as torchaudio's. Its noise is some 38 dB below a loud
tone, and below a quiet one nearly as far; linear's is even.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .config import N_CODES

_MU = N_CODES - 1
SILENCE = 128


def encode(wave: np.ndarray, codec: str) -> np.ndarray:
    """Values in [-1, 1], any shape -> codes uint8."""
    x = np.clip(wave.astype(np.float32), -1, 1)
    y = np.sign(x) * np.log1p(_MU * np.abs(x)) / math.log1p(_MU) if codec == "mu-law" else x
    return np.floor((y + 1) / 2 * _MU + 0.5).astype(np.uint8)


def decode(codes: np.ndarray, codec: str) -> np.ndarray:
    """Codes -> values in [-1, 1], float32."""
    return values(codec).numpy()[codes]


def values(codec: str) -> Tensor:
    """The value of each code, float32 (256,)."""
    y = torch.arange(N_CODES, dtype=torch.float64) / _MU * 2 - 1
    if codec == "mu-law":
        y = y.sign() * torch.expm1(y.abs() * math.log1p(_MU)) / _MU
    return y.float()
