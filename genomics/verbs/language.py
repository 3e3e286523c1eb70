"""What the verbs of language models share."""

from pathlib import Path

from ...core.config import ComputeConfig
from ...core.device import pick_device
from ...core.language_model import LanguageModel
from ..evaluation import Reader
from ..stored import read_language_model
from ..tokenizers import load_tokenizer


def load_language_model(run: Path, compute: ComputeConfig) -> LanguageModel:
    """The model of a run folder, on the device. Raises InputError for another kind of model."""
    return read_language_model(run).to(pick_device(compute))


def load_reader(run: Path, compute: ComputeConfig) -> Reader:
    """The same with its tokenizer."""
    model = load_language_model(run, compute)
    return Reader(model, load_tokenizer(run, model.config), model.config.objective)
