"""From logits to the next token.

The order of operations is that of Hugging Face transformers' `generate` (`GenerationMixin._get_logits_processor`):

    repetition penalty    on the logits of tokens seen: divided by it if positive, multiplied if negative
                          (CTRL, arXiv 1909.05858, section 4.1); once, however often the token was seen
    temperature           logits / temperature; 0: all probability to the largest logit, and nothing below matters
    top-k                 the k largest (Fan et al., arXiv 1805.04833)
    top-p                 of those, renormalised: the fewest of the largest whose sum reaches p (arXiv 1904.09751)
    min-p                 of those: probability >= min_p * the largest probability (arXiv 2407.01082)

A filter never separates equally probable tokens: it keeps all those that tie with the last one kept. So what is kept
depends on the probabilities alone, not on the order of a sort.

Letters: B sequences, V vocabulary, R recent tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import largest
from .config import SamplingConfig
from .errors import InputError


def next_token_probabilities(logits: Tensor, config: SamplingConfig, recent: Tensor | None = None) -> Tensor:
    """The distribution that the next token is drawn from.

    logits  (B, V), any float dtype; -inf bars a token. A row with NaN, +inf or nothing but -inf gives NaN, which
            `sample` refuses.
    recent  int (B, R): the tokens that the repetition penalty looks at, latest last; -1 stands for no token. With
            config.repetition_window = n only the last n columns count.

    Returns (B, V), rows summing to 1: float32, or float64 for float64 logits.
    """
    logits = _with_penalty(logits, config, recent)
    # Relative to the largest, so that a small temperature cannot overflow.
    logits = logits - logits.amax(-1, keepdim=True)
    if config.temperature == 0:
        greedy = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
        return greedy.masked_fill(logits.isnan().any(-1, keepdim=True), torch.nan)
    logits = logits / config.temperature
    if config.top_k:
        kth_largest = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    probabilities = logits.softmax(-1)
    if config.top_p < 1:
        probabilities = _keep(probabilities, probabilities >= _smallest_in_nucleus(probabilities, config.top_p))
    if config.min_p:
        probabilities = _keep(probabilities, probabilities >= config.min_p * probabilities.amax(-1, keepdim=True))
    return probabilities


def sample(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token for each row of probabilities (B, V), which need not sum to 1: int64 (B,).

    Row b takes one uniform number from generators[b] and nothing else, so its token depends neither on the other rows
    nor on their number. A token of probability 0 is never drawn. Raises InputError for a row that is no distribution.
    """
    if len(generators) != len(probabilities):
        raise ValueError(f"{len(generators)} generators for {len(probabilities)} sequences; each needs its own")
    uniform = torch.cat([uniforms(g, 1) for g in generators])
    tokens, bad = _at_quantile(probabilities, uniform.to(probabilities.device))
    refuse(bad)
    return tokens


def uniforms(generator: torch.Generator, n: int) -> Tensor:
    """The next n uniform numbers of a generator, float64 (n,): the same ones whether asked for at once or singly."""
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)


def refuse(bad: Tensor) -> None:
    """Raise InputError if any of bad, bool (B,), is True."""
    if bad.any():
        raise InputError(
            f"row {bad.nonzero()[0].item()} of the batch: the model's logits are not finite, so there is nothing "
            "to sample from; check the weights, and use bf16 or fp32 where it ran in fp16"
        )


