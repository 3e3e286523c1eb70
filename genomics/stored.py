"""Language models in folders, of whatever class, and classifiers and annotators that begin with one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.config import BackboneConfig
from ..core.errors import InputError
from ..core.hub import CONFIG, WEIGHTS, model_name
from .alphabet import VOCAB_SIZE, N
from .annotator import DNAAnnotator
from .caduceus import Caduceus, ids_of
from .config import DNAClassifierConfig
from .language_model import DNALanguageModel
from .model import DNAClassifier
from .tokenizers import CHARACTERS, load_tokenizer


def require_run_folder(folder: Path) -> None:
    """Raises InputError if there is none: from_pretrained would look for a model of this name on the hub."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")


@torch.no_grad()
def read_language_model(folder: Path) -> DNALanguageModel | Caduceus:
    """The model in a folder of `pretrain` or `convert caduceus`. Raises InputError if there is none.

    It reads N as what stood for it in pretraining: an official model never saw its own.
    """
    require_run_folder(folder)
    if model_name(folder) != "Caduceus":
        return DNALanguageModel.from_pretrained(folder)
    model = Caduceus.from_pretrained(folder)
    ids, weight = ids_of(model.config), model.embedding.weight
    weight[ids[N]] = weight[model.config.vocabulary.index(model.config.n_token)]
    return model


class Start(NamedTuple):
    """What a language model has learned that a classifier can begin with."""

    config: BackboneConfig
    both_strands: bool  # it reads both with the same weights
    window: int  # bases of the windows that it was trained on
    embedding: Tensor  # (VOCAB_SIZE, D)
    backbone: dict[str, Tensor]
    files: list[Path]


def read_start(folder: Path) -> Start:
    """From a language model's folder. Raises InputError if it holds none of single bases."""
    model = read_language_model(folder)
    if load_tokenizer(folder, model.config) is not CHARACTERS:
        raise InputError(f"{folder}: reads tokens of several bases; only models of --tokenizer char will do here")
    ids, both_strands = list(range(VOCAB_SIZE)), False
    if isinstance(model, Caduceus):
        ids, both_strands = ids_of(model.config), model.config.rcps
    return Start(
        model.config.backbone,
        both_strands,
        model.config.window,
        model.embedding.weight.detach()[torch.tensor(ids)],
        model.backbone.state_dict(),
        [folder / CONFIG, folder / WEIGHTS],
    )


@torch.no_grad()
def begin_with(model: DNAClassifier | DNAAnnotator, start: Start, lr_scale: float | None) -> None:
    """Give the model that backbone and its embedding, to learn at lr_scale times the head's rate; None: never.

    What a classifier is told of the places in its window begins at nothing: the backbone sees at first what it knows.
    """
    model.embedding.weight.copy_(start.embedding)
    model.backbone.load_state_dict(start.backbone)
    begun: list[nn.Module] = [model.embedding, model.backbone]
    if isinstance(model, DNAClassifier) and model.place is not None:
        model.place.weight.zero_()
        begun.append(model.place)
    for parameter in (p for module in begun for p in module.parameters()):
        if lr_scale is None:
            parameter.requires_grad_(False)
        else:
            parameter._lr_scale = lr_scale  # pyright: ignore[reportAttributeAccessIssue] - read by optim.py


def embedding_model(folder: Path) -> DNAClassifier:
    """A language model's backbone as a classifier whose head has learned nothing: what `embed` asks for."""
    start = read_start(folder)
    shape = {"backbone": start.config, "both_strands": start.both_strands, "window": start.window}
    model = DNAClassifier(DNAClassifierConfig(**shape, classes=("",), target="regression", n_heads=0))
    begin_with(model, start, None)
    return model.eval()
