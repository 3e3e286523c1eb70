"""A program a row of logits: their maximum and sum of exponentials in one pass, the gradient over them in another."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import LN2, LOG2E, launch

BLOCK = 4096  # words that a program reads at a time


@triton.jit(do_not_specialize=["ignore_index"])
def _into_gradients(logits, targets, nats, ignore_index, n_words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target != ignore_index
    logits += row * n_words
    is_word = (target >= 0) & (target < n_words)
    of_target = tl.load(logits + target, mask=is_word, other=float("nan")).to(tl.float32) * LOG2E
    word = tl.arange(0, BLOCK)
    # Finite, so that a logit of -inf adds 0.
    top, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n_words, BLOCK):
        x = tl.load(logits + first + word, mask=first + word < n_words, other=float("-inf")).to(tl.float32) * LOG2E
        higher = tl.where(x > top, x, top)
        total = total * tl.exp2(top - higher) + tl.exp2(x - higher)
        top = higher
    highest = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp2(top - highest), axis=0)
    tl.store(nats + row, tl.where(counts, (tl.log2(total) + highest - of_target) * LN2, 0.0))
    tl.debug_barrier()  # all have read the target's logit
    factor = tl.where(counts, 1.0 / total, 0.0)
    for first in range(0, n_words, BLOCK):
        at, there = logits + first + word, first + word < n_words
        x = tl.load(at, mask=there, other=0.0).to(tl.float32) * LOG2E
        gradient = tl.exp2(x - highest) * factor - tl.where((first + word == target) & counts, 1.0, 0.0)
        tl.store(at, gradient, mask=there)


def into_gradients(logits: Tensor, targets: Tensor, ignore_index: int, nats: Tensor) -> Tensor:
    """As the interface's own; in place of the logits, (T, V) and contiguous."""
    n_rows, n_words = logits.shape
    block = min(BLOCK, triton.next_power_of_2(n_words))
    if n_rows:
        with torch.cuda.device_of(logits):
            launch(
                _into_gradients, n_rows, logits, targets.contiguous(), nats, ignore_index, n_words, BLOCK=block,
                num_warps=max(block // 512, 1),
            )  # fmt: skip
    return logits
