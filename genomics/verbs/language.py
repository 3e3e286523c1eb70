"""What the verbs of language models share."""

import json
from importlib import import_module
from pathlib import Path

import torch

from ...core.config import ComputeConfig
from ...core.errors import InputError
from ...core.hub import CONFIG
from ...core.language_model import LanguageModel
from ...core.train import pick_device
from ..caduceus import Caduceus
from ..evaluation import Reader
from ..tokenizers import load_tokenizer

# Class -> its module: models of ids of alphabet.py (and above), whose configs say `objective` and `window`.
MODELS = {"DNALanguageModel": "language_model", "Caduceus": "caduceus"}


def load_language_model(run: Path, compute: ComputeConfig) -> LanguageModel:
    """The model of a run folder, on the device. Raises InputError for another kind of model."""
    if not run.is_dir():  # from_pretrained would look for a model of this name on the hub
        raise InputError(f"{run}: no such run folder")
    name = "DNALanguageModel"
    try:
        found = json.loads((run / CONFIG).read_text(encoding="utf-8")).get("model")
        name = found if found in MODELS else name
    except (OSError, ValueError, AttributeError):
        pass  # from_pretrained says what is wrong
    model_class = getattr(import_module(f"...{MODELS[name]}", __name__), name)
    model = model_class.from_pretrained(run).to(pick_device(compute))
    if name == "Caduceus":
        reads_n_as_pretrained(model)
    return model


@torch.no_grad()
def reads_n_as_pretrained(model: Caduceus) -> None:
    """Let N have the embedding of what stood for it in pretraining: an official model never saw its own."""
    vocabulary = model.config.vocabulary
    if "N" in vocabulary and model.config.n_token != "N":
        weight = model.embedding.weight
        weight[vocabulary.index("N")] = weight[vocabulary.index(model.config.n_token)]


def load_reader(run: Path, compute: ComputeConfig) -> Reader:
    """The same with its tokenizer."""
    model = load_language_model(run, compute)
    return Reader(model, load_tokenizer(run, model.config), model.config.objective)
