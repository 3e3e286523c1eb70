"""What kernels make of weights, kept for as long as these do not change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

MOST = 512  # things that are kept

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


def made(make: Callable[..., Any], *given: Any) -> Any:
    """`make(*given)`, of weights and numbers alone; what it was before for the same ones, where they are unchanged."""
    kept = _kept.get()
    if kept is None:
        return make(*given)
    # By tensors, not by where they lie: a sharded model's come to lie where others did. They are held, so that their
    # ids are theirs alone.
    key = make, *(id(x) if isinstance(x, torch.Tensor) else x for x in given)
    if key not in kept:
        if len(kept) == MOST:  # of a model whose weights are other tensors each time
            kept.clear()
        kept[key] = make(*given), given
    return kept[key][0]
