"""The 2-D scan by its definition: four sequences of pixels, each an explicit list of places, each scanned by itself."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..selective_scan.reference import selective_scan_reference


def scan_orders(height: int, width: int) -> Tensor:
    """(4, H W): the places of pixel y x, as y W + x, in the order in which each direction visits them."""
    places = torch.arange(height * width).view(height, width)
    rows, columns = places.flatten(), places.T.flatten()
    return torch.stack((rows, columns, rows.flip(0), columns.flip(0)))


def cross_scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor
) -> Tensor:
    """As `polymamba.kernels.cross_scan`; slow."""
    height, width = x.shape[1:3]
    sequence = rearrange(x, "b h w e -> b (h w) e")
    dt, B, C = (rearrange(m, "b h w k n -> b (h w) k n") for m in (dt, B, C))
    total = torch.zeros_like(sequence, dtype=torch.promote_types(x.dtype, torch.float32))
    for k, order in enumerate(scan_orders(height, width).to(x.device)):
        y = selective_scan_reference(
            sequence[:, order],
            F.linear(dt[:, order, k], dt_weight[k]),
            *(A[k], B[:, order, k], C[:, order, k], D[k]),
            delta_bias=dt_bias[k],
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)  # no final state was asked for
        total = total.index_add(1, order, y.to(total.dtype))
    return total.view(x.shape)
