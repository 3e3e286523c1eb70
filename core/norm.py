"""The norms of a pre-norm residual block, which also add to the residual stream what the block before them made."""

import torch
from torch import Tensor, nn

from ..kernels import layer_norm, rms_norm
from .autocast import autocast_dtype


class AddRMSNorm(nn.Module):
    """(x, stream) -> (RMSNorm of the new stream, the new stream), where that is stream + x, or x at the start."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(
        self, x: Tensor, stream: Tensor | None, *, projected: bool = False, backend: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, stream (.., D). The stream is float32 even in a bf16 model; what is normed has the weights' dtype.

        projected: nothing but linear maps will read what is normed. Under autocast it then comes in the dtype to which
        they would cast it, and its gradient in the same: the same numbers, without a pass to cast each.
        """
        dtype = autocast_dtype(self.weight) if projected else None
        return rms_norm(x, self.weight, self.eps, residual=stream, dtype=dtype, backend=backend)

    def step(self, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        # On a CPU a few rows cost less in PyTorch's own operations than the call of a kernel.
        return self(x, stream, backend="torch" if x.device.type == "cpu" else None)


class AddLayerNorm(AddRMSNorm):
    """The same with LayerNorm and a bias."""

    def __init__(self, d_model: int, eps: float):
        super().__init__(d_model, eps)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(
        self, x: Tensor, stream: Tensor | None, *, projected: bool = False, backend: str | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = autocast_dtype(self.weight) if projected else None
        return layer_norm(x, self.weight, self.bias, self.eps, residual=stream, dtype=dtype, backend=backend)


class AddNoNorm(nn.Module):
    """The sum alone: what stands last in a backbone without a final norm."""

    def forward(self, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if stream is None else stream + x
        return total.to(x.dtype), total

    step = forward


NORM_CLASSES = {"rms": AddRMSNorm, "layer": AddLayerNorm}
