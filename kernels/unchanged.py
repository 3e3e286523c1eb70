"""What kernels make of weights, kept for as long as these do not change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_kept: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def unchanged(kept: dict[Any, Any]) -> Iterator[None]:
    """In which kernels take all weights for what they were when `kept` was empty.

    So whoever decodes with a model may give one `kept` to all of its calls, as long as nobody changes the model: what
    each would make of the weights is made in the first one. It takes as much memory as they do.
    """
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)


def keeps() -> bool:
    """Whether the weights are known not to change."""
    return _kept.get() is not None


def made(make: Callable[[], Any], *weights: torch.Tensor | None) -> Any:
    """`make()`, which follows from the weights alone; what it was before where they have not changed since."""
    kept = _kept.get()
    if kept is None:
        return make()
    key = tuple(0 if w is None else w.data_ptr() for w in weights)
    if key not in kept:
        kept[key] = make(), weights  # which are held, so that no other tensor comes to lie there
    return kept[key][0]
