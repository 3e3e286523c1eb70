"""What autocast does to a linear map's operands, for code that casts once where autocast would cast each time."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear map of x is computed: autocast's, which leaves float64 alone, or x's own."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if enabled else x.dtype
