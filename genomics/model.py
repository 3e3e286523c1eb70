"""A DNA sequence model: which class, which labels or which number belongs to this stretch of DNA?

    tokens -> embedding + place in the window -> bidirectional Mamba backbone -> attention pooling -> linear head

Unusual about it: each base is told its distance from both ends of its window, and the pooling's attention sees these
distances too. Signals such as splice sites sit at a fixed place of a window cut around them, and a mean over bases
forgets where a motif stood: on the splice example that costs 0.15 of accuracy. Where composition is the signal (which
species?) there are no places to be told, and the mean takes the attention's place.

Letters: B batch, L length, D = d_model, H pooling heads, F position features, K classes.
"""

import math

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from ..core.backbone import Backbone, State
from ..core.batching import at_places
from ..core.hub import PretrainedModel
from .alphabet import COMPLEMENT, VOCAB_SIZE
from .caduceus import both_strands, over_strands
from .config import DNAAnnotatorConfig, DNAClassifierConfig

N_WAVES = 16  # per end of the window


def predictions_of(logits: Tensor, config: DNAClassifierConfig | DNAAnnotatorConfig) -> Tensor:
    """Logits (..., K) -> probabilities of the classes or of each label, or values (..., 1)."""
    if config.target == "multiclass":
        return logits.softmax(-1)
    if config.target == "multilabel":
        return logits.sigmoid()
    return config.mean + config.scale * logits


def window_position(mask: Tensor) -> Tensor:
    """Sinusoids of each base's distances to the first and the last base of its window: (B, L, F = 4 N_WAVES).

    As in arXiv 1706.03762, section 3.5, for either end; wavelengths from 6 to 35,000 bases, so that both a splice
    site's exact base and a place in 100 kb can be told. mask (B, L), True = real base, in one run.
    """
    from_start = mask.cumsum(1) - 1
    from_end = mask.sum(1, keepdim=True) - 1 - from_start
    distances = torch.stack((from_start, from_end), dim=-1).float()
    waves = torch.arange(N_WAVES, device=mask.device)
    angles = distances[..., None] * torch.exp(-math.log(10_000) * waves / N_WAVES)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(2)


class RunningNorm(nn.Module):
    """x less its running mean, over its running standard deviation: (B, D) -> (B, D).

    Means over long windows hardly differ from window to window; this brings what differs to a scale that a linear head
    can learn from. Unlike batch normalisation it takes batches of one sequence, and is the same in training.
    """

    mean: Tensor
    variance: Tensor
    n_batches: Tensor

    def __init__(self, width: int, momentum: float = 0.05, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("n_batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.n_batches += 1
                weight = torch.clamp(1 / self.n_batches, min=self.momentum)
                self.mean.lerp_(x.mean(0), weight)
                self.variance.lerp_((x - self.mean).square().mean(0), weight)
        return (x - self.mean) * torch.rsqrt(self.variance + self.eps)


class WindowPooling(nn.Module):
    """H weighted means over the bases; a head's weights follow from what stands at a base and where it stands."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.by_content = nn.Linear(d_model, n_heads)
        self.by_place = nn.Linear(4 * N_WAVES, n_heads, bias=False)
        nn.init.normal_(self.by_place.weight)  # large: the heads begin by looking at places of their own

    def forward(self, h: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        """h (B, L, D), place (B, L, F), mask (B, L) -> (B, H * D)."""
        scores = self.by_content(h) + self.by_place(place.to(h.dtype))
        weights = scores.float().masked_fill(~mask[..., None], -torch.inf).softmax(dim=1)
        return rearrange(einsum(weights.to(h.dtype), h, "b l h, b l d -> b h d"), "b h d -> b (h d)")


def mean_over(h: Tensor, mask: Tensor) -> Tensor:
    """The mean over the real bases: h (B, L, D), zero at padding, as Backbone leaves it, and mask (B, L) -> (B, D)."""
    return (h.float().sum(1) / mask.sum(1, keepdim=True)).to(h.dtype)


class DNAClassifier(PretrainedModel):
    """Logits (B, K) for token sequences (B, L).

    The head sees the weighted means of the pooling, which tell what stands at their places (which splice site?); with
    n_heads = 0 the mean over all bases, which tells composition (which species?), and the model is told no places. Not
    both: beside the weighted means, the plain one cost half a percent of accuracy on splice sites.

    With last_base, and no heads either, it sees what a causal backbone has made of all bases by the last one.

    With both_strands the logits are the mean of those of the two strands, which are read by the same weights.
    """

    config_class = DNAClassifierConfig
    complement: Tensor

    def __init__(self, config: DNAClassifierConfig):
        super().__init__(config)
        d_model = config.backbone.d_model
        self.embedding = nn.Embedding(VOCAB_SIZE, d_model)
        self.place = nn.Linear(4 * N_WAVES, d_model, bias=False) if config.n_heads else None
        self.backbone = Backbone(config.backbone)
        self.pooling = WindowPooling(d_model, config.n_heads) if config.n_heads else None
        self.mean_norm = None if config.n_heads else RunningNorm(d_model)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(max(config.n_heads, 1) * d_model, len(config.classes))
        self.register_buffer("complement", torch.tensor(COMPLEMENT), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        if self.place is not None:
            nn.init.normal_(self.place.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens int (B, L) of genomics.alphabet, mask bool (B, L) True = real base, padded on the right -> (B, K)."""
        h, place, mask = self.hidden(tokens, mask)
        if self.pooling is not None:
            pooled = self.pooling(h, place, mask)
        else:
            assert self.mean_norm is not None
            pooled = at_places(h, mask.sum(1) - 1) if self.config.last_base else mean_over(h, mask)
            pooled = self.mean_norm(pooled.float()).to(h.dtype)
        return self._mean_of_strands(self.head(self.dropout(pooled)))

    def embed(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of the last hidden states over the real bases: (B, L) as for `forward` -> (B, D)."""
        h, _, mask = self.hidden(tokens, mask)
        return self._mean_of_strands(mean_over(h, mask).float())

    def states(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last hidden states of the bases, of both strands their mean: (B, L) as for `forward` -> (B, L, D)."""
        h, _, _ = self.hidden(tokens, mask)
        if not self.config.both_strands:
            return h
        this, other = h.chunk(2)
        return (this + other.flip(1)) / 2

    def carried(self, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
        """`states` of bases that follow others, whose state is given, and the new state. Causal, and told no places."""
        h, after = self.backbone(self.embedding(tokens), state, return_state=True)
        assert after is not None
        return h, after

    def hidden(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, L, D), window positions (B, L, F) and the mask (B, L); with both_strands 2B of each."""
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        if self.config.both_strands:
            tokens, mask = both_strands(tokens, self.complement), torch.cat((mask, mask.flip(1)))
        place = window_position(mask)
        x = self.embedding(tokens)
        if self.place is not None:
            x = x + self.place(place.to(x.dtype))
        both = self.config.both_strands
        h = over_strands(self.backbone, x, mask) if both else self.backbone(x, padding_mask=mask)
        return h, place, mask

    def _mean_of_strands(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (2, -1)).mean(0) if self.config.both_strands else x

    def predictions(self, logits: Tensor) -> Tensor:
        """Logits (B, K) -> probabilities of the classes (rows sum to 1) or of each label, or values (B, 1)."""
        return predictions_of(logits, self.config)
