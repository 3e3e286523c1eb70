"""Speculative decoding: a cheap drafter proposes tokens, the model reads them in one forward, and keeps a beginning.

    drafts d_1 ... d_k, drawn from q_1 ... q_k         by a smaller model, or looked up in what stands there already
    p_1 ... p_k+1                                      the model's distributions before each draft and after the last
    "exact"   keep d_i with probability min(1, p_i(d_i) / q_i(d_i)); in place of the first that is not kept, draw from
              max(p_i - q_i, 0), normalised; if all are kept, draw one more from p_k+1
              (arXiv 2211.17192, algorithm 1; arXiv 2302.01318, algorithm 2)
    "top3"    keep d_i if it is among the model's three likeliest tokens; in place of the first that is not, draw from
              p_i (MambaByte's rule, arXiv 2401.13660)

"exact" leaves every continuation as probable as it is without drafts; p is the model's distribution after temperature,
filters and penalty. "top3" does not: it writes what neither model alone would. Random numbers are used otherwise than
in `generate`, so that a seed gives another text than there, an equally probable one; at temperature 0 the very same.

A state cannot be wound back. So the state before the drafts stays until all drafts of a round are kept: until then what
was written since is read again, before the next drafts and in the same forward. A sequence with more than REREAD such
tokens drafts nothing for one round. Memory is thus two states, however many drafts.

Letters: B sequences, V vocabulary, K drafts, R recent tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from ..kernels.unchanged import unchanged
from .config import SamplingConfig, SpeculationConfig
from .drafting import Drafter, Drafts, ModelDrafter, NgramDrafter
from .errors import InputError
from .generation import (
    AS_THE_MODEL_SAYS,
    CHUNK,
    AutoregressiveModel,
    Decoder,
    State,
    Step,
    begin,
    decode,
    prefill,
    read,
    seeded,
    select_state,
    with_equal_room,
)
from .sampling import Draws, next_token_probabilities, recent_tokens, sample, with_token

REREAD = 32  # a forward of so many tokens costs little more than that of one
TOP = 3  # MambaByte's beta
EXACTLY = SpeculationConfig()


@dataclass
class Tally:
    """How speculation went, over all sequences and rounds."""

    drafted: int = 0
    kept: int = 0
    forwards: int = 0
    """Of the model after the prompt; one for each sequence of a batch."""

    @property
    def acceptance_rate(self) -> float:
        return self.kept / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Without speculation it is 1."""
        return 1 + self.kept / self.forwards if self.forwards else 1.0


def speculate(
    model: AutoregressiveModel,
    drafter: AutoregressiveModel | Literal["ngram"],
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    config: SamplingConfig = AS_THE_MODEL_SAYS,
    speculation: SpeculationConfig = EXACTLY,
    *,
    seeds: Sequence[int] | None = None,
    stop: Sequence[Sequence[int]] = (),
    chunk: int = CHUNK,
    advance: Callable[[int], object] = lambda n: None,
    tally: Tally | None = None,
) -> Iterator[Step]:
    """`generate` with drafts. What is not said here is as there; a `Step` may add several tokens to a continuation.

    drafter  a smaller model of the same tokens; or "ngram", which needs no model: see `NgramDrafter`.
    advance  is told of the prompts' tokens that were read, by the model and by a drafter that is one.
    tally    is counted up as it goes.

    Raises InputError as `generate` does, and for a drafter with another number of tokens.
    """
    seeds = begin(prompts, max_new_tokens, seeds, stop)
    logits, state = prefill(model, prompts, chunk=chunk, advance=advance)
    vocab_size = logits.shape[-1]
    if isinstance(drafter, str):
        drafts: Drafter = NgramDrafter(prompts, vocab_size, logits.device)
    else:
        drafts = ModelDrafter(drafter, prompts, chunk, advance)
    if drafts.vocab_size != vocab_size:
        raise InputError(f"the drafter has {drafts.vocab_size} tokens, the model {vocab_size}; they must be the same")
    draws = Draws(config, seeded(seeds), recent_tokens(prompts, max_new_tokens, config, logits))
    tally = Tally() if tally is None else tally
    speculator = _Speculator(model, logits, state, drafts, draws, speculation, tally)
    return decode(speculator, len(prompts), max_new_tokens, stop)


