"""How well a model predicts recordings: bits per sample, each predicted from all before it in its recording.

The state is carried from piece to piece, so that the size of a piece changes memory and speed, but not the result. The
distribution is the model's own: no temperature, nothing filtered.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..core.causality import require_causal
from ..core.errors import InputError
from ..core.generation import read, select_state
from ..core.processes import each_once
from .config import N_CODES, START
from .model import AudioModel

CHUNK = 16384  # samples of each recording in one forward
AT_ONCE = 1 << 17  # samples in one forward, of all recordings together: so many are read side by side


@torch.no_grad()
def bits_of(
    model: AudioModel,
    recordings: Sequence[np.ndarray],
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    chunk: int = CHUNK,
    advance: Callable[[int], object] = lambda n: None,
) -> np.ndarray:
    """What predicting each recording costs, bits: float64 (recordings,).

    recordings  codes uint8 (n,) each
    labels      of each; None for no label
    advance     is told of the samples done

    Several processes, all of which call it, share the work.
    Raises InputError if the model's predictions are not finite.
    """
    bits = np.zeros(len(recordings))
    order = sorted(range(len(recordings)), key=lambda i: len(recordings[i]))
    groups: list[list[int]] = []
    for i in order:
        if not groups or (len(groups[-1]) + 1) * min(len(recordings[i]), chunk) > AT_ONCE:
            groups.append([])
        groups[-1].append(i)
    found = each_once(groups, lambda group: _of_group(model, recordings, labels, group, chunk, advance))
    for group, of_group in zip(groups, found, strict=True):
        bits[group] = of_group
    if not np.isfinite(bits).all():
        raise InputError("the model's predictions are not finite; check its weights")
    return bits


def _of_group(model, recordings, labels, group: list[int], chunk: int, advance) -> np.ndarray:
    """Of recordings that ascend in length, side by side."""
    device = next(model.parameters()).device
    given = None if labels is None else torch.tensor([labels[i] for i in group], device=device)
    state, running, bits = model.init_state(len(group), given), list(range(len(group))), np.zeros(len(group))
    for start in range(0, len(recordings[group[-1]]), chunk):
        left = [row for row in running if len(recordings[group[row]]) > start]
        if len(left) < len(running):
            state = select_state(state, [running.index(row) for row in left])
            running = left
        pieces = [recordings[group[row]][max(start - 1, 0) : start + chunk].astype(np.int64) for row in running]
        if start == 0:
            pieces = [np.concatenate(([START], piece)) for piece in pieces]
        codes = [torch.from_numpy(piece).to(device) for piece in pieces]
        logits, state = read(model, [c[:-1] for c in codes], state)
        for at, (row, c) in enumerate(zip(running, codes, strict=True)):
            nats = F.cross_entropy(logits[at, : len(c) - 1].float(), c[1:], reduction="none")
            bits[row] += float(nats.double().sum()) / math.log(2)
        advance(sum(len(c) - 1 for c in codes))
    return bits


def check_causality(model: AudioModel) -> None:
    """Raises InputError if the model sees the future, or predicts no numbers: see core/causality.py."""
    length, device = 2 * model.config.unet.period + 7, next(model.parameters()).device
    require_causal(model, device, n_values=N_CODES, length=length, unit="sample", tolerance=1e-4)


def order0_bits(recordings: Sequence[np.ndarray]) -> float:
    """Entropy of the codes' frequencies in these very recordings, bits per sample: what knowing no context costs."""
    counts = np.zeros(N_CODES, np.int64)
    for recording in recordings:
        for start in range(0, len(recording), AT_ONCE):  # for bincount makes int64 of what it counts
            counts += np.bincount(recording[start : start + AT_ONCE], minlength=N_CODES)
    shares = counts[counts > 0] / counts.sum()
    return float(-np.sum(shares * np.log2(shares)))
