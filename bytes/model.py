"""ByteLM: a language model over raw bytes, with no tokenizer (MambaByte, arXiv 2401.13660).

`core.LanguageModel` with ids of its own (config.py). Departs from the paper's code in the norm: RMSNorm, where it has
LayerNorm with a bias. B batch, L length.
"""

from typing import Any

import torch
from torch import Tensor

from ..core.backbone import State
from ..core.config import LanguageModelConfig
from ..core.language_model import LanguageModel
from .config import N_IDS


class ByteLM(LanguageModel):
    """Logits (B, L, N_IDS) of the next byte, or of the document's end, for ids (B, L): bytes, or DOCUMENT.

    Raises ValueError for a vocabulary without DOCUMENT, and for a backbone that sees what is to be predicted.
    """

    def __init__(self, config: LanguageModelConfig):
        if config.vocab_size < N_IDS:
            raise ValueError(f"vocab_size is {config.vocab_size}; bytes and the document mark need at least {N_IDS}")
        if config.backbone.bidirectional:
            raise ValueError("a bidirectional backbone sees the bytes that it should predict; use causal mixers")
        super().__init__(config)

    def forward(self, tokens: Tensor, state: State | None = None, **options: Any) -> Any:
        """ids int (B, L) -> logits, or (logits, state) with return_state=True. Options as of `Backbone.forward`."""
        out = super().forward(tokens, state, **options)
        # What only pads the head cannot be predicted: neither loss nor sampling sees it.
        return (out[0][..., :N_IDS], out[1]) if isinstance(out, tuple) else out[..., :N_IDS]

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> Tensor:
        """One id for each sequence: int (B,) -> logits (B, N_IDS); `state` updated in place."""
        return super().step(tokens, state)[..., :N_IDS]
