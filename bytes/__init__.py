"""Any file's bytes: a token-free language model, trained on, measured on and writing raw bytes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Dividing, preset_config
    from .corpus import divide, open_corpus
    from .documents import Document, Documents, find_files
    from .evaluation import Score, check_causality, score
    from .model import ByteLM
    from .noise import spoil
    from .stream import as_text

# Lazy, so that the flags of the command line can be read before torch has loaded.
_MODULE_OF = {
    "ByteLM": "model",
    "Dividing": "config",
    "Document": "documents",
    "Documents": "documents",
    "Score": "evaluation",
    "as_text": "stream",
    "check_causality": "evaluation",
    "divide": "corpus",
    "find_files": "documents",
    "open_corpus": "corpus",
    "preset_config": "config",
    "score": "evaluation",
    "spoil": "noise",
}

__all__ = [
    "ByteLM",
    "Dividing",
    "Document",
    "Documents",
    "Score",
    "as_text",
    "check_causality",
    "divide",
    "find_files",
    "open_corpus",
    "preset_config",
    "score",
    "spoil",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
