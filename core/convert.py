"""Official checkpoints of Mamba language models, by their own keys, into `LanguageModel`.

Every tensor must find its place and every place its tensor; what does not fit is reported in one message.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import BackboneConfig, LanguageModelConfig
from .errors import InputError
from .language_model import LanguageModel


def from_mamba_ssm(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LanguageModel:
    """mamba_ssm.MambaLMHeadModel (state-spaces/mamba, Mamba-1); `config` is its config.json.

    Its vocabulary is padded to a multiple inside the model; so are the logits here.
    """
    ssm = dict(config.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    _require(layer == "Mamba1", f"ssm_cfg.layer is {layer!r}; only 'Mamba1' is supported")
    _require(not config.get("d_intermediate"), "d_intermediate is set; models with an MLP are not supported")
    _require(not config.get("attn_layer_idx"), "attn_layer_idx is set; models with attention are not supported")
    multiple = config.get("pad_vocab_size_multiple", 8)
    backbone = BackboneConfig(
        d_model=config["d_model"],
        n_layer=config["n_layer"],
        d_state=ssm.get("d_state", 16),
        d_conv=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        dt_rank=_rank(ssm.get("dt_rank", "auto")),
        norm="rms" if config.get("rms_norm", True) else "layer",
    )
    vocab_size = -(-config["vocab_size"] // multiple) * multiple
    tied = config.get("tie_embeddings", _same(state_dict, "lm_head.weight", "backbone.embedding.weight"))
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=vocab_size, tie_embeddings=tied))
    return _load(model, state_dict, lambda key: re.sub(r"^backbone\.embedding\.", "embedding.", key))


def from_hf_mamba(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LanguageModel:
    """transformers.MambaForCausalLM; `config` is its config.json."""
    _require(not config.get("use_bias", False), "use_bias is true; only bias-free projections are supported")
    _require(config.get("use_conv_bias", True), "use_conv_bias is false; a convolution bias is needed")
    _require(
        config.get("hidden_act", "silu") == "silu",
        f"hidden_act is {config.get('hidden_act')!r}; only 'silu' is supported",
    )
    backbone = BackboneConfig(
        d_model=config["hidden_size"],
        n_layer=config["num_hidden_layers"],
        d_state=config.get("state_size", 16),
        d_conv=config.get("conv_kernel", 4),
        expand=config.get("expand", 2),
        dt_rank=_rank(config.get("time_step_rank", "auto")),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
    )
    tied = config.get("tie_word_embeddings", True)
    lm = LanguageModelConfig(backbone=backbone, vocab_size=config["vocab_size"], tie_embeddings=tied)
    return _load(LanguageModel(lm), state_dict, lambda key: re.sub(r"^backbone\.embeddings\.", "embedding.", key))


def _same(state_dict: Mapping[str, Tensor], one: str, other: str) -> bool:
    """Whether a config that does not speak of tying is of a model with tied weights: older ones say nothing."""
    return one not in state_dict or other not in state_dict or torch.equal(state_dict[one], state_dict[other])


def _rank(value: int | str) -> int | None:
    return None if value == "auto" else int(value)


def _require(condition: Any, problem: str) -> None:
    if not condition:
        raise InputError(f"cannot convert this checkpoint: {problem}")


def _load(model: LanguageModel, state_dict: Mapping[str, Tensor], rename: Callable[[str], str]) -> LanguageModel:
    """Copy every tensor to where `rename` says. Raises InputError with all that does not fit."""
    given = {rename(key): (key, tensor) for key, tensor in state_dict.items()}
    tied = model.config.tie_embeddings
    if tied and "lm_head.weight" not in given and "embedding.weight" in given:
        given["lm_head.weight"] = given["embedding.weight"]  # safetensors files hold a tied tensor once
    load_strictly(model, given)
    if tied and not torch.equal(given["lm_head.weight"][1], given["embedding.weight"][1]):
        raise InputError("the checkpoint's head and embedding differ, but its config says that they are tied")
    return model.eval()


def load_strictly(model: nn.Module, given: Mapping[str, tuple[str, Tensor]]) -> None:
    """Load a whole state dict: our name -> (its name in the checkpoint, tensor).

    Raises InputError with a report of every tensor that is missing, left over or of another shape; the model is then as
    it was.
    """
    wanted = model.state_dict()
    problems = [f"no tensor for {name}" for name in wanted.keys() - given.keys()]
    problems += [f"no place for {given[name][0]}" for name in given.keys() - wanted.keys()]
    problems += [
        f"{given[name][0]} is {tuple(given[name][1].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & given.keys()
        if given[name][1].shape != wanted[name].shape
    ]
    if problems:
        raise InputError(f"the checkpoint does not fit its config: {'; '.join(sorted(problems))}")
    model.load_state_dict({name: tensor for name, (_, tensor) in given.items()})
