"""The loss of a language model's head, without all of its logits in memory where nothing would be missed by that."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..kernels import linear_cross_entropy
from .autocast import autocast_dtype
from .mamba_at_once import as_made

NO_TARGET = -100


def is_plain(head: nn.Linear) -> bool:
    """Whether nothing would be missed if the head's weight alone were used: no adapter, hook or bias."""
    return as_made(head) and head.bias is None and not all_modules._has_any_global_hook()


def head_loss(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of head(hidden (B, L, D)) against targets (B, L) other than NO_TARGET."""
    dtype = autocast_dtype(hidden)
    if is_plain(head) and autocast_dtype(head.weight) == dtype:
        return linear_cross_entropy(
            hidden.flatten(0, 1), head.weight, targets.flatten(), dtype=dtype, ignore_index=NO_TARGET
        )
    logits = head(hidden).flatten(0, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets.flatten(), ignore_index=NO_TARGET)
