"""What the verbs of language models share."""

from pathlib import Path

from ...core.config import ComputeConfig
from ...core.errors import InputError
from ...core.train import pick_device
from ..language_model import DNALanguageModel


def load_language_model(run: Path, compute: ComputeConfig) -> DNALanguageModel:
    """The model of a run folder, on the device."""
    if not run.is_dir():  # from_pretrained would look for a model of this name on the hub
        raise InputError(f"{run}: no such run folder")
    return DNALanguageModel.from_pretrained(run).to(pick_device(compute))


def load_causal_model(run: Path, compute: ComputeConfig, verb: str) -> DNALanguageModel:
    """The same. Raises InputError if it sees both ways."""
    model = load_language_model(run, compute)
    if model.config.objective != "next":
        raise InputError(f"{run}: a masked model, which sees both ways; {verb} needs one of pretrain --objective next")
    return model
