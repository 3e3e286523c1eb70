"""Training audio models: the audio side of core/train.py.

Windows are cut from each recording alone, at other places in each epoch, and begin with START or with the true sample
before them. Short recordings make short windows, which stand in batches with others of like length. Windows that are
next to silent are left out: they would teach little, and silence is soon over-learnt.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.batching import pad_right, shuffled_batches, sorted_batches, windows_of_each
from ..core.config import TrainConfig
from ..core.processes import each_once
from ..core.task import Task
from ..core.terminal import progress_bar
from .codec import decode, encode
from .config import START
from .corpus import Recordings
from .model import AudioModel
from .scoring import bits_of, check_causality
from .variation import varied

PADDING = -100  # no target
UNLABELLED = 0.1  # share of windows that are read without their label


class TrainAudio(Task):
    """Next-sample prediction in windows; judged by bits per sample of the validation recordings."""

    def __init__(
        self,
        train: Recordings,
        valid: Recordings,
        labels: tuple[str, ...],
        config: TrainConfig,
        context: int,
        gate: float,
        seed: int,
    ):
        """context: samples of a window. gate: RMS of a window below which it is left out. labels: () for none."""
        self.train, self.valid, self.labels, self.config = train, valid, labels, config
        self.context, self.gate, self.seed = context, gate, seed
        self.label_ids = label_ids(train, labels)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The windows of each batch, int64 (windows, 4): begin in the part, samples, whether at START, label."""
        rng = np.random.default_rng((self.seed, epoch))
        recording, starts, stops = windows_of_each(self.train.lengths, self.context, rng)
        begin = self.train.starts[recording] + starts
        label = np.where(rng.random(len(recording)) < UNLABELLED, len(self.labels), self.label_ids[recording])
        windows = np.column_stack((begin, stops - starts, starts == 0, label))
        loud = self.train.loudness(windows[:, 0], windows[:, 0] + windows[:, 1]) >= self.gate
        windows = windows[loud] if loud.any() else windows
        settings = self.config.batch_size, self.config.max_tokens
        return [windows[batch] for batch in shuffled_batches(windows[:, 1], *settings, self.seed, epoch)]

    def batch(self, description: np.ndarray, epoch: int) -> dict[str, Tensor]:
        """codes int64 (B, longest + 1), each but the ends both an input and a target, padded on the right; labels."""
        rows = []
        for begin, size, at_start, _ in description.tolist():
            codes = self.train.codes[max(begin - 1, 0) : begin + size].astype(np.int64)
            rows.append(np.concatenate(([START], codes[-size:])) if at_start else codes)
        return {"codes": pad_right(rows, PADDING)[0], "labels": torch.from_numpy(description[:, 3])}

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Nats per sample. Padding stands on the right of what is causal, so that nothing real sees it."""
        codes = batch["codes"]
        logits = model(codes[:, :-1].clamp(min=0), labels=batch["labels"])
        return F.cross_entropy(logits.flatten(0, 1).float(), codes[:, 1:].flatten(), ignore_index=PADDING)

    def evaluate(self, model: Any) -> dict[str, float]:
        check_causality(model)
        return {"valid_bits": measure(model, self.valid, "validation")}

    def score(self, metrics: dict[str, float]) -> float:
        return -metrics["valid_bits"]


def label_ids(recordings: Recordings, labels: tuple[str, ...]) -> np.ndarray:
    """int64 (recordings,): the place of each one's label among `labels`; their number where it is none of them."""
    places = {label: i for i, label in enumerate(labels)}
    return np.array([places.get(label, len(labels)) for label in recordings.labels], dtype=np.int64)


def measure(model: AudioModel, recordings: Recordings, work: str) -> float:
    """Bits per sample, under a progress bar that `work` names."""
    n = int(recordings.starts[-1])
    pieces = [recordings.recording(i) for i in range(len(recordings))]
    with progress_bar(work, n, "samples") as advance:
        return float(bits_of(model, pieces, label_ids(recordings, model.config.labels), advance=advance).sum() / n)


class TrainClassifier(Task):
    """Labels of recordings, or of windows of long ones; judged by accuracy on the validation recordings."""

    def __init__(
        self,
        train: Recordings,
        valid: Recordings,
        labels: tuple[str, ...],
        config: TrainConfig,
        context: int,
        codec: str,
        seed: int,
    ):
        """context: most samples that are looked at."""
        self.train, self.valid, self.labels, self.config = train, valid, labels, config
        self.context, self.codec, self.seed = context, codec, seed
        self.label_ids, self.valid_ids = label_ids(train, labels), label_ids(valid, labels)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The recordings of each batch."""
        lengths = np.minimum(self.train.lengths, self.context)
        return shuffled_batches(lengths, self.config.batch_size, self.config.max_tokens, self.seed, epoch)

    def batch(self, description: np.ndarray, epoch: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((self.seed, epoch, int(description[0]), len(description)))
        rows = [self._window(self.train.recording(i), rng) for i in description]
        codes, mask = pad_right(rows, 0)
        return {"codes": codes, "mask": mask, "labels": torch.from_numpy(self.label_ids[description])}

    def loss(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["codes"], batch["mask"]).float(), batch["labels"])

    def evaluate(self, model: Any) -> dict[str, float]:
        logits = classify(model, [self.valid.recording(i) for i in range(len(self.valid))], self.context)
        loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(self.valid_ids)).item()
        accuracy = float((logits.argmax(1) == self.valid_ids).mean())
        return {"valid_accuracy": accuracy, "valid_loss": loss}

    def score(self, metrics: dict[str, float]) -> float:
        return metrics["valid_accuracy"] - 1e-3 * metrics["valid_loss"]  # the loss decides between equals

    def _window(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A window of the recording, varied."""
        start = rng.integers(max(len(codes) - self.context, 0) + 1)
        codes = codes[start : start + self.context]
        return encode(varied(decode(codes, self.codec), rng)[: self.context], self.codec)


@torch.no_grad()
def classify(model: Any, recordings: list[np.ndarray], context: int, *, features: bool = False) -> np.ndarray:
    """Logits, or `features`, float32 (recordings, K) of each recording's middle `context` samples."""
    device = next(model.parameters()).device
    lengths = np.array([min(len(r), context) for r in recordings])
    batches = sorted_batches(lengths, 64, 1 << 18)
    with progress_bar("classifying", len(recordings), "recordings") as advance:

        def run(batch: np.ndarray) -> np.ndarray:
            rows = []
            for i in batch:
                start = (len(recordings[i]) - lengths[i]) // 2
                rows.append(recordings[i][start : start + lengths[i]])
            codes, mask = (x.to(device) for x in pad_right(rows, 0))
            advance(len(batch))
            return (model.features if features else model)(codes, mask).float().cpu().numpy()

        found = np.concatenate(each_once(batches, run))
    return found[np.argsort(np.concatenate(batches))]


def probabilities_of(logits: np.ndarray) -> np.ndarray:
    """Softmax of logits (n, K), row by row."""
    return np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
