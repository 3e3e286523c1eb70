"""A model of single bases: which class, which labels or which number is that of each base of a stretch of DNA?

    tokens -> embedding -> backbone -> linear head at each base

A bidirectional backbone sees a window, whose inner bases it knows best; a causal one carries its state along a
chromosome of any length. With both_strands the other strand is read too, by the same weights, and what is said of a
base is the mean; of a stranded model the labels of the strands are exchanged in it, so that the annotation of a reverse
complement is the annotation, backwards, with the strands exchanged.

Letters: B batch, L length, D = d_model, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.backbone import Backbone, State
from ..core.hub import PretrainedModel
from .alphabet import COMPLEMENT, VOCAB_SIZE
from .caduceus import both_strands, over_strands
from .config import DNAAnnotatorConfig
from .model import predictions_of


class DNAAnnotator(PretrainedModel):
    """Logits (B, L, K) for token sequences (B, L)."""

    config_class = DNAAnnotatorConfig
    config: DNAAnnotatorConfig
    complement: Tensor
    other_strand: Tensor

    def __init__(self, config: DNAAnnotatorConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(VOCAB_SIZE, config.backbone.d_model)
        self.backbone = Backbone(config.backbone)
        self.head = nn.Linear(config.backbone.d_model, len(config.classes))
        self.register_buffer("complement", torch.tensor(COMPLEMENT), persistent=False)
        self.register_buffer("other_strand", torch.tensor(config.other_strand), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens int (B, L) of genomics.alphabet, mask bool (B, L) True = real base; padding changes no real base's."""
        if not self.config.both_strands:
            return self.head(self.backbone(self.embedding(tokens), padding_mask=mask))
        of_both = None if mask is None else torch.cat((mask, mask.flip(1)))
        h = over_strands(self.backbone, self.embedding(both_strands(tokens, self.complement)), of_both)
        this, other = self.head(h).chunk(2)
        return (this + other.flip(1)[..., self.other_strand]) / 2

    def carried(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Of a causal model the logits of bases (B, L) that follow others, whose state is given, and the new state."""
        h, after = self.backbone(self.embedding(tokens), state, return_state=True)
        assert after is not None
        return self.head(h), after

    def predictions(self, logits: Tensor) -> Tensor:
        """Logits (..., K) -> probabilities of the classes or of each label, or values (..., 1)."""
        return predictions_of(logits, self.config)
