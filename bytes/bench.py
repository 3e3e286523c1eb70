"""How fast a byte model trains, reads and writes on this machine, and how near writing is to what memory allows.

    training   windows of random bytes: forward, backward, clipping, AdamW, moving average
    prefill    one prompt of random bytes, by `core.generation.prefill`
    decode     a batch of short prompts written on, byte by byte, by `core.generation.generate`

The limit of decoding: for the next byte of each of B sequences, all weights have to be read once, and B states read and
written. A step cannot take less time than memory needs to move so many bytes, at the rate at which it copies. (Weights
that fit in a CPU's cache need not come from memory: a small model may be beyond this limit.)
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.backbone import aux_loss
from ..core.generation import generate, prefill
from ..core.moe import parameter_counts
from ..core.speed import median_seconds, training_step, with_peak
from .config import N_BYTES
from .model import ByteLM
from .training import next_byte_loss

WINDOW = 16  # decoding steps that are timed together
PROMPT = 16  # bytes that a decoded sequence begins with
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes: far more than any cache holds


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One line of the table. Times are medians; None of seconds: it did not fit into the device's memory."""

    work: str  # training, prefill or decode
    batch: int
    length: int  # bytes of each sequence: in a window, in the prompt, or 1
    seconds: float | None
    peak_bytes: int | None  # of the device's memory, or of the process on a CPU; None where it cannot be told
    share_of_limit: float | None = None  # of decoding

    @property
    def bytes_per_second(self) -> float | None:
        return self.batch * self.length / self.seconds if self.seconds else None


def measure_training(model: ByteLM, batch: int, context: int, repeats: int) -> Speed:
    """Whole steps, short of reading the corpus. The weights stay as they are: the learning rate is 0."""
    device = _device(model)
    windows = _random_bytes((batch, context + 1)).to(device)

    def train() -> float:
        model.train()
        step = training_step(model, lambda: (next_byte_loss(model, windows) + aux_loss(model)).backward())
        return median_seconds(step, device, repeats)

    try:
        seconds, peak = with_peak(train, device)
    finally:
        model.zero_grad()
        model.eval()
    return Speed(work="training", batch=batch, length=context, seconds=seconds, peak_bytes=peak)


def measure_prefill(model: ByteLM, length: int, repeats: int) -> Speed:
    """Reading a prompt of `length` bytes up to the first probabilities."""
    device, prompt = _device(model), _random_bytes((length,))
    seconds, peak = with_peak(lambda: median_seconds(lambda: prefill(model, [prompt]), device, repeats), device)
    return Speed(work="prefill", batch=1, length=length, seconds=seconds, peak_bytes=peak)


def measure_decode(model: ByteLM, batch: int, repeats: int, moved: int, bandwidth: float) -> Speed:
    """Seconds of a step that writes a byte of each sequence; `moved` and `bandwidth`: see `bytes_per_step`."""

    def decode() -> float:
        steps = generate(model, list(_random_bytes((batch, PROMPT))), WINDOW * (repeats + 1))
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            deque(islice(steps, WINDOW), maxlen=0)
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:]) / WINDOW

    seconds, peak = with_peak(decode, _device(model))
    share = moved / bandwidth / seconds if seconds else None
    return Speed(work="decode", batch=batch, length=1, seconds=seconds, peak_bytes=peak, share_of_limit=share)


def bytes_per_step(model: ByteLM, batch: int, bf16: bool) -> int:
    """What a decoding step has to move at least: weights (2 bytes each in bf16, else as stored), and states twice.

    Of the embedding it reads a row for each sequence, which is not counted; of a mixture's experts as many as the
    sequences can reach.
    """
    tables = () if model.config.tie_embeddings else tuple(model.embedding.parameters())
    weights = [p for p in model.parameters() if not any(p is table for table in tables)]
    total, active = parameter_counts(model, batch)
    size = 2 if bf16 else weights[0].element_size()
    n_weights = (sum(p.numel() for p in weights) - (total - active)) * size
    state = sum(s.numel() * s.element_size() for s in pytree.tree_leaves(model.init_state(1)))
    return n_weights + 2 * batch * state


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read and written in a second by a large copy within the device's memory."""
    n_bytes = COPIED["cpu" if device.type == "cpu" else "cuda"]
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * n_bytes / median_seconds(lambda: target.copy_(source), device, repeats)


def measure(
    model: ByteLM, *, training: tuple[int, int], prompt: int, batches: tuple[int, ...], bf16: bool, repeats: int
) -> Iterator[float | Speed]:
    """First the copy bandwidth, then each line as soon as it is known. `training`: windows in a batch, their bytes."""
    bandwidth = copy_bandwidth(_device(model), repeats)
    yield bandwidth
    yield measure_training(model, *training, repeats)
    yield measure_prefill(model, prompt, repeats)
    for batch in batches:
        yield measure_decode(model, batch, repeats, bytes_per_step(model, batch, bf16), bandwidth)


def _random_bytes(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(N_BYTES, shape, generator=torch.Generator().manual_seed(0))


def _device(model: ByteLM) -> torch.device:
    return next(model.parameters()).device
