"""Official checkpoints of Caduceus (kuleshov-group/caduceus) and PlantCaduceus by their own keys, and back to them.

The order of channels. With fused_add_norm, which all published configurations have, the official PS block norms the
second half of its channels as if it were the first one, and the other way round, and so too the residual stream: at
each layer the strands change places. In the frame of caduceus.py, where a strand stands in its own direction, that is

    (a, b) -> (F b, F a),    F = reversed in places and in channels,

before each norm. Both strands meet the same weights, so their order does not matter; and F, carried through layer after
layer, is on at the 1st, 3rd, .. layer and off again at the others. A layer of BiMamba between two F is a plain one with

    the SSM that ran forwards running backwards and the other way round      (places reversed)
    the columns of in_proj, the rows of out_proj and norm's weights reversed (channels reversed)

So a checkpoint is converted to a model without any F, by moving weights: exactly the same function, nothing to pay for
at run time. An odd number of layers leaves one F, which the head undoes (`mirrored` in the configuration).

Tied tensors: in_proj and out_proj of both directions, and the head and the embedding. A file may hold one of the two,
or both; these must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.config import BackboneConfig
from ..core.convert import load_strictly
from ..core.errors import InputError
from ..core.hub import model_name
from .alphabet import TOKEN_NAMES
from .caduceus import Caduceus, CaduceusClassifier, complements
from .config import CaduceusClassifierConfig, CaduceusConfig

# PlantCaduceus's tokenizer is GPN's.
_VOCABULARIES = [TOKEN_NAMES, ("[PAD]", "[MASK]", "[UNK]", "A", "C", "G", "T")]
# What stood for N in pretraining: the official loader replaced it by padding; PlantCaduceus's tokenizer knows no N.
_N_TOKENS = ["[PAD]", "[UNK]"]

Given = dict[str, tuple[str, Tensor]]  # our name -> (its key in the checkpoint, tensor)


def from_caduceus(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Caduceus | CaduceusClassifier:
    """CaduceusForMaskedLM, CaduceusForSequenceClassification (it has a `score`), or Caduceus alone, a masked LM too.

    `config` is its config.json, or the `config` of a training run there. Raises InputError if a tensor is missing, left
    over, of another shape or unlike the one that it is tied to, or for an option that is not supported.
    """
    trunk = caduceus_config(config)
    given = _given(state_dict)
    if trunk.rcps and config.get("fused_add_norm", True):
        given = {name: (key, tensor) for name, (key, tensor) in _straightened(given, trunk.backbone.n_layer).items()}
    if "score.weight" not in given:
        if "embedding.weight" in given:
            given.setdefault("lm_head.weight", given["embedding.weight"])
        model = Caduceus(trunk)
        load_strictly(model, given)
        return model.eval()
    classifier = CaduceusClassifierConfig(
        trunk=trunk,
        n_classes=given["score.weight"][1].shape[0],
        pooling=config.get("pooling_strategy", "mean"),
        conjoin=bool(config.get("conjoin_eval", False)),
    )
    model = CaduceusClassifier(classifier)
    load_strictly(model, {k if k == "score.weight" else f"trunk.{k}": v for k, v in given.items()})
    return model.eval()


def caduceus_config(official: Mapping[str, Any]) -> CaduceusConfig:
    """From the official config.json. Raises InputError for what is not supported."""
    ssm = dict(official.get("ssm_cfg") or {})
    for where, name, default, wanted in (
        (official, "bidirectional", True, True),
        (official, "bidirectional_strategy", "add", "add"),
        (official, "bidirectional_weight_tie", True, True),
        (ssm, "conv_bias", True, True),
        (ssm, "bias", False, False),
    ):
        value = where.get(name, default)
        # One published configuration says "true,".
        value = (
            {"true": True, "false": False}.get(value.strip(" ,").lower(), value) if isinstance(value, str) else value
        )
        if value != wanted:
            raise InputError(f"cannot convert this checkpoint: {name} is {value!r}; only {wanted!r} is supported")
    rank = ssm.get("dt_rank", "auto")
    backbone = BackboneConfig(
        d_model=official["d_model"],
        n_layer=official["n_layer"],
        pattern=("bimamba",),
        d_state=ssm.get("d_state", 16),
        d_conv=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        dt_rank=None if rank == "auto" else int(rank),
        norm="rms" if official.get("rms_norm", True) else "layer",
        norm_eps=official.get("norm_epsilon", 1e-5),
    )
    multiple = official.get("pad_vocab_size_multiple", 8)
    vocab_size = -(-official["vocab_size"] // multiple) * multiple
    vocabulary, n_token = _vocabulary(official, vocab_size)
    rcps = bool(official.get("rcps", False))
    return CaduceusConfig(
        backbone=backbone,
        rcps=rcps,
        vocab_size=vocab_size,
        vocabulary=vocabulary,
        n_token=official.get("n_token", n_token),
        window=official.get("window", CaduceusConfig.window),
        mirrored=rcps and official.get("fused_add_norm", True) and backbone.n_layer % 2 == 1,
    )


def to_caduceus(
    model: Caduceus | CaduceusClassifier, *, fused_add_norm: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, config.json) that the official code loads: tied tensors under each of their keys.

    fused_add_norm   how it should run there; by default fused, which is faster, where the model allows it: a PS model
                     of an odd number of layers is one or the other (ValueError)
    """
    trunk = model.trunk if isinstance(model, CaduceusClassifier) else model
    c = trunk.config
    is_odd = c.rcps and c.backbone.n_layer % 2 == 1
    fused = (c.mirrored if is_odd else True) if fused_add_norm is None else fused_add_norm
    if is_odd and fused != c.mirrored:
        raise ValueError(
            f"fused_add_norm is {fused}: a model of {c.backbone.n_layer} layers, an odd number, that is "
            f"{'' if c.mirrored else 'not '}mirrored is another one there; leave fused_add_norm out"
        )
    given: Given = {k.removeprefix("trunk."): (k, v.detach()) for k, v in model.state_dict().items()}
    if c.rcps and fused:
        given = _straightened(given, c.backbone.n_layer)
    tensors = {key: tensor.clone() for name, (_, tensor) in given.items() for key in _keys(name, c.rcps, fused)}
    complement = complements(c.vocabulary, c.vocab_size)
    if c.rcps:
        tensors["caduceus.backbone.embeddings.word_embeddings.complement_map"] = torch.tensor(complement)
        if "lm_head.weight" in given:
            tensors["lm_head.complement_map"] = torch.tensor(complement)
    b = c.backbone
    rank = "auto" if b.dt_rank is None else b.dt_rank
    config: dict[str, Any] = {
        "architectures": ["CaduceusForMaskedLM" if model is trunk else "CaduceusForSequenceClassification"],
        "model_type": "caduceus",
        "d_model": b.d_model,
        "n_layer": b.n_layer,
        "vocab_size": c.vocab_size,
        "pad_vocab_size_multiple": 8,
        "ssm_cfg": {"d_state": b.d_state, "d_conv": b.d_conv, "expand": b.expand, "dt_rank": rank},
        "rms_norm": b.norm == "rms",
        "norm_epsilon": b.norm_eps,
        "fused_add_norm": fused,
        "residual_in_fp32": True,
        "bidirectional": True,
        "bidirectional_strategy": "add",
        "bidirectional_weight_tie": True,
        "rcps": c.rcps,
        "complement_map": {str(i): k for i, k in enumerate(complement)} if c.rcps else None,
        "pad_token_id": c.vocabulary.index("[PAD]"),
        "n_token": c.n_token,  # not the official code's, which keeps what it does not know
        "window": c.window,
    }
    if isinstance(model, CaduceusClassifier):
        config |= {
            "id2label": {str(i): f"LABEL_{i}" for i in range(model.config.n_classes)},
            "pooling_strategy": model.config.pooling,
            "conjoin_eval": model.config.conjoin,
        }
    return tensors, config


