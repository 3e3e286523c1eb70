"""Running a DNA classifier over sequences: any lengths, any order, results in the order of the input."""

import sys

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..core.batching import pad_right, sorted_batches
from .alphabet import PAD, reverse_complement


@torch.no_grad()
def predict_logits(
    model: nn.Module, tokens: list[np.ndarray], batch_size: int, max_tokens: int, *, progress: str | None = None
) -> Tensor:
    """Logits (n, K), float32 on the CPU, of n token sequences, on the device where the model is.

    `progress` names the work in a progress bar on stderr.
    """
    device = next(model.parameters()).device
    lengths = np.array([len(t) for t in tokens], dtype=np.int64)
    batches = sorted_batches(lengths, batch_size, max_tokens)
    if progress is not None:
        batches = track(batches, progress, console=Console(file=sys.stderr), transient=True)
    logits, order = [], []
    for batch in batches:
        padded, mask = pad_right([tokens[i] for i in batch], PAD)
        logits.append(model(padded.to(device), mask.to(device)).float().cpu())
        order.append(batch)
    in_order = torch.empty_like(torch.cat(logits))
    in_order[torch.from_numpy(np.concatenate(order))] = torch.cat(logits)
    return in_order


def predict_probabilities(
    model: nn.Module,
    tokens: list[np.ndarray],
    batch_size: int,
    max_tokens: int,
    *,
    rc_average: bool = False,
    progress: str | None = None,
) -> np.ndarray:
    """Class probabilities (n, K) float64; with rc_average the mean of both strands' (post-hoc conjoining)."""
    strands = [tokens] + ([[reverse_complement(t) for t in tokens]] if rc_average else [])
    logits = [predict_logits(model, strand, batch_size, max_tokens, progress=progress) for strand in strands]
    return torch.stack(logits).double().softmax(-1).mean(0).numpy()
