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
        LRUConfig,
        MoEConfig,
        SamplingConfig,
        SpeculationConfig,
        TrainConfig,
    )
    from .errors import InputError
    from .generation import collect, generate, load_state, prefill, save_state, select_state
    from .hub import PretrainedModel
    from .language_model import LanguageModel
    from .lru import LRU, LRUState
    from .lti import LTIState
    from .mamba import BiMamba, Mamba, MambaState
    from .mlp import MLP
    from .moe import MoE, parameter_counts
    from .run_folder import RunFolder
    from .s4 import S4
    from .s4d import S4D
    from .speculation import speculate
    from .task import Task
    from .train import train_model

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
    "LRU": "lru",
    "LRUConfig": "config",
    "LRUState": "lru",
    "LTIState": "lti",
    "MLP": "mlp",
    "Mamba": "mamba",
    "MambaState": "mamba",
    "MoE": "moe",
    "MoEConfig": "config",
    "PretrainedModel": "hub",
    "RunFolder": "run_folder",
    "S4": "s4",
    "S4D": "s4d",
    "SamplingConfig": "config",
    "SpeculationConfig": "config",
    "Task": "task",
    "TrainConfig": "config",
    "aux_loss": "backbone",
    "collect": "generation",
    "generate": "generation",
    "load_state": "generation",
    "parameter_counts": "moe",
    "prefill": "generation",
    "save_state": "generation",
    "select_state": "generation",
    "speculate": "speculation",
    "train_model": "train",
}

__all__ = [
    "LRU",
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
    "LRUConfig",
    "LRUState",
    "LTIState",
    "LanguageModel",
    "LanguageModelConfig",
    "Mamba",
    "MambaState",
    "MoE",
    "MoEConfig",
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
    "parameter_counts",
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
