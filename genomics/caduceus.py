"""Caduceus (arXiv 2403.03234): masked language models of DNA that read both ways, and both strands.

    Ph   tokens -> embedding -> layers of BiMamba -> head
    PS   the same of a sequence and of its reverse complement, by the same weights; the logits of a base are the sum of
         what one strand says of it and what the other says of its complement

         x        -> E -> BiMamba .. BiMamba -> head ------------------------------+-> logits
         rc(x)    -> E -> BiMamba .. BiMamba -> head -> backwards, complemented ---+

So PS is reverse-complement equivariant: the logits of rc(x) are those of x, backwards and complemented. The paper keeps
the second strand as channels D .. 2D of the first one's places, reversed in places and channels, which its embedding,
mixers, norms and head have to undo and redo (its RCPS modules). Here each strand stands in its own direction and order
of channels, the two on the batch axis: every layer is a plain one, both strands are one launch, nothing is flipped
before the end. What becomes of the official code's other norm is in official.py.

Under activation checkpointing the strands follow one another: it is for windows whose memory is scarce, and of what a
layer needs while it is run again only one strand's then has to be there. At 2^20 bases either fills a GPU alone.

Letters: B batch, L length, D = d_model, V vocabulary, S strands, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.backbone import Backbone
from ..core.hub import PretrainedModel
from ..core.language_model import LanguageModel
from ..core.parallel import backwards
from .alphabet import COMPLEMENT, TOKEN_NAMES
from .config import CaduceusClassifierConfig, CaduceusConfig
from .language_model import ExactHead

NEVER = -1e4  # finite: where nothing is asked, its likelihood times a weight of 0 is 0


def complements(vocabulary: tuple[str, ...], vocab_size: int) -> list[int]:
    """The id of each id's complement: of A that of T, of N and other tokens and of padding their own."""
    of_name = {name: TOKEN_NAMES[COMPLEMENT[i]] for i, name in enumerate(TOKEN_NAMES)}
    return [vocabulary.index(of_name[name]) for name in vocabulary] + list(range(len(vocabulary), vocab_size))


def both_strands(tokens: Tensor, complement: Tensor) -> Tensor:
    """Ids (B, L), and below them their reverse complements: (2B, L). complement: of each id."""
    tokens = tokens.long()  # uint8 would index as a mask
    return torch.cat((tokens, complement[backwards(tokens)]))


def over_strands(backbone: Backbone, x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """The backbone over both strands, x (2B, L, D): at once, or one after the other under activation checkpointing."""
    if not (backbone.gradient_checkpointing and torch.is_grad_enabled()):
        h = backbone(x, padding_mask=padding_mask)
        assert isinstance(h, Tensor)  # it has no state
        return h
    masks = (None, None) if padding_mask is None else padding_mask.chunk(2)
    return torch.cat([backbone(strand, padding_mask=mask) for strand, mask in zip(x.chunk(2), masks, strict=True)])


class Caduceus(LanguageModel):
    """Logits (B, L, V) for token ids (B, L) of genomics.alphabet, in its order: V is at least its size.

    A vocabulary of another order (PlantCaduceus's) is translated: what it does not know it reads as [UNK], and says
    with a probability of 0 (a logit of NEVER).
    """

    config_class = CaduceusConfig
    config: CaduceusConfig
    complement: Tensor
    ids: Tensor
    unknown: Tensor

    def __init__(self, config: CaduceusConfig):
        super().__init__(config)  # pyright: ignore[reportArgumentType] - it has those fields
        self.lm_head = ExactHead(self.lm_head)
        of_complement = torch.tensor(complements(config.vocabulary, config.vocab_size))
        self.register_buffer("complement", of_complement, persistent=False)
        self.translates = config.vocabulary != TOKEN_NAMES
        self.register_buffer("ids", torch.tensor(ids_of(config)), persistent=False)
        unknown = [name not in config.vocabulary for name in TOKEN_NAMES]
        self.register_buffer("unknown", torch.tensor(unknown), persistent=False)

    def hidden(self, tokens: Tensor, padding_mask: Tensor | None = None, *, rcps: bool | None = None) -> Tensor:
        """(S, B, L, D): what the backbone makes of each strand, in that strand's own direction.

        rcps   whether to read both; by default what the configuration says
        """
        rcps = self.config.rcps if rcps is None else rcps
        tokens = self.ids[tokens.long()] if self.translates else tokens.long()
        if rcps:
            tokens = both_strands(tokens, self.complement)
            padding_mask = None if padding_mask is None else torch.cat((padding_mask, backwards(padding_mask)))
            strands = over_strands(self.backbone, self.embedding(tokens), padding_mask).unflatten(0, (2, -1))
        else:
            strands = self.backbone(self.embedding(tokens), padding_mask=padding_mask)[None]
        return backwards(strands, 2).flip(0, 3) if self.config.mirrored else strands

    def forward(self, tokens: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """padding_mask   bool (B, L), True = real token; padding changes no real token's logits."""
        of_strands = self.lm_head(self.hidden(tokens, padding_mask))
        logits = of_strands[0]
        if self.config.rcps:
            logits = logits + backwards(of_strands[1])[..., self.complement]
        return logits[..., self.ids].masked_fill(self.unknown, NEVER) if self.translates else logits


class CaduceusClassifier(PretrainedModel):
    """Logits (B, K) for token ids (B, L): the official head, a linear one without a bias over a mean or a maximum."""

    config_class = CaduceusClassifierConfig

    def __init__(self, config: CaduceusClassifierConfig):
        super().__init__(config)
        self.trunk = Caduceus(config.trunk)
        del self.trunk.lm_head
        self.score = nn.Linear(config.trunk.backbone.d_model, config.n_classes, bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """padding_mask as for `Caduceus`: the pooling leaves padding out."""
        rcps = self.config.trunk.rcps or self.config.conjoin
        h = self.trunk.hidden(tokens, padding_mask, rcps=rcps)
        mask = torch.ones_like(tokens, dtype=torch.bool) if padding_mask is None else padding_mask
        mask = torch.stack((mask, mask.flip(1))[: len(h)])[..., None]
        if self.config.pooling == "max":
            pooled = h.masked_fill(~mask, -torch.inf).amax(2)
        else:
            pooled = h.masked_fill(~mask, 0).sum(2) / mask.sum(2)
        return self.score(pooled).mean(0)


def ids_of(config: CaduceusConfig) -> list[int]:
    """The model's id for each token of `alphabet`."""
    unknown = config.vocabulary.index("[UNK]")
    return [config.vocabulary.index(name) if name in config.vocabulary else unknown for name in TOKEN_NAMES]
