"""The feed-forward half of a Transformer block, as a mixer of its own: it mixes channels, each token by itself.

    SwiGLU   out_proj(silu(gate) * up),  gate, up = in_proj(hidden)     arXiv 2002.05202
    GELU     out_proj(gelu(in_proj(hidden)))                            GPT-2's, with the exact GELU; biases if wanted

Letters: B batch, L length, F inner width (d_ff).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .padding import Padding

# What an MLP remembers of a sequence: nothing. No NamedTuple, for FSDP2 loses one without fields on its way to a GPU.
NoState = tuple[()]


class MLP(nn.Module):
    """(.., d_model) -> (.., d_model). `activation` is "swiglu" or "gelu"."""

    projects_input = True

    def __init__(self, d_model: int, d_ff: int, activation: str = "swiglu", *, bias: bool = False):
        super().__init__()
        self.gated = activation == "swiglu"
        self.in_proj = nn.Linear(d_model, 2 * d_ff if self.gated else d_ff, bias=bias)
        self.out_proj = nn.Linear(d_ff, d_model, bias=bias)
        for projection in (self.in_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=0.02)
            if bias:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        hidden: Tensor,
        state: NoState | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,  # nothing to do: tokens do not see each other
    ) -> Tensor | tuple[Tensor, NoState]:
        """hidden (B, L, d_model) -> the same shape, or (that, the empty state) iff return_state."""
        y = self._of_each(hidden)
        return (y, ()) if return_state else y

    def forward_padded(self, hidden: Tensor, padding: Padding, **options: Any) -> Any:
        return self(hidden, **options)

    def step(self, hidden: Tensor, state: NoState) -> Tensor:
        """hidden (B, d_model) -> (B, d_model)."""
        return self._of_each(hidden)

    def init_state(self, batch_size: int, max_length: int | None = None) -> NoState:
        return ()

    def _of_each(self, hidden: Tensor) -> Tensor:
        inner = self.in_proj(hidden)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            return self.out_proj(F.silu(gate) * up)
        return self.out_proj(F.gelu(inner))
