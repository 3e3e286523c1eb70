"""Whether a model sees what it is to predict: asked before its bits are believed, of which it would need very few."""

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InputError


@torch.no_grad()
def require_causal(
    logits_of: Callable[[Tensor], Tensor], device: torch.device, *, n_values: int, length: int, unit: str,
    tolerance: float,
) -> None:  # fmt: skip
    """Raises InputError if changing an id changes the logits before it, or if they are not finite.

    logits_of  int64 (1, length), values below n_values -> (1, length, K); what is at a place predicts the next id
    unit       what an id is, for the message
    tolerance  of a difference, relative to the largest logit
    """
    with torch.autocast(device.type, enabled=False):  # whose rounding makes much of the last bits of an FFT
        ids = torch.randint(n_values, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
        logits = logits_of(ids).float()
        if not logits.isfinite().all():
            raise InputError("the model's predictions are not finite; check its weights")
        for changed in (1, length // 2, length - 1):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + n_values // 2) % n_values
            difference = (logits_of(other).float() - logits)[0, :changed].abs().max().item()
            if not difference <= tolerance * (1 + logits.abs().max().item()):
                raise InputError(
                    f"the model sees the future: changing {unit} {changed} changes the predictions before it by "
                    f"{difference:.2g}; its bits per {unit} would mean nothing"
                )