def official_of(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`to_caduceus` of the model in a folder. Raises InputError if there is none of its kind."""
    if not folder.is_dir():  # from_pretrained would look for a model of this name on the hub
        raise InputError(f"{folder}: no such folder")
    kind = CaduceusClassifier if model_name(folder) == "CaduceusClassifier" else Caduceus
    return to_caduceus(kind.from_pretrained(folder))


def _vocabulary(official: Mapping[str, Any], vocab_size: int) -> tuple[tuple[str, ...], str]:
    """The names of the ids, and what stood for N: what complement_map, or of Ph the vocabulary's size, tells."""
    given = official.get("complement_map")
    stated = None if given is None else {int(i): k for i, k in given.items()}
    for names, n_token in zip(_VOCABULARIES, _N_TOKENS, strict=True):
        if -(-len(names) // 8) * 8 == vocab_size:
            expected = complements(names, vocab_size)
            if stated is None or all(expected[i] == k for i, k in stated.items() if i < vocab_size):
                return names, n_token
    raise InputError(
        f"cannot convert this checkpoint: a vocabulary of {vocab_size} with complement_map {given} is neither "
        "Caduceus's nor PlantCaduceus's"
    )


# Names


def _given(state_dict: Mapping[str, Tensor]) -> Given:
    """Tensors by our names, tied ones once. Raises InputError for two that should be equal and are not."""
    given: Given = {}
    for key, tensor in state_dict.items():
        if key.endswith("complement_map"):
            continue  # the configuration says it, too
        name = _our_name(key)
        if name in given and (given[name][1].shape != tensor.shape or not torch.equal(given[name][1], tensor)):
            raise InputError(f"{given[name][0]} and {key} differ, but they are tied in this model")
        given.setdefault(name, (key, tensor))
    head, embedding = given.get("lm_head.weight"), given.get("embedding.weight")
    if head and embedding and not torch.equal(head[1], embedding[1]):
        raise InputError(f"{embedding[0]} and {head[0]} differ, but they are tied in this model")
    return given


def _our_name(key: str) -> str:
    name = re.sub(r"^(model\.)?(caduceus\.)?backbone\.", "backbone.", key)  # Lightning, with a head, without
    name = re.sub(r"^model\.", "", name)
    name = re.sub(r"^backbone\.embeddings\.word_embeddings\.(embedding\.)?", "embedding.", name)
    name = re.sub(r"^lm_head\.lm_head\.", "lm_head.", name)
    name = re.sub(r"\.(mixer|norm|norm_f)\.submodule\.", r".\1.", name)
    name = re.sub(r"\.mixer\.mamba_(fwd|rev)\.(in_proj|out_proj)\.", r".mixer.\2.", name)
    name = name.replace(".mixer.mamba_fwd.", ".mixer.forwards.")
    return name.replace(".mixer.mamba_rev.", ".mixer.backwards.")


def _keys(name: str, rcps: bool, fused: bool) -> list[str]:
    """The official keys of our name: two of what is tied."""
    mixer = ".mixer.submodule." if rcps else ".mixer."
    if name == "embedding.weight":
        return [f"caduceus.backbone.embeddings.word_embeddings.{'embedding.' if rcps else ''}weight"]
    if name == "lm_head.weight":
        return [f"lm_head.{'lm_head.' if rcps else ''}weight"]
    name = name.replace("backbone.", "caduceus.backbone.")
    if rcps and not fused:
        name = re.sub(r"\.(norm|norm_f)\.", r".\1.submodule.", name)
    name = name.replace(".mixer.forwards.", f"{mixer}mamba_fwd.").replace(".mixer.backwards.", f"{mixer}mamba_rev.")
    if found := re.search(r"\.mixer\.(in_proj|out_proj)\.", name):
        return [name.replace(found[0], f"{mixer}mamba_{way}.{found[1]}.") for way in ("fwd", "rev")]
    return [name]


def _straightened(given: Given, n_layer: int) -> Given:
    """The weights of a fused PS model as of one in whose layers no strands change places; its own inverse."""
    moved: Given = {}
    other = {"forwards": "backwards", "backwards": "forwards"}
    for name, (key, tensor) in given.items():
        found = re.match(r"backbone\.layers\.(\d+)\.", name)
        is_reversed = name.startswith("backbone.norm_f.") and n_layer % 2 == 1
        if found and int(found[1]) % 2 == 0:
            name = re.sub(r"(?<=\.mixer\.)(forwards|backwards)", lambda way: other[way[0]], name)
            is_reversed = ".norm." in name
            if name.endswith("in_proj.weight"):
                tensor = tensor.flip(-1)
            is_reversed = is_reversed or name.endswith("out_proj.weight")
        moved[name] = key, tensor.flip(0) if is_reversed else tensor
    return moved
