"""Where a classifier's backbone begins: at that of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.config import BackboneConfig
from ..core.errors import InputError
from ..core.hub import CONFIG, WEIGHTS, model_name
from .alphabet import VOCAB_SIZE, N
from .caduceus import Caduceus, ids_of
from .config import DNALanguageModelConfig
from .language_model import DNALanguageModel
from .model import DNAClassifier


class Start(NamedTuple):
    """What a language model has learned that a classifier can begin with."""

    config: BackboneConfig
    both_strands: bool  # it reads both with the same weights
    embedding: Tensor  # (VOCAB_SIZE, D)
    backbone: dict[str, Tensor]
    files: list[Path]


def read_start(folder: Path) -> Start:
    """From a folder of `pretrain` or `convert caduceus`. Raises InputError if it holds no model of single bases."""
    if not folder.is_dir():  # from_pretrained would look for a model of this name on the hub
        raise InputError(f"{folder}: no such folder; --init takes one of `pretrain` or of `polymamba convert caduceus`")
    model = (Caduceus if model_name(folder) == "Caduceus" else DNALanguageModel).from_pretrained(folder)
    ids = list(range(VOCAB_SIZE))
    if isinstance(model, Caduceus):
        ids = ids_of(model.config)
        ids[N] = model.config.vocabulary.index(model.config.n_token)
    elif isinstance(model.config, DNALanguageModelConfig) and model.config.tokenizer != "char":
        raise InputError(f"{folder}: its tokens are {model.config.tokenizer}; a classifier reads single bases (char)")
    return Start(
        model.config.backbone,
        isinstance(model, Caduceus) and model.config.rcps,
        model.embedding.weight.detach()[torch.tensor(ids)],
        model.backbone.state_dict(),
        [folder / CONFIG, folder / WEIGHTS],
    )


@torch.no_grad()
def begin_with(model: DNAClassifier, start: Start, lr_scale: float | None) -> None:
    """Give the classifier that backbone and its embedding, to learn at lr_scale times the head's rate; None: never.

    What it is told of the places in its window begins at nothing, so that the backbone sees at first what it knows.
    """
    model.embedding.weight.copy_(start.embedding)
    model.backbone.load_state_dict(start.backbone)
    begun: list[nn.Module] = [model.embedding, model.backbone]
    if model.place is not None:
        model.place.weight.zero_()
        begun.append(model.place)
    for parameter in (p for module in begun for p in module.parameters()):
        if lr_scale is None:
            parameter.requires_grad_(False)
        else:
            parameter._lr_scale = lr_scale  # pyright: ignore[reportAttributeAccessIssue] - read by optim.py
