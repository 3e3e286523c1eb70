"""The backbone and all that a modality shares."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import Attention, KVCache
    from .backbone import Backbone, Block, aux_loss
    from .config import (
        BackboneConfig,
        ComputeConfig,
        LanguageModelConfig,
        SamplingConfig,
        SpeculationConfig,
        TrainConfig,
    )
    from .errors import InputError
    from .generation import collect, generate, load_state, prefill, save_state, select_state
    from .hub import PretrainedModel
    from .language_model import LanguageModel
    from .lti import LTIState
    from .mamba import BiMamba, Mamba, MambaState
    from .mlp import MLP
    from .run_folder import RunFolder
    from .s4 import S4
    from .s4d import S4D
    from .speculation import speculate
    from .train import Task, train_model

# Lazy, so that the flags of the command line can be read before torch has loaded.
_MODULE_OF = {
    "Attention": "attention",
    "Backbone": "backbone",
    "BackboneConfig": "config",
    "BiMamba": "mamba",
    "Block": "backbone",
    "ComputeConfig": "config",
    "InputError": "errors",
    "KVCache": "attention",
    "LanguageModel": "language_model",
    "LanguageModelConfig": "config",
    "LTIState": "lti",
    "MLP": "mlp",
    "Mamba": "mamba",
    "MambaState": "mamba",
    "PretrainedModel": "hub",
    "RunFolder": "run_folder",
    "S4": "s4",
    "S4D": "s4d",
    "SamplingConfig": "config",
    "SpeculationConfig": "config",
    "Task": "train",
    "TrainConfig": "config",
    "aux_loss": "backbone",
    "collect": "generation",
    "generate": "generation",
    "load_state": "generation",
    "prefill": "generation",
    "save_state": "generation",
    "select_state": "generation",
    "speculate": "speculation",
    "train_model": "train",
}

__all__ = [
    "MLP",
    "S4",
    "S4D",
    "Attention",
    "Backbone",
    "BackboneConfig",
    "BiMamba",
    "Block",
    "ComputeConfig",
    "InputError",
    "KVCache",
    "LTIState",
    "LanguageModel",
    "LanguageModelConfig",
    "Mamba",
    "MambaState",
    "PretrainedModel",
    "RunFolder",
    "SamplingConfig",
    "SpeculationConfig",
    "Task",
    "TrainConfig",
    "aux_loss",
    "collect",
    "generate",
    "load_state",
    "prefill",
    "save_state",
    "select_state",
    "speculate",
    "train_model",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
