"""Raw waveforms: a Mamba U-Net that generates, scores and classifies them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PRESETS, AudioConfig, ClassifierConfig, UNetConfig
    from .model import AudioClassifier, AudioModel, Guided
    from .unet import UNet

# Lazy, so that the flags of the command line can be read before torch has loaded.
_MODULE_OF = {
    "PRESETS": "config",
    "AudioClassifier": "model",
    "AudioConfig": "config",
    "AudioModel": "model",
    "ClassifierConfig": "config",
    "Guided": "model",
    "UNet": "unet",
    "UNetConfig": "config",
}

__all__ = [
    "PRESETS",
    "AudioClassifier",
    "AudioConfig",
    "AudioModel",
    "ClassifierConfig",
    "Guided",
    "UNet",
    "UNetConfig",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
