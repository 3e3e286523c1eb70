"""Training a byte model: the bytes side of core/train.py.

Windows are cut from the stream of all training documents (documents.py), so none holds padding. Where a document ends
inside a window, the DOCUMENT mark says so to the model, which learns to forget there. (Cutting the state with
cu_seqlens instead would do without that, but needs batches of one row; and a model that is to end a document by itself
has to see the mark anyway.)

A few long documents show the mark hardly ever, and a model would read it, before a document's first byte, for the first
time when it is evaluated or begins to write. So some windows get the mark in place of their first id, as if a document
began there: that id is only an input in this window, so that no target is lost.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.config import TrainConfig
from ..core.train import Task
from .config import DOCUMENT
from .documents import Documents
from .evaluation import check_causality, score
from .terminal import progress_bar

MARKED = 0.05  # share of an epoch's windows that have a mark, at least


class TrainBytes(Task):
    """Next-byte prediction in windows of `context` bytes; judged by bits per byte of the validation documents.

    Each epoch reads the stream once, cut at other places than the epoch before. What does not fill a window, before the
    first cut and after the last one, waits for the next epoch. A corpus shorter than a window makes the window shorter.
    """

    def __init__(self, train: Documents, valid: Documents, config: TrainConfig, context: int, seed: int):
        self.train, self.valid, self.config, self.seed = train, valid, config, seed
        self.context = min(context, train.n_tokens - 1)
        self.batch_size = max(1, min(config.batch_size, config.max_tokens // self.context))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The windows of each batch, int64 (windows, 2): where they begin in the stream, whether with a mark (1, 0)."""
        rng = np.random.default_rng((self.seed, epoch))
        first = rng.integers(min(self.context, self.train.n_tokens - self.context))
        starts = rng.permutation(np.arange(first, self.train.n_tokens - self.context, self.context))
        n_marked = round(MARKED * len(starts)) - len(self.train)  # beside those of the documents
        windows = np.stack((starts, rng.permutation(len(starts)) < n_marked), 1)
        return [windows[i : i + self.batch_size] for i in range(0, len(windows), self.batch_size)]

    def batch(self, description: np.ndarray, epoch: int) -> Tensor:
        """Ids int64 (B, context + 1): each is both an input and, one place earlier, a target."""
        windows = np.stack([self.train.read(start, start + self.context + 1) for start, _ in description.tolist()])
        windows[description[:, 1] == 1, 0] = DOCUMENT
        return torch.from_numpy(windows)

    def loss(self, model: torch.nn.Module, batch: Tensor) -> Tensor:
        return next_byte_loss(model, batch)

    def evaluate(self, model: Any) -> dict[str, float]:
        check_causality(model)
        with progress_bar("validation", self.valid.n_bytes) as advance:
            return {"valid_bits_per_byte": score(model, self.valid, advance=advance).bits_per_byte}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["valid_bits_per_byte"]


def next_byte_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each id of int (B, L + 1) but the first, given those before it."""
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
