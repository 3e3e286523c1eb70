"""DNA: classification, labels and regression of sequences; language models; from the files that people hold."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alphabet import reverse_complement, tokenize
    from .annotator import DNAAnnotator
    from .caduceus import Caduceus, CaduceusClassifier
    from .commands import Dividing, Source
    from .config import (
        CaduceusClassifierConfig,
        CaduceusConfig,
        DNAAnnotatorConfig,
        DNAClassifierConfig,
        DNALanguageModelConfig,
    )
    from .dataset import LabelledSequences
    from .dividing import divide
    from .inference import embed, predict
    from .language_model import DNALanguageModel
    from .model import DNAClassifier
    from .reading.fasta import read_fasta
    from .reading.format import Record
    from .reading.genome import Genome
    from .reading.records import read_records
    from .sources import read_source

# Lazy, so that the flags of the command line can be read before torch has loaded.
_MODULE_OF = {
    "Caduceus": "caduceus",
    "CaduceusClassifier": "caduceus",
    "CaduceusClassifierConfig": "config",
    "CaduceusConfig": "config",
    "DNAAnnotator": "annotator",
    "DNAAnnotatorConfig": "config",
    "DNAClassifier": "model",
    "DNAClassifierConfig": "config",
    "DNALanguageModel": "language_model",
    "DNALanguageModelConfig": "config",
    "Dividing": "commands",
    "Genome": "reading.genome",
    "LabelledSequences": "dataset",
    "Record": "reading.format",
    "Source": "commands",
    "divide": "dividing",
    "embed": "inference",
    "predict": "inference",
    "read_fasta": "reading.fasta",
    "read_records": "reading.records",
    "read_source": "sources",
    "reverse_complement": "alphabet",
    "tokenize": "alphabet",
}

__all__ = [
    "Caduceus",
    "CaduceusClassifier",
    "CaduceusClassifierConfig",
    "CaduceusConfig",
    "DNAAnnotator",
    "DNAAnnotatorConfig",
    "DNAClassifier",
    "DNAClassifierConfig",
    "DNALanguageModel",
    "DNALanguageModelConfig",
    "Dividing",
    "Genome",
    "LabelledSequences",
    "Record",
    "Source",
    "divide",
    "embed",
    "predict",
    "read_fasta",
    "read_records",
    "read_source",
    "reverse_complement",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