class _Speculator(Decoder):
    """A `Decoder` that has its drafts read; see the top of this file."""

    def __init__(
        self,
        model: AutoregressiveModel,
        logits: Tensor,
        state: State,
        drafter: Drafter,
        draws: Draws,
        speculation: SpeculationConfig,
        tally: Tally,
    ):
        self.model, self.logits, self.state = model, logits, state
        self.drafter, self.draws, self.speculation, self.tally = drafter, draws, speculation, tally
        self.unread: list[list[int]] = []  # what each row's state does not stand for yet
        self.kept: dict[Any, Any] = {}  # of the model's weights: forwards are too short to make it each time

    def advance(self) -> list[list[int]]:
        if self.unread:
            written = self._round()
        else:  # the prompts alone are read so far
            self.unread = written = self.draws.draw(self.logits)[:, None].tolist()
        self.drafter.append(written)
        return written

    def _round(self) -> list[list[int]]:
        drafts = self.drafter.propose(self.speculation.draft_length, self.draws)
        too_long = torch.tensor([len(tokens) > REREAD for tokens in self.unread], device=drafts.tokens.device)
        drafts = _without(drafts, too_long)
        if not drafts.tokens.shape[1] and all(len(tokens) == 1 for tokens in self.unread):
            # Nothing can be rejected, so the state may change in place, and a step is cheaper than a forward.
            tokens = torch.tensor(self.unread, device=drafts.tokens.device)[:, 0]
            self.unread = self.draws.draw(self.model.step(tokens, self.state))[:, None].tolist()
            self.tally.forwards += len(self.unread)
            return self.unread
        logits, after = self._read(drafts)
        recents = _recents(drafts, self.draws)
        p = _at_each(logits, self.draws.config, recents)
        if self.speculation.acceptance == "exact":
            n_kept, p_next = _judge_exactly(p, drafts, self.draws.generators)
        else:
            # What top-k alone would leave: temperature and the other filters do not change the order.
            top = replace(self.draws.config, temperature=1.0, top_k=TOP, top_p=1.0, min_p=0.0)
            n_kept, p_next = _judge_by_rank(p, _at_each(logits, top, recents) > 0, drafts)
        tokens = sample(p_next, self.draws.generators)
        if recents is not None:
            self.draws.recent = with_token(_at(recents, n_kept), tokens, self.draws.config)
        rows = zip(drafts.tokens.tolist(), n_kept.tolist(), tokens.tolist(), strict=True)
        written = [[*draft[:n], token] for draft, n, token in rows]
        self._go_on(n_kept == drafts.lengths, after, written)
        self.tally.drafted += int(drafts.lengths.sum())
        self.tally.kept += int(n_kept.sum())
        self.tally.forwards += len(written)
        return written

    def _read(self, drafts: Drafts) -> tuple[Tensor, State]:
        """Logits (B, K + 1, V) before each draft and after the last, the state after it."""
        device = drafts.tokens.device
        lengths = drafts.lengths.tolist()
        unread = [torch.tensor(tokens, device=device) for tokens in self.unread]
        pieces = [torch.cat((u, d[:n])) for u, d, n in zip(unread, drafts.tokens, lengths, strict=True)]
        with unchanged(self.kept):
            logits, after = read(self.model, pieces, self.state)
        last = torch.tensor([len(u) - 1 for u in unread], device=device)[:, None]
        ahead = torch.arange(drafts.tokens.shape[1] + 1, device=device).minimum(drafts.lengths[:, None])
        return logits[torch.arange(len(pieces), device=device)[:, None], last + ahead], after

    def _go_on(self, whole: Tensor, after: State, written: list[list[int]]) -> None:
        """Take the state after the drafts for the rows that kept the `whole` of them, bool (B,)."""
        if whole.all():
            self.state = after
        elif whole.any():
            self.state = pytree.tree_map(
                lambda new, old: torch.where(whole.view(-1, *[1] * (new.dim() - 1)), new, old),
                *with_equal_room(after, self.state),
            )
        rows = zip(whole.tolist(), self.unread, written, strict=True)
        self.unread = [new[-1:] if is_whole else old + new for is_whole, old, new in rows]

    def keep(self, rows: Sequence[int]) -> None:
        self.state = select_state(self.state, rows)
        self.unread = [self.unread[row] for row in rows]
        self.draws.keep(rows)
        self.drafter.keep(rows)


