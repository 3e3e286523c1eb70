"""polymamba: one Mamba backbone, many modalities.

polymamba.core        the backbone, training, checkpoints
polymamba.kernels     selective scan and causal convolution, for CPU and GPU
polymamba.audio       raw waveforms
polymamba.genomics    DNA
polymamba.bytes       token-free text, and any other bytes
polymamba.vision      images
polymamba.convert     official checkpoints -> our models
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("polymamba")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

_SUBPACKAGES = ("audio", "bytes", "core", "genomics", "kernels", "vision")

# not bytes: a star import would hide Python's
__all__ = ["__version__", "audio", "convert", "core", "genomics", "kernels", "vision"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can answer before torch has loaded.
    if name in _SUBPACKAGES:
        return import_module(f".{name}", __name__)
    if name == "convert":
        return import_module(".conversion", __name__).convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
