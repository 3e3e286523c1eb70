"""Drafters for speculative decoding: cheap guesses at what a model will write.

Letters: B sequences, V vocabulary, K drafts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .generation import AutoregressiveModel, prefill, read, select_state
from .sampling import Draws, next_token_probabilities, sample, with_token

LOOKBACK = 1 << 16  # tokens before the end in which an earlier occurrence is looked for
LONGEST = 32  # tokens of an end that are looked up
SHORTEST = 6  # what bytes need: after fewer, too little of what followed comes again (measured; so does a fixed length)


class Drafts(NamedTuple):
    """Proposed continuations of a batch of sequences."""

    tokens: Tensor  # int64 (B, K), 0 after a row's last one
    lengths: Tensor  # int64 (B,)
    q: Tensor  # (B, K, V): the distributions that they were drawn from, 0 after a row's last one


class Drafter(Protocol):
    """Follows a batch of sequences and proposes how they might go on."""

    vocab_size: int

    def propose(self, length: int, draws: Draws) -> Drafts:
        """Up to `length` tokens for each sequence."""
        ...

    def append(self, tokens: list[list[int]]) -> None:
        """What was really written since: some for each sequence."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences of the batch alone."""
        ...


class NgramDrafter:
    """Looks the end of a sequence up in what stands before it, and proposes what followed there.

    The longest end that occurred counts, and of its occurrences the latest: "prompt lookup". Where fewer than SHORTEST
    tokens at the end occurred before, nothing is proposed.
    """

    def __init__(self, prompts: Sequence[Tensor], vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device
        # A token as a character: searching a str is fast.
        self.texts = ["".join(map(chr, prompt[-LOOKBACK:].tolist())) for prompt in prompts]

    def propose(self, length: int, draws: Draws) -> Drafts:
        found = [what_followed(text, length) for text in self.texts]
        lengths = torch.tensor([len(tokens) for tokens in found], device=self.device)
        width = max(map(len, found))
        tokens = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in found], device=self.device).long()
        q = F.one_hot(tokens, self.vocab_size).float()  # no chance is involved
        beyond = torch.arange(width, device=self.device) >= lengths[:, None]
        return Drafts(tokens, lengths, q.masked_fill(beyond[..., None], 0))

    def append(self, tokens: list[list[int]]) -> None:
        self.texts = [(t + "".join(map(chr, new)))[-LOOKBACK:] for t, new in zip(self.texts, tokens, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]


def what_followed(text: str, length: int) -> list[int]:
    """The code points after the latest earlier occurrence of the longest end of `text`; beyond its end, over again."""
    n, end = 0, len(text) - 1
    while n < min(LONGEST, len(text) - 1):
        at = text.rfind(text[-n - 1 :], 0, end)  # a longer end occurred where the shorter one did, or before
        if at < 0:
            break
        n, end = n + 1, at + n + 1
    if n < SHORTEST:
        return []
    period = text[end:]
    return [ord(character) for character in (period * -(-length // len(period)))[:length]]


class ModelDrafter:
    """Draws from a smaller model under the settings of the larger one."""

    def __init__(
        self, model: AutoregressiveModel, prompts: Sequence[Tensor], chunk: int, advance: Callable[[int], object]
    ):
        logits, self.state = prefill(model, prompts, chunk=chunk, advance=advance)
        self.model, self.vocab_size, self.device = model, logits.shape[-1], logits.device
        self.unread: list[list[int]] = [[] for _ in prompts]

    @torch.no_grad()
    def propose(self, length: int, draws: Draws) -> Drafts:
        unread = [torch.tensor(tokens, device=self.device) for tokens in self.unread]
        logits, self.state = read(self.model, unread, self.state, only_last=True)
        self.unread = [[] for _ in unread]
        state = select_state(self.state, range(len(unread)))  # for drafts that may be rejected
        tokens, q, recent = [], [], draws.recent
        for i in range(length):
            if i:
                logits = self.model.step(tokens[-1], state)
            q.append(next_token_probabilities(logits, draws.config, recent))
            tokens.append(sample(q[-1], draws.generators))
            recent = None if recent is None else with_token(recent, tokens[-1], draws.config)
        lengths = torch.full((len(unread),), length, device=self.device)
        return Drafts(torch.stack(tokens, 1), lengths, torch.stack(q, 1))

    def append(self, tokens: list[list[int]]) -> None:
        self.unread = [old + new for old, new in zip(self.unread, tokens, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        self.state = select_state(self.state, rows)
        self.unread = [self.unread[row] for row in rows]
