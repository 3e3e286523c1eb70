"""DNA: sequence classification from FASTA files."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alphabet import reverse_complement, tokenize
    from .config import DNAClassifierConfig
    from .dataset import LabelledSequences
    from .inference import predict_probabilities
    from .model import DNAClassifier
    from .reading.fasta import Record, read_fasta

# Lazy, so that the flags of the command line can be read before torch has loaded.
_MODULE_OF = {
    "DNAClassifier": "model",
    "DNAClassifierConfig": "config",
    "LabelledSequences": "dataset",
    "Record": "reading.fasta",
    "predict_probabilities": "inference",
    "read_fasta": "reading.fasta",
    "reverse_complement": "alphabet",
    "tokenize": "alphabet",
}

__all__ = [
    "DNAClassifier",
    "DNAClassifierConfig",
    "LabelledSequences",
    "Record",
    "predict_probabilities",
    "read_fasta",
    "reverse_complement",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
