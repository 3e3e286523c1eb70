"""Learning what single bases are, from windows of a genome: the annotation side of core/train.py.

Windows are cut as in pretraining.py. Nothing is asked of N, of padding, and of a base without a value. B windows, L
window length, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batching import pad_right
from ..core.config import TrainConfig
from ..core.processes import each_once
from ..core.task import Task
from ..core.terminal import progress_bar
from .alphabet import PAD, N, reverse_complement
from .annotation import Annotation
from .config import DNAAnnotatorConfig
from .overlapping import grouped
from .pretraining import Windows, cut_stretches, plan_windows, spread
from .reading.genome import Genome

_PIECE = 1 << 20  # bases whose labels are counted at a time


class Batch(NamedTuple):
    tokens: Tensor  # int64 (B, L), PAD on the right
    labels: Tensor  # int64 (B, L), float32 (B, L, K) of labels 0 and 1, or float32 (B, L)
    asked: Tensor  # float32 (B, L): 1 where something is asked
    mask: Tensor | None  # bool (B, L), True = real; None if all are


class TrainBases(Task):
    """Cross-entropy of the bases' classes or labels, or squared error; judged by the same on the validation windows."""

    def __init__(
        self,
        genome: Genome,
        annotation: Annotation,
        train: Windows,
        valid: Windows,
        config: TrainConfig,
        seed: int,
        *,
        model: DNAAnnotatorConfig,
        class_weights: np.ndarray,
        steps_per_epoch: int | None,
        rc_augment: bool,
        valid_bases: int,
    ):
        """class_weights   (K,): what a class counts for in the loss, or a label where it is there"""
        self.genome, self.annotation, self.where, self.config, self.seed = genome, annotation, train, config, seed
        self.model, self.steps_per_epoch, self.rc_augment = model, steps_per_epoch, rc_augment
        self.class_weights = torch.tensor(class_weights, dtype=torch.float32)
        self.other_strand = np.array(model.other_strand)
        self.valid, self.valid_windows = valid, spread(cut_stretches(valid, model.window, None)[0], valid_bases)
        # One window is a batch at least.
        self.tokens = max(min(config.batch_size * model.window, config.max_tokens), model.window)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The windows of each batch, int64 (B, 3), as `cut_stretches` gives them."""
        n_batches = None if self.steps_per_epoch is None else self.steps_per_epoch * self.config.accumulation
        return plan_windows(self.where, self.model.window, self.tokens, n_batches, self.seed, epoch)

    def batch(self, description: np.ndarray, epoch: int) -> Batch:
        # Seeded by what the batch is, so that a resumed run draws the same strands.
        rng = np.random.default_rng((self.seed, epoch, *description[:, :2].ravel()))
        other = rng.random(len(description)) < 0.5 * self.rc_augment
        return self._batch(self.where, description, other)

    def _batch(self, where: Windows, windows: np.ndarray, other_strand: np.ndarray) -> Batch:
        strands = zip(windows.tolist(), other_strand.tolist(), strict=True)
        examples = [self._example(where, window, other) for window, other in strands]
        tokens, mask = pad_right([example[0] for example in examples], PAD)
        dtype = torch.int64 if self.model.target == "multiclass" else torch.float32
        labels = torch.zeros(*mask.shape, *examples[0][1].shape[1:], dtype=dtype)
        asked = torch.zeros(mask.shape)
        for i, (ids, of_bases) in enumerate(examples):
            known = ids != N if self.model.target != "regression" else (ids != N) & ~np.isnan(of_bases)
            labels[i, : len(ids)] = torch.from_numpy(np.nan_to_num(of_bases)).to(dtype)
            asked[i, : len(ids)] = torch.from_numpy(known)
        return Batch(tokens, labels, asked, None if mask.all() else mask)

    def _example(self, where: Windows, window: list[int], other: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (L,) and labels of a window, on either strand."""
        stretch, start, size = window
        contig = where.stretches[stretch].contig
        tokens, labels = (
            self.genome.tokens(contig, start, start + size)[0],
            self.annotation.of(contig, start, start + size),
        )
        if not other:
            return tokens, labels
        labels = labels[::-1]
        if self.model.target == "multiclass":
            labels = self.other_strand[labels]
        elif self.model.target == "multilabel":
            labels = labels[:, self.other_strand]
        return reverse_complement(tokens), np.ascontiguousarray(labels)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        total, weight = self._loss_and_weight(model(batch.tokens, batch.mask).float(), batch)
        return total / weight.clamp(min=1e-6)

    def _loss_and_weight(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of logits (B, L, K), and what it is to be divided by."""
        weights = self.class_weights.to(logits.device)
        if self.model.target == "multiclass":
            of_bases = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
            counts = weights[batch.labels] * batch.asked
        elif self.model.target == "multilabel":
            each = F.binary_cross_entropy_with_logits(logits, batch.labels, pos_weight=weights, reduction="none")
            of_bases, counts = each.mean(-1), batch.asked
        else:
            of_bases = (logits[..., 0] - (batch.labels - self.model.mean) / self.model.scale).square()
            counts = batch.asked
        return (of_bases * counts).sum(), counts.sum()

    def evaluate(self, model: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        n_bases = int(self.valid_windows[:, 2].sum())
        groups = list(grouped(self.valid_windows, max(1, self.tokens // self.model.window)))
        with progress_bar("validation", n_bases, "bases") as advance:

            def run(group: list[np.ndarray]) -> tuple[float, float]:
                windows = np.stack(group)
                batch = self._batch(self.valid, windows, np.zeros(len(windows), dtype=bool))
                tokens, labels, asked = (x.to(device) for x in batch[:3])
                batch = Batch(tokens, labels, asked, None if batch.mask is None else batch.mask.to(device))
                total, weight = self._loss_and_weight(model(batch.tokens, batch.mask).float(), batch)
                advance(int(windows[:, 2].sum()))
                return total.item(), weight.item()

            found = each_once(groups, run)
        return {"valid_loss": sum(total for total, _ in found) / max(sum(weight for _, weight in found), 1e-6)}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["valid_loss"]


class LabelCounts(NamedTuple):
    """Of the bases of a part of a genome, N included."""

    n: int  # bases; of a regression those with a value
    of_classes: np.ndarray  # (K,); of a regression the sum of the values and that of their squares


def count_labels(
    annotation: Annotation, where: Windows, advance: Callable[[int], object] = lambda n: None
) -> LabelCounts:
    """What the stretches' bases are labelled."""
    n, counts = 0, np.zeros(2 if annotation.target == "regression" else len(annotation.classes))
    for stretch in where.stretches:
        for start in range(stretch.start, stretch.end, _PIECE):
            labels = annotation.of(stretch.contig, start, min(start + _PIECE, stretch.end))
            advance(len(labels))
            if annotation.target == "multiclass":
                counts += np.bincount(labels, minlength=len(counts))
            elif annotation.target == "multilabel":
                counts += labels.sum(0)
            else:
                labels = labels[~np.isnan(labels)]
                counts += labels.sum(), np.square(labels).sum()
            n += len(labels)
    return LabelCounts(n, counts)


def balanced_weights(counts: LabelCounts, target: str, balance: Literal["none", "loss"]) -> np.ndarray:
    """(K,): what a class counts for: as much as any other in all; a label where it is: as much as where it is not."""
    if balance == "none" or target == "regression":
        return np.ones(len(counts.of_classes) if target != "regression" else 1)
    there = np.maximum(counts.of_classes, 1)  # of a label on one strand only, the other strand has none
    if target == "multiclass":
        return counts.n / (len(counts.of_classes) * there)
    return (counts.n - counts.of_classes) / there
