"""A small byte model, and documents in files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polymamba.bytes import ByteLM, Document, Documents
from polymamba.core import BackboneConfig, LanguageModelConfig


@pytest.fixture
def model() -> ByteLM:
    torch.manual_seed(1)
    backbone = BackboneConfig(d_model=16, n_layer=2, d_state=4)
    model = ByteLM(LanguageModelConfig(backbone=backbone, vocab_size=320, tie_embeddings=False)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # sure of itself, so that a wrong context shows
    return model


@pytest.fixture
def documents(as_documents, tmp_path) -> Documents:
    """Of 1, 205, 39 and 2 bytes."""
    texts = [
        b"x",
        b"It was the best of times, " * 7 + b"it was the worst of tim",
        "日本語 and 😀\n".encode() * 2 + b"1",
        b"\xff\n",
    ]
    return as_documents(tmp_path / "documents", texts)


@pytest.fixture
def as_documents() -> Callable[[Path, list[bytes]], Documents]:
    """Texts as files of a new folder."""

    def write(folder: Path, texts: list[bytes]) -> Documents:
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / str(i)).write_bytes(text)
        return Documents(Document(folder / str(i), 0, len(text)) for i, text in enumerate(texts))

    return write
