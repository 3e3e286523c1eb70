"""Training a DNA classifier: the genomics side of core/train.py."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batching import pad_right, shuffled_batches
from ..core.config import TrainConfig
from .alphabet import PAD, reverse_complement
from .dataset import LabelledSequences
from .inference import predict_logits

Batch = tuple[Tensor, Tensor, Tensor]  # tokens (B, L), mask (B, L), labels (B,)


class ClassifyDNA:
    """core.train.Task for labelled DNA: cross entropy, judged by the validation loss."""

    def __init__(
        self,
        data: LabelledSequences,
        config: TrainConfig,
        seed: int,
        *,
        rc_augment: bool,
        balance: bool,
        label_smoothing: float,
    ):
        self.train, self.valid = data.subset("train"), data.subset("valid")
        self.lengths = np.array([len(t) for t in self.train.tokens])
        self.config, self.seed, self.rc_augment = config, seed, rc_augment
        self.label_smoothing = label_smoothing
        counts = np.bincount(self.train.labels, minlength=len(data.classes))
        weights = len(self.train.labels) / (len(data.classes) * counts) if balance else np.ones(len(counts))
        self.class_weights = torch.tensor(weights, dtype=torch.float32)

    def plan(self, epoch: int) -> list[np.ndarray]:
        return shuffled_batches(self.lengths, self.config.batch_size, self.config.max_tokens, self.seed, epoch)

    def batch(self, description: np.ndarray, epoch: int) -> Batch:
        sequences = [self.train.tokens[i] for i in description]
        if self.rc_augment:
            # Seeded by what the batch is, so that a resumed run draws the same strands.
            rng = np.random.default_rng((self.seed, epoch, *description))
            sequences = [reverse_complement(s) if rng.random() < 0.5 else s for s in sequences]
        return *pad_right(sequences, PAD), torch.from_numpy(self.train.labels[description])

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
