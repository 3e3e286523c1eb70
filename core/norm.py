"""The norm of a pre-norm residual block, which also adds to the residual stream what the block before it made."""

import torch
from torch import Tensor, nn

from ..kernels import rms_norm


class AddRMSNorm(nn.Module):
    """(x, stream) -> (RMSNorm of the new stream, the new stream), where that is stream + x, or x at the start."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, stream (.., D). The stream is float32 even in a bf16 model; what is normed has the weights' dtype."""
        return rms_norm(x, self.weight, self.eps, residual=stream)

    def step(self, x: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        # On a CPU a few rows cost less in PyTorch's own operations than the call of a kernel.
        backend = "torch" if x.device.type == "cpu" else None
        return rms_norm(x, self.weight, self.eps, residual=stream, backend=backend)
