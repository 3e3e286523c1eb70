"""A language model of DNA: which base stands here?

    tokens -> embedding -> Mamba backbone -> logits over the tokens

causal (next)   from the bases before it: a state is carried, sequences of any length are scored and written
masked          from both sides, for bases that are hidden: a bidirectional backbone
"""

from __future__ import annotations

from ..core.language_model import LanguageModel
from .config import DNALanguageModelConfig


class DNALanguageModel(LanguageModel):
    """Logits (B, L, vocab_size) for token ids (B, L); all else as of `core.LanguageModel`."""

    config_class = DNALanguageModelConfig

    def __init__(self, config: DNALanguageModelConfig):
        super().__init__(config)  # pyright: ignore[reportArgumentType] - it has those fields
