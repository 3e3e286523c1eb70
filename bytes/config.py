"""Vocabulary, sizes and data settings of the byte models, free of torch: the command line is parsed before it loads."""

from dataclasses import dataclass, replace
from typing import Literal

from ..core.config import BackboneConfig, LanguageModelConfig, MoEConfig
from ..core.inputs import require_fractions

# Ids 0 to 255 are the bytes themselves, so that any file can be read and written.
N_BYTES, LINE_FEED = 256, 10
DOCUMENT = 256  # stands before a document's first byte, and so after its last one: both start and end
N_IDS = 257  # what a model predicts; the ids above it only pad its tables
VOCAB_SIZE = 320  # a multiple of 64, which the matrix units of a GPU want

Windows = Literal["packed", "apart"]  # how training windows are cut: see training.py

# Of core's mixers those that do not see what is to be predicted.
Mixer = Literal["mamba", "attention", "mlp", "moe", "lru", "s4d", "s4", "mamba+moe"]
Preset = Literal[
    "tiny",
    "small",
    "base",
    "mambabyte-353m",
    "mambabyte-972m",
    "mamba-25m",
    "mamba-100m",
    "moe-mamba-25m",
    "moe-mamba-100m",
]
PRESETS = {
    "tiny": BackboneConfig(d_model=128, n_layer=4),
    "small": BackboneConfig(d_model=320, n_layer=8),
    "base": BackboneConfig(d_model=512, n_layer=16),
    "mambabyte-353m": BackboneConfig(d_model=1024, n_layer=53, norm="layer"),  # arXiv 2401.13660, table 1
    "mambabyte-972m": BackboneConfig(d_model=1792, n_layer=48, norm="layer"),
    "mamba-25m": BackboneConfig(d_model=512, n_layer=16),  # arXiv 2401.04081, table 9
    "mamba-100m": BackboneConfig(d_model=768, n_layer=32),
    "moe-mamba-25m": BackboneConfig(d_model=512, n_layer=16, pattern=("mamba", "moe")),
    "moe-mamba-100m": BackboneConfig(d_model=768, n_layer=32, pattern=("mamba", "moe")),
}


def preset_config(
    preset: Preset,
    dropout: float = 0.0,
    pattern: tuple[Mixer, ...] | None = None,
    moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
) -> LanguageModelConfig:
    """The configuration of a `ByteLM` of this size. Embedding and head are not tied, as in MambaByte.

    pattern  None: the preset's own, which most often is ("mamba",)
    """
    backbone = PRESETS[preset]
    backbone = replace(backbone, dropout=dropout, pattern=pattern or backbone.pattern, moe=moe)
    return LanguageModelConfig(backbone=backbone, vocab_size=VOCAB_SIZE, tie_embeddings=False)


def name_of(id: int) -> str:
    """How an id is written in tables and pictures: a visible character of ASCII as it is, others by name or number."""
    if id == DOCUMENT:
        return "document"
    names = {9: "\\t", 10: "\\n", 13: "\\r", 32: "space"}
    return names.get(id) or (chr(id) if 33 <= id < 127 else f"0x{id:02x}")


@dataclass(frozen=True, kw_only=True)
class Dividing:
    """Dividing documents into train, valid and test. Parts that paths name stay; others are taken from train."""

    split_by: Literal["document", "position"] = "document"
    """Set aside whole documents, copies staying together; or the end of each document (for one long file)."""
    valid_fraction: float = 0.1
    """Share of the training documents set aside for validation, if no path names a validation part."""
    test_fraction: float = 0.1
    """Share of the training documents set aside for the final test, if no path names a test part; 0 for none."""

    def __post_init__(self) -> None:
        require_fractions(self.valid_fraction, self.test_fraction)