def choose(
    logits: Tensor, config: SamplingConfig, recent: Tensor | None, uniform: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(the next token of each row, int64 (B,); which rows have none, bool (B,)) without waiting for a GPU.

    logits, recent as in `next_token_probabilities`; uniform (B,) in [0, 1), None at temperature 0.
    """
    if config.temperature == 0:
        return largest(logits if recent is None else _with_penalty(logits, config, recent))
    assert uniform is not None
    return _at_quantile(next_token_probabilities(logits, config, recent), uniform)


def _at_quantile(probabilities: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if probabilities.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = probabilities.to(wide).cumsum(-1)
    total = cumulative[:, -1:]
    target = uniform.to(total)[:, None] * total
    # The first token whose cumulative probability exceeds the target, or, where rounding made the target the total
    # itself, the last of non-zero probability.
    return ((cumulative <= target) & (cumulative < total)).sum(-1), ~(total.isfinite() & (total > 0)).squeeze(-1)


@dataclass
class Draws:
    """What the next tokens of a batch of sequences are drawn with."""

    config: SamplingConfig
    generators: list[torch.Generator]
    recent: Tensor | None
    """int64 (B, R), from `recent_tokens`; None if nothing is penalised."""

    def draw(self, logits: Tensor) -> Tensor:
        """The next token of each sequence, int64 (B,)."""
        tokens, bad = self.choose(logits)
        refuse(bad)
        return tokens

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and which sequences have none, bool (B,), for the caller to `refuse`: nothing waits for a GPU."""
        uniform = None
        if self.config.temperature:
            uniform = torch.cat([uniforms(g, 1) for g in self.generators]).to(logits.device)
        tokens, bad = choose(logits, self.config, self.recent, uniform)
        if self.recent is not None:
            self.recent = with_token(self.recent, tokens, self.config)
        return tokens, bad

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences of the batch alone."""
        self.generators = [self.generators[row] for row in rows]
        self.recent = None if self.recent is None else self.recent[rows]


def recent_tokens(
    prompts: Sequence[Tensor], max_new_tokens: int, config: SamplingConfig, logits: Tensor
) -> Tensor | None:
    """What the repetition penalty is to look at, if there is one: int64 (B, R), -1 for no token, where `logits` are.

    With a window its last tokens, the latest last. Without one only which tokens occurred matters: column v is v if
    token v did. So R is fixed, however long the prompt.
    """
    if config.repetition_penalty == 1:
        return None
    window = min(config.repetition_window, max(len(prompt) for prompt in prompts) + max_new_tokens)
    recent = torch.full((len(prompts), window or logits.shape[-1]), -1)
    for row, prompt in zip(recent, prompts, strict=True):
        if window:
            last = prompt[-window:].cpu().long()
            row[window - len(last) :] = last
        else:
            seen = prompt.unique().cpu().long()
            row[seen] = seen
    return recent.to(logits.device)


def with_token(recent: Tensor, tokens: Tensor, config: SamplingConfig) -> Tensor:
    """`recent` after one more token, (B,), for each row."""
    if config.repetition_window:
        return torch.cat((recent[:, 1:], tokens[:, None]), dim=1)
    return recent.scatter(1, tokens[:, None], tokens[:, None])


def _with_penalty(logits: Tensor, config: SamplingConfig, recent: Tensor | None) -> Tensor:
    """The logits in float32 at least, those of recent tokens made less likely."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if recent is None or config.repetition_penalty == 1:
        return logits
    vocab_size, recent, penalty = logits.shape[-1], recent[:, -config.repetition_window :], config.repetition_penalty
    seen = torch.zeros(len(logits), vocab_size + 1, dtype=torch.bool, device=logits.device)
    seen.scatter_(1, torch.where(recent < 0, vocab_size, recent), True)  # "no token" goes to a column of its own
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen[:, :vocab_size], penalised, logits)


def _smallest_in_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """(B, 1): the smallest of the largest probabilities that are needed to reach top_p."""
    descending = probabilities.sort(-1, descending=True).values
    sum_before = F.pad(descending[:, :-1].cumsum(-1), (1, 0))
    n_kept = (sum_before < top_p).sum(-1, keepdim=True)
    return descending.gather(-1, n_kept - 1)


def _keep(probabilities: Tensor, kept: Tensor) -> Tensor:
    probabilities = torch.where(kept, probabilities, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)  # 0 / 0: a row of NaN stays one
