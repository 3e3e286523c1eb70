"""Official checkpoints of Mamba language models, by their own keys, into `LanguageModel`.

Every tensor must find its place and every place its tensor; what does not fit is reported in one message.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import BackboneConfig, Expert, LanguageModelConfig, MoEConfig
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


def from_moe_mamba(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LanguageModel:
    """MoE-Mamba (llm-random/llm-random): blocks of Mamba and token-choice experts, without a final norm.

    `config` holds vocab_size and `args`, the training arguments that shape the model, by their names there.
    """
    args = config["args"]
    mixers = {"mamba": "mamba", "feedforward": "moe"}
    modules = tuple(args["block_modules"])
    allowed = 0 < len(modules) == len(set(modules)) and set(modules) <= mixers.keys()
    _require(allowed, f"block_modules is {list(modules)}; supported are {', '.join(mixers)}")
    for name, supported in (
        ("ff_mode", "token_choice"),
        ("mamba_mode", "vanilla"),
        ("residual_mode", "pre_norm"),
        ("norm_class", "layer_norm"),
        ("get_router_values_from", "weights"),
        ("moe_values_exp", "1.0"),
    ):
        _require(str(args.get(name, supported)) == supported, f"{name} is {args.get(name)!r}, not {supported!r}")
    experts: dict[str, Expert] = {"ff relu": "relu", "ff gelu": "gelu", "ff_gated silu": "swiglu"}
    kind = f"{args.get('moe_inner_expert', 'ff')} {args.get('activation_type', 'relu')}"
    _require(kind in experts, f"moe_inner_expert, activation_type are {kind}; supported are {', '.join(experts)}")
    moe = MoEConfig(
        n_experts=args["n_experts"],
        top_k=args["routing_top_k"],
        d_expert=args["expert_size"],
        expert=experts[kind],
        capacity_factor=args["capacity_factor"],
        balance_weight=args["load_balancing_loss_weight"],
        z_weight=args["zloss_weight"],
    )
    expand = args["mamba_expansion"]
    _require(expand == int(expand), f"mamba_expansion is {expand}; only whole numbers are supported")
    backbone = BackboneConfig(
        d_model=args["dmodel"],
        n_layer=args["n_blocks"] * len(modules),
        pattern=tuple(mixers[name] for name in modules),
        expand=int(expand),
        moe=moe,
        norm="layer",
        final_norm=False,
    )
    lm = LanguageModelConfig(backbone=backbone, vocab_size=config["vocab_size"], tie_embeddings=False)

    def rename(key: str) -> str:
        found = re.fullmatch(r"encoder\.blocks\.block_(\d+)\.block\.residual_(\w+)\.layer\.(\w+)\.(.+)", key)
        if found is None or found[2] not in modules:
            return _OF_MOE_MAMBA.get(key, key)
        layer = f"backbone.layers.{int(found[1]) * len(modules) + modules.index(found[2])}"
        part = "norm" if found[3] == "pre_norm" else "mixer"
        return f"{layer}.{part}.{_OF_MOE_MAMBA.get(found[4], found[4])}"

    return _load(LanguageModel(lm), _in_our_layout(state_dict), rename)


_OF_MOE_MAMBA = {
    "embedding_layer.layers.0.weight": "embedding.weight",
    "head.weight": "lm_head.weight",
    "gating.gate": "router.weight",
    "expert_inner_function.lin1_weight": "in_proj.weight",
    "expert_inner_function.lin2_weight": "out_proj.weight",
}


def _in_our_layout(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MoE-Mamba's tensors with the router's weight (experts, d_model), and with gate and up of an expert in one."""
    tensors = dict(state_dict)
    for key, tensor in state_dict.items():
        if key.endswith(".gating.gate"):
            tensors[key] = tensor.T
        up = key.replace(".gate_weight", ".lin1_weight")
        if up != key and up in state_dict:
            tensors[up] = torch.cat((tensors.pop(key), state_dict[up]), -1)
    return tensors


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
