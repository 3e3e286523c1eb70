"""Several tensors converted in one launch: a block's weights, one by one, take a GPU's host longer than the GPU."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors


def cast_all(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """The tensors in this dtype, those that have it already as they are."""
    others = [x for x in tensors if x is not None and x.dtype != dtype]
    if not others:
        return list(tensors)
    sizes = [x.numel() for x in others]
    if any(n % 8 for n in sizes):
        made = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in others]
    else:  # one allocation, parts of which begin at multiples of 16 bytes: half of the host's time
        made = _unflatten_dense_tensors(torch.empty(sum(sizes), dtype=dtype, device=others[0].device), others)
    torch._foreach_copy_(made, others)
    found = iter(made)
    return [x if x is None or x.dtype == dtype else next(found) for x in tensors]


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """In which products are in the dtype of their operands. To leave autocast takes time, even where it is not on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
