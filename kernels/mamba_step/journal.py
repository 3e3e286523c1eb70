"""States that go back to memory once in several tokens only.

A token changes all of a state, but by few numbers: a step size and an input of each channel, and the vector B. While a
journal is open, kernels that can (cuda_halves.py) keep these and leave the state in memory as it was; those of the next
tokens read both and repeat what was left out, by the same operations and so to the bit. Of many sequences the states
are nearly all that a step reads and writes: with one write for three tokens there is a third less of that.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

_now = threading.local()


class Page(NamedTuple):
    """A journal's part of one state (B, E, N)."""

    held: int  # tokens that are not in the state, but here
    kept: bool  # whether the token to come is to be added to these; else all go to the state
    inputs: Tensor  # (B, E / 32, PERIOD - 1, ENTRY)
    drives: Tensor  # (PERIOD - 1, B, N)


class Journal:
    """Of states that stay where they are, in memory, as long as it is used.

    Before and after a `run` it is empty and they are whole, but if that raised: then they are lost. Between its steps
    nothing but the next one's kernels may read them.
    """

    PERIOD = 3  # tokens from one write to the next: measured, benchmarks/results/gpu_model.md
    ENTRY = 32 + 16  # words of 32 channels: step sizes in float32, inputs in bf16

    def __init__(self) -> None:
        self.turn = 0
        self._pages: dict[int, tuple[Tensor, Tensor]] = {}  # by the state's address

    def run(self, step: Callable[[], object]) -> int:
        """PERIOD times `step`, by which every state takes one token, with this journal open; once if none uses it.

        Returns how often.
        """
        _now.journal = self
        try:
            for turn in range(self.PERIOD):
                self.turn = turn
                step()
                if not self._pages:
                    return 1
        finally:
            _now.journal = None
        return self.PERIOD

    def page_of(self, ssm: Tensor) -> Page:
        """That of a state (B, E, N)."""
        n_rows, n_channels, n_states = ssm.shape
        if ssm.data_ptr() not in self._pages:
            inputs = ssm.new_empty(n_rows, n_channels // 32, self.PERIOD - 1, self.ENTRY)
            self._pages[ssm.data_ptr()] = inputs, ssm.new_empty(self.PERIOD - 1, n_rows, n_states)
        return Page(self.turn, self.turn + 1 < self.PERIOD, *self._pages[ssm.data_ptr()])


def page_of(ssm: Tensor) -> Page | None:
    """That of a state (B, E, 16) in float32 in the journal that is open, if one is; None: the state is written."""
    journal = getattr(_now, "journal", None)
    return None if journal is None else journal.page_of(ssm)
