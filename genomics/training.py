"""Training a DNA classifier: the genomics side of core/train.py."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batching import pad_right, shuffled_batches
from ..core.config import TrainConfig
from ..core.train import Task
from .alphabet import PAD, N, reverse_complement
from .dataset import LabelledSequences
from .inference import predict_logits

Batch = tuple[Tensor, Tensor, Tensor]  # tokens (B, L), mask (B, L), labels (B,)


class ClassifyDNA(Task):
    """Labelled DNA: cross entropy, judged by the validation loss."""

    def __init__(
        self,
        data: LabelledSequences,
        config: TrainConfig,
        seed: int,
        *,
        mask_rate: float,
        rc_augment: bool,
        balance: bool,
        label_smoothing: float,
    ):
        self.train, self.valid = data.subset("train"), data.subset("valid")
        self.lengths = np.array([len(t) for t in self.train.tokens])
        self.config, self.seed = config, seed
        self.mask_rate, self.rc_augment, self.label_smoothing = mask_rate, rc_augment, label_smoothing
        counts = np.bincount(self.train.labels, minlength=len(data.classes))
        weights = len(self.train.labels) / (len(data.classes) * counts) if balance else np.ones(len(counts))
        self.class_weights = torch.tensor(weights, dtype=torch.float32)

    def plan(self, epoch: int) -> list[np.ndarray]:
        return shuffled_batches(self.lengths, self.config.batch_size, self.config.max_tokens, self.seed, epoch)

    def batch(self, description: np.ndarray, epoch: int) -> Batch:
        # Seeded by what the batch is, so that a resumed run draws the same strands and masks.
        rng = np.random.default_rng((self.seed, epoch, *description))
        sequences = [self.augmented(self.train.tokens[i], rng) for i in description]
        return *pad_right(sequences, PAD), torch.from_numpy(self.train.labels[description])

    def augmented(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Perhaps the other strand; some bases hidden as N, in some sequences hardly any, in others twice mask_rate."""
        if self.rc_augment and rng.random() < 0.5:
            tokens = reverse_complement(tokens)
        if self.mask_rate:
            tokens = np.where(rng.random(len(tokens)) < rng.uniform(0, 2 * self.mask_rate), np.uint8(N), tokens)
        return tokens

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        tokens, mask, labels = batch
        logits = model(tokens, mask).float()
        weights = self.class_weights.to(logits.device)
        return F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing)

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        logits = predict_logits(model, self.valid.tokens, self.config.batch_size, self.config.max_tokens)
        labels = torch.from_numpy(self.valid.labels)
        loss = F.cross_entropy(logits, labels, self.class_weights)
        accuracy = (logits.argmax(1) == labels).double().mean()
        return {"valid_loss": loss.item(), "valid_accuracy": accuracy.item()}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["valid_loss"]