def _judge_exactly(p: Tensor, drafts: Drafts, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """How many drafts to keep, (B,), and what to draw the next token from, (B, V).

    p (B, K + 1, V) before each draft and after the last. A row takes as many uniform numbers as it has drafts.
    """
    numbers = [
        torch.rand(n, generator=generator, dtype=torch.float64)
        for n, generator in zip(drafts.lengths.tolist(), generators, strict=True)
    ]
    u = pad_sequence(numbers, batch_first=True).to(p)
    p_draft, q_draft = (x.gather(-1, drafts.tokens[..., None])[..., 0] for x in (p[:, :-1], drafts.q))
    n_kept = _n_leading(u * q_draft < p_draft, drafts)
    p_next = _at(p, n_kept)
    rest = (p_next - _at(F.pad(drafts.q, (0, 0, 0, 1)), n_kept)).clamp(min=0)
    # Where rounding alone refused a draft, p equals q.
    return n_kept, torch.where(rest.sum(-1, keepdim=True) == 0, p_next, rest)


def _judge_by_rank(p: Tensor, likeliest: Tensor, drafts: Drafts) -> tuple[Tensor, Tensor]:
    """`_judge_exactly` by MambaByte's rule. likeliest: bool (B, K + 1, V)."""
    n_kept = _n_leading(likeliest[:, :-1].gather(-1, drafts.tokens[..., None])[..., 0], drafts)
    return n_kept, _at(p, n_kept)


def _n_leading(kept: Tensor, drafts: Drafts) -> Tensor:
    """Of bool (B, K), how many come before the first False, or a row's end."""
    inside = torch.arange(kept.shape[1], device=kept.device) < drafts.lengths[:, None]
    return (kept & inside).long().cumprod(1).sum(1)


def _at(x: Tensor, place: Tensor) -> Tensor:
    """x (B, K, ...) at place (B,) of each row: (B, ...)."""
    return x[torch.arange(len(x), device=x.device), place]


def _without(drafts: Drafts, rows: Tensor) -> Drafts:
    """No drafts for these rows, bool (B,)."""
    lengths = drafts.lengths.masked_fill(rows, 0)
    width = int(lengths.max())
    return Drafts(drafts.tokens[:, :width], lengths, drafts.q[:, :width].masked_fill(rows[:, None, None], 0))


def _recents(drafts: Drafts, draws: Draws) -> Tensor | None:
    """What the penalty looks at before each draft and after the last: (B, K + 1, R)."""
    if draws.recent is None:
        return None
    recents = [draws.recent]
    for tokens in drafts.tokens.unbind(1):
        recents.append(with_token(recents[-1], tokens, draws.config))
    return torch.stack(recents, 1)


def _at_each(logits: Tensor, config: SamplingConfig, recents: Tensor | None) -> Tensor:
    """`next_token_probabilities` of logits (B, K, V), with recents (B, K, R)."""
    p = next_token_probabilities(logits.flatten(0, 1), config, None if recents is None else recents.flatten(0, 1))
    return p.view(logits.shape)
