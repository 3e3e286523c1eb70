"""Training a byte model: the bytes side of core/train.py.

packed  Windows are cut from the stream of all training documents (documents.py), so none holds padding. Where a
        document ends inside a window, the DOCUMENT mark says so to the model, which learns to forget there. (Cutting
        the state with cu_seqlens instead would do without that, but needs batches of one row; and a model that is to
        end a document by itself has to see the mark anyway.)
apart   Windows are cut from each document alone, whose two marks count as part of it: nothing before a document can be
        taken for its context. Short documents make short windows, which stand in batches with others of like length.

A few long documents show the mark hardly ever, and a model would read it, before a document's first byte, for the first
time when it is evaluated or begins to write. So some windows get the mark in place of their first id, as if a document
began there: that id is only an input in this window, so that no target is lost.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batching import pad_right, shuffled_batches, windows_of_each
from ..core.config import TrainConfig
from ..core.parallel import padded_piece
from ..core.task import Task
from ..core.terminal import progress_bar
from .config import DOCUMENT, Windows
from .documents import Documents
from .evaluation import check_causality, score

MARKED = 0.05  # share of an epoch's windows that have a mark, at least
PADDING = -100  # an id that is no target


class TrainBytes(Task):
    """Next-byte prediction in windows of `context` bytes; judged by bits per byte of the validation documents.

    Each epoch reads every document once, cut at other places than the epoch before (packed: short of what does not fill
    a window, before the first cut and after the last one). A corpus shorter than a window makes the window shorter.
    """

    same_kernels = True
    cuts = True

    def __init__(
        self, train: Documents, valid: Documents, config: TrainConfig, context: int, seed: int, windows: Windows
    ):
        self.train, self.valid, self.config, self.seed, self.windows = train, valid, config, seed, windows
        self.context = min(context, train.n_tokens - 1)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The windows of each batch, int64 (windows, 3): begin in the stream, bytes, whether with a mark (1, 0)."""
        rng = np.random.default_rng((self.seed, epoch))
        windows = (self._packed if self.windows == "packed" else self._apart)(rng)
        n_marked = round(MARKED * len(windows)) - len(self.train)  # beside those of the documents
        windows = np.column_stack((windows, rng.permutation(len(windows)) < n_marked))
        settings = self.config.batch_size, self.config.max_tokens
        batches = shuffled_batches(windows[:, 1], *settings, self.seed, epoch)
        return [windows[batch] for batch in batches]

    def _packed(self, rng: np.random.Generator) -> np.ndarray:
        """Begins and sizes of an epoch's windows, int64 (windows, 2), from the whole stream."""
        first = rng.integers(min(self.context, self.train.n_tokens - self.context))
        starts = np.arange(first, self.train.n_tokens - self.context, self.context)
        return np.column_stack((starts, np.full_like(starts, self.context)))

    def _apart(self, rng: np.random.Generator) -> np.ndarray:
        """The same from each document, from its mark to the next one; the first window of a long one is shorter."""
        sizes = np.diff(self.train.marks)  # ids to predict, the document's end included
        document, starts, stops = windows_of_each(sizes, self.context, rng)
        return np.column_stack((self.train.marks[document] + starts, stops - starts))

    def batch(self, description: np.ndarray, epoch: int) -> Tensor:
        """Ids int64 (B, longest + 1): each is both an input and, one place earlier, a target; padded on the right."""
        windows = [self.train.read(start, start + size + 1) for start, size, _ in description.tolist()]
        for ids, has_mark in zip(windows, description[:, 2], strict=True):
            ids[0] = DOCUMENT if has_mark else ids[0]
        return pad_right(windows, PADDING)[0]

    def loss(self, model: torch.nn.Module, batch: Tensor) -> Tensor:
        return next_byte_loss(model, batch)

    def evaluate(self, model: Any) -> dict[str, float]:
        check_causality(model)
        with progress_bar("validation", self.valid.n_bytes, "bytes") as advance:
            return {"valid_bits_per_byte": score(model, self.valid, advance=advance).bits_per_byte}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["valid_bits_per_byte"]


def next_byte_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each id of int (B, L + 1) but the first, given those before it.

    PADDING, which stands on the right only, is no target, and nothing sees it. In a context of several processes, this
    one's part of the mean.
    """
    inputs, targets = padded_piece(ids[:, :-1], PADDING), padded_piece(ids[:, 1:], PADDING)
    logits = model(inputs.clamp(min=0)).flatten(0, 1).float()
    if targets.shape == ids[:, 1:].shape:
        return F.cross_entropy(logits, targets.flatten(), ignore_index=PADDING)
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=PADDING, reduction="sum")
    return nats / (ids[:, 1:] != PADDING).sum()
