"""What the verbs of language models share."""

from pathlib import Path

from ...core.config import ComputeConfig
from ...core.errors import InputError
from ...core.train import pick_device
from ..evaluation import Reader
from ..language_model import DNALanguageModel
from ..tokenizers import load_tokenizer


def load_language_model(run: Path, compute: ComputeConfig) -> DNALanguageModel:
    """The model of a run folder, on the device."""
    if not run.is_dir():  # from_pretrained would look for a model of this name on the hub
        raise InputError(f"{run}: no such run folder")
    return DNALanguageModel.from_pretrained(run).to(pick_device(compute))


def load_reader(run: Path, compute: ComputeConfig) -> Reader:
    """The same with its tokenizer."""
    model = load_language_model(run, compute)
    return Reader(model, load_tokenizer(run, model.config), model.config.objective)
