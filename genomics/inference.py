"""Running a DNA model over sequences: any lengths, any order, results in the order of the input."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.batching import CPU_TOKENS, pad_right, sorted_batches
from ..core.processes import each_once
from .along import Along, along
from .alphabet import PAD, reverse_complement
from .model import DNAClassifier


@torch.no_grad()
def run_over(
    forward: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
    tokens: Sequence[np.ndarray],
    batch_size: int,
    max_tokens: int,
    *,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """What `forward(tokens (B, L), mask (B, L)) -> (B, ...)` makes of n token sequences: (n, ...) float32 on the CPU.

    `advance` is called with the bases done since the last call. Several processes, all of which call this, share the
    work.
    """
    lengths = np.array([len(t) for t in tokens], dtype=np.int64)
    if device.type == "cpu":
        max_tokens = min(max_tokens, CPU_TOKENS)
    order = sorted_batches(lengths, batch_size, max_tokens)

    def run(batch: np.ndarray) -> Tensor:
        padded, mask = pad_right([tokens[i] for i in batch], PAD)
        output = forward(padded.to(device), mask.to(device)).float().cpu()
        if advance is not None:
            advance(int(lengths[batch].sum()))
        return output

    outputs = each_once(order, run)
    in_order = torch.empty_like(torch.cat(outputs))
    in_order[torch.from_numpy(np.concatenate(order))] = torch.cat(outputs)
    return in_order


def predict(
    model: DNAClassifier,
    tokens: Sequence[np.ndarray],
    batch_size: int = 256,
    max_tokens: int = 262_144,
    *,
    rc_average: bool = False,
    advance: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Predictions (n, K) float64 for n token sequences, on the device where the model is.

    Probabilities of the classes (multiclass: a row sums to 1) or labels (multilabel), or the value (regression, K = 1).
    With rc_average the mean over both strands (post-hoc conjoining, as in Caduceus). `advance` as for run_over, of
    either strand.
    """
    device = next(model.parameters()).device
    strands = [tokens] + ([[reverse_complement(t) for t in tokens]] if rc_average else [])
    logits = [run_over(model, device, strand, batch_size, max_tokens, advance=advance) for strand in strands]
    return torch.stack([model.predictions(strand.double()) for strand in logits]).mean(0).numpy()


def embed(
    model: DNAClassifier,
    tokens: Sequence[np.ndarray],
    batch_size: int = 256,
    max_tokens: int = 262_144,
    *,
    advance: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Embeddings (n, D) float32 of n token sequences: `DNAClassifier.embed`."""
    device = next(model.parameters()).device
    return run_over(model.embed, device, tokens, batch_size, max_tokens, advance=advance).numpy()


def embed_in_record(
    model: DNAClassifier,
    record: np.ndarray,
    windows: Sequence[tuple[int, int]],
    *,
    window: int,
    overlap: int,
    max_tokens: int,
    advance: Callable[[int], object] = lambda n: None,
) -> Iterator[np.ndarray]:
    """Embeddings, float32 (n, D) a time, of windows (start, end) of a record as their bases are seen in all of it.

    A causal model carries its state from the record's start on. Of another, windows of `window` bases see half of
    `overlap` more on either side; see along.py. Starts and ends of the windows rise. The model is told no places.
    """
    carried = None if model.config.backbone.bidirectional else model.carried
    what = Along(model.states, carried, next(model.parameters()).device)
    sizes = {"window": window + overlap, "overlap": overlap, "max_tokens": max_tokens}
    begun: list[np.ndarray] = []  # of windows done .. done + len(begun) - 1: the sum of the bases' states so far
    done = 0
    for at, states in along(what, lambda start, end: record[start:end], 0, len(record), **sizes):
        upto = np.concatenate((np.zeros((1, states.shape[1])), states.double().cumsum(0).numpy()))
        end = at + len(states)
        while done + len(begun) < len(windows) and windows[done + len(begun)][0] < end:
            begun.append(np.zeros(states.shape[1]))
        for i, (first, last) in enumerate(windows[done : done + len(begun)]):
            begun[i] += upto[min(last, end) - at] - upto[min(max(first, at), end) - at]
        n = sum(last <= end for _, last in windows[done : done + len(begun)])
        if n:
            lengths = np.array([last - first for first, last in windows[done : done + n]])
            yield (np.stack(begun[:n]) / lengths[:, None]).astype(np.float32)
            begun, done = begun[n:], done + n
        advance(len(states))
