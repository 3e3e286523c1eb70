"""A language model of DNA: which base stands here?

    tokens -> embedding -> Mamba backbone -> logits over the tokens

causal (next)   from the bases before it: a state is carried, sequences of any length are scored and written
masked          from both sides, for bases that are hidden: a bidirectional backbone
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.language_model import LanguageModel
from .config import DNALanguageModelConfig


class DNALanguageModel(LanguageModel):
    """Logits (B, L, vocab_size) for token ids (B, L); all else as of `core.LanguageModel`."""

    config_class = DNALanguageModelConfig

    def __init__(self, config: DNALanguageModelConfig):
        super().__init__(config)  # pyright: ignore[reportArgumentType] - it has those fields
        self.lm_head = ExactHead(self.lm_head)


class ExactHead(nn.Linear):
    """A head that computes in its weight's own dtype under autocast, too; it takes the place of `head`.

    Logits rounded to bfloat16 are off by a hundredth, at every base: summed over the bases that follow a variant, that
    is a sixth of the spread of its effects (measured), and a twelfth of that with these. A dozen columns cost nothing.
    """

    def __init__(self, head: nn.Linear):
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight  # tied to the embedding, perhaps

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight)
