"""Training a DNA model: the genomics side of core/train.py."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batching import pad_right, shuffled_batches
from ..core.config import TrainConfig
from ..core.task import Task
from .alphabet import PAD, N, reverse_complement
from .dataset import LabelledSequences
from .inference import run_over

Batch = tuple[Tensor, Tensor, Tensor]  # tokens (B, L), mask (B, L), labels (B, ...)


class TrainDNA(Task):
    """Labelled DNA: cross entropy, or squared error of a regression, judged by the same loss on the validation part."""

    def __init__(
        self,
        data: LabelledSequences,
        config: TrainConfig,
        seed: int,
        *,
        mask_rate: float,
        rc_augment: bool,
        balance: Literal["none", "loss", "sampling"],
        label_smoothing: float,
        move: Callable[[LabelledSequences, int, np.random.Generator], np.ndarray] | None = None,
        first_window: int | None = None,
        steps_per_epoch: int | None = None,
    ):
        """move         tokens of the i-th training sequence at another place of its record, if it is a window of one
        first_window    of longer sequences a part of this length is shown in the first epoch, of twice that in the next
        """
        self.target, self.train, self.valid = data.target, data.subset("train"), data.subset("valid")
        self.lengths = np.array([len(t) for t in self.train.tokens])
        self.config, self.seed = config, seed
        self.mask_rate, self.rc_augment, self.label_smoothing = mask_rate, rc_augment, label_smoothing
        self.balance, self.move = balance, move
        self.first_window, self.steps_per_epoch = first_window, steps_per_epoch
        self.class_weights = torch.ones(len(data.classes))
        if balance == "loss":
            counts = np.array([members.sum() for members in self.train.members().values()])
            n = len(self.train.labels)
            # multilabel: what the few records with a label weigh together is what the many without it do
            weights = n / (len(counts) * counts) if data.target == "multiclass" else (n - counts) / counts
            self.class_weights = torch.tensor(weights, dtype=torch.float32)
        self.mean, self.scale = value_scale(self.train) if data.target == "regression" else (0.0, 1.0)

    def plan(self, epoch: int) -> list[np.ndarray]:
        records = np.arange(len(self.lengths))
        if self.balance == "sampling":
            records = balanced_draw(self.train.labels, len(self.train.classes), (self.seed, epoch))
        config, lengths = self.config, np.minimum(self.lengths, self.longest(epoch))
        if self.steps_per_epoch is not None:
            in_batch = min(config.batch_size, max(1, config.max_tokens // int(lengths.max())))
            n = self.steps_per_epoch * config.accumulation * in_batch
            rng = np.random.default_rng((self.seed, epoch))
            records = np.concatenate([rng.permutation(records) for _ in range(-(-n // len(records)))])[:n]
        batches = shuffled_batches(lengths[records], config.batch_size, config.max_tokens, self.seed, epoch)
        return [records[batch] for batch in batches]

    def longest(self, epoch: int) -> int:
        """How much of a sequence this epoch shows, at most."""
        longest = int(self.lengths.max())
        return longest if self.first_window is None else min(longest, self.first_window << min(epoch, 40))

    def batch(self, description: np.ndarray, epoch: int) -> Batch:
        # Seeded by what the batch is, so that a resumed run draws the same strands and masks.
        rng = np.random.default_rng((self.seed, epoch, *description))
        sequences = [self.augmented(i, rng, self.longest(epoch)) for i in description]
        return *pad_right(sequences, PAD), torch.from_numpy(self.train.labels[description])

    def augmented(self, i: int, rng: np.random.Generator, longest: int) -> np.ndarray:
        """The i-th training sequence, perhaps elsewhere in its record, perhaps its other strand, with hidden bases.

        Of one that is longer than `longest` a part at random.

        Hidden ones become N: in some sequences hardly any, in others a share of twice mask_rate.
        """
        tokens = self.train.tokens[i] if self.move is None else self.move(self.train, i, rng)
        if len(tokens) > longest:
            start = int(rng.integers(len(tokens) - longest + 1))
            tokens = tokens[start : start + longest]
        if self.rc_augment and rng.random() < 0.5:
            tokens = reverse_complement(tokens)
        if self.mask_rate:
            tokens = np.where(rng.random(len(tokens)) < rng.uniform(0, 2 * self.mask_rate), np.uint8(N), tokens)
        return tokens

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        tokens, mask, labels = batch
        return self.criterion(model(tokens, mask).float(), labels, self.label_smoothing)

    def criterion(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean loss of logits (B, K) and labels: int (B,), bool (B, K) or float (B,)."""
        weights = self.class_weights.to(logits.device)
        if self.target == "multiclass":
            return F.cross_entropy(logits, labels, weights, label_smoothing=label_smoothing)
        if self.target == "multilabel":
            truth = labels.float() * (1 - label_smoothing) + 0.5 * label_smoothing
            return F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weights)
        return F.mse_loss(logits[:, 0], ((labels - self.mean) / self.scale).float())

    def evaluate(self, model: Any) -> dict[str, float]:
        device = next(model.parameters()).device
        logits = run_over(model, device, self.valid.tokens, self.config.batch_size, self.config.max_tokens)
        labels = torch.from_numpy(self.valid.labels)
        figures = {"valid_loss": self.criterion(logits, labels).item()}
        if self.target == "multiclass":
            figures["valid_accuracy"] = (logits.argmax(1) == labels).double().mean().item()
        elif self.target == "multilabel":
            figures["valid_label_accuracy"] = ((logits > 0) == labels).double().mean().item()
        return figures

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["valid_loss"]


def value_scale(data: LabelledSequences) -> tuple[float, float]:
    """Mean and standard deviation of a regression's values; 1 for the latter if they are all the same."""
    return float(data.labels.mean()), float(data.labels.std()) or 1.0


def balanced_draw(labels: np.ndarray, n_classes: int, seed: tuple[int, ...]) -> np.ndarray:
    """As many records as there are, each class equally often: records of rare classes come again, others not at all.

    labels (n,) -> indices (n,); every record of a class is drawn before one of them is drawn again.
    """
    rng = np.random.default_rng(seed)
    shares = np.diff(np.arange(n_classes + 1) * len(labels) // n_classes)
    drawn = []
    for k, wanted in enumerate(shares):
        members = np.flatnonzero(labels == k)
        rounds = [rng.permutation(members) for _ in range(-(-wanted // len(members)))]
        drawn.append(np.concatenate([*rounds, members[:0]])[:wanted])
    return np.concatenate(drawn)
