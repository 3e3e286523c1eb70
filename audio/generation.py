"""From a prompt to new sound, in blocks as they are written; with a watchdog against runaway noise.

A model that writes on what it wrote can drift to where it never was in training, and there to loud noise without end.
The watchdog looks at each block before it is let go: one that is louder than anything the model was trained on is
written again, with other draws; if that does not help, the recording begins anew.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.config import SamplingConfig
from ..core.errors import InputError
from ..core.generation import prefill, select_state
from .codec import values
from .config import START, AudioConfig
from .model import AudioModel, Guided, bare_model
from .writers import Writer, writer_of

LOUDER = 1.5  # times the loudest quarter of a second in training
TRIES = 3


class Begun(NamedTuple):
    """Where one recording stands: what `--save-state` writes."""

    state: Any
    unread: Tensor  # (1,): its last code, which the state has not seen


@torch.no_grad()
def begin(
    model: Any,
    prompt: np.ndarray | None = None,
    label: int | None = None,
    *,
    advance: Callable[[int], object] = lambda n: None,
) -> Begun:
    """Read a prompt, codes uint8 (n,), from START on; None for none. label: of the model's labels."""
    device = next(bare_model(model).parameters()).device
    state = model.init_state(1, None if label is None else torch.tensor([label], device=device))
    codes = torch.tensor([START])
    if prompt is not None:
        codes = torch.cat((codes, torch.from_numpy(prompt.astype(np.int64))))
    if len(codes) > 1:
        _, state = prefill(model, [codes[:-1]], state, chunk=16384, advance=advance)
    return Begun(state, codes[-1:].to(device))


def write_on(
    model: AudioModel | Guided,
    begun: Begun,
    n: int,
    sampling: SamplingConfig,
    seeds: Sequence[int],
    *,
    block: int,
    watchdog: "Watchdog | None" = None,
) -> Iterator[tuple[np.ndarray, Writer]]:
    """n codes for each of the seeds, int64 (B, up to `block`) at a time, and the writer, to ask where it stands.

    Raises InputError if the model's predictions are no numbers.
    """
    rows = [0] * len(seeds)
    writer = writer_of(model, select_state(begun.state, rows), begun.unread[rows], sampling, seeds)
    first = writer.snapshot() if watchdog is not None else None
    for start in range(0, n, block):
        size = min(block, n - start)
        before = writer.snapshot() if watchdog is not None else None
        codes = _written(writer, size)
        for attempt in range(TRIES if watchdog is not None else 0):
            assert watchdog is not None
            loud = watchdog.is_noise(codes)
            if not loud.any():
                break
            watchdog.n_again += int(loud.sum())
            after = writer.snapshot()
            everyone = np.ones_like(loud)
            writer.restore(before, everyone, draw_anew=True)  # the others write along, to no effect
            if attempt == TRIES - 1:
                writer.restore(first, loud, draw_anew=True)
            codes = np.where(loud[:, None], _written(writer, size), codes)
            writer.restore(after, ~loud)
        yield codes, writer


def _written(writer: Writer, n: int) -> np.ndarray:
    codes = writer.write(n)
    if codes.min() < 0:
        raise InputError("the model's predictions are not finite: there is nothing to choose from; check its weights")
    return codes


@dataclass
class Watchdog:
    """Tells noise by its loudness."""

    config: AudioConfig
    n_again: int = 0  # blocks that were written again

    def is_noise(self, codes: np.ndarray) -> np.ndarray:
        """bool (B,) of codes (B, n)."""
        power = (values(self.config.codec).numpy() ** 2)[codes].mean(1)
        return np.sqrt(power) > LOUDER * self.config.loudest
