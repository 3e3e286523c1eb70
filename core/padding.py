"""Batches whose rows are padded: where the real tokens stand, and how a mixer that takes packed sequences reads them.

Letters: B batch, L length, D channels.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from . import parallel


class Padding(NamedTuple):
    """Rows of L tokens, of which one run is real."""

    first: Tensor  # (B,): where the real tokens begin
    n_real: Tensor  # (B,)
    cu_seqlens: Tensor  # (3B + 1,) int32: rows end to end, each as padding before, real tokens, padding after

    @classmethod
    def of(cls, mask: Tensor) -> Self:
        """From bool (B, L), True = real token. ValueError for a row whose real tokens are not in one run."""
        batch, length = mask.shape
        n_real = mask.sum(1)
        first = torch.where(n_real > 0, mask.int().argmax(1), 0)
        in_one_run = (mask.diff(dim=1).sum(1) <= 2 - mask[:, 0].int() - mask[:, -1].int()).all()
        if torch.compiler.is_compiling():
            torch._assert_async(in_one_run, "padding_mask has a row whose real tokens are not in one run")
        elif not in_one_run:
            raise ValueError(
                "padding_mask has a row whose real tokens are not in one run: pad rows on the left or right only"
            )
        row_start = torch.arange(batch, device=mask.device) * length
        starts = torch.stack((row_start, row_start + first, row_start + first + n_real), dim=1).flatten()
        return cls(first, n_real, torch.cat((starts, starts.new_full((1,), batch * length))).to(torch.int32))

    def real(self, length: int) -> Tensor:
        """The mask: bool (B, L), True = real token."""
        places = torch.arange(length, device=self.first.device)
        return (places >= self.first[:, None]) & (places < (self.first + self.n_real)[:, None])

    def moved_left(self, x: Tensor) -> Tensor:
        """x (B, L, D) with the real tokens of each row at its beginning; what stood before them comes last."""
        return rolled(x, self.first)

    def moved_back(self, x: Tensor) -> Tensor:
        """The inverse of `moved_left`."""
        return rolled(x, -self.first)


def rolled(x: Tensor, by: Tensor) -> Tensor:
    """Each row x[b] (L, D) rolled by[b] places to the left."""
    places = (torch.arange(x.shape[1], device=x.device) + by[:, None]) % x.shape[1]
    return x.gather(1, places[..., None].expand_as(x))


def forward_as_pack(
    mixer: Any, hidden: Tensor, padding: Padding, *, state: Any = None, return_state: bool = False
) -> Any:
    """`forward_padded` of a mixer that takes packed sequences: each row as three of them. Shapes stay static."""
    context = parallel.current()
    if context is not None:  # a row goes on in other pieces: it stays one, in which padding does nothing
        if state is not None or return_state:
            raise ValueError("a sequence that is cut into pieces takes no state and returns none")
        with parallel.with_padding(context, padding.real(hidden.shape[1])):
            return mixer(hidden)
    options: dict[str, Any] = {"cu_seqlens": padding.cu_seqlens}
    if state is not None:
        options["state"] = type(state)(*(_at_real_tokens(s) for s in state))
    if return_state:
        options["return_state"] = True
    out = mixer(hidden.reshape(1, -1, hidden.shape[-1]), **options)
    if not return_state:
        return out.view(hidden.shape)
    return out[0].view(hidden.shape), type(out[1])(*(s[1::3].contiguous() for s in out[1]))


def _at_real_tokens(s: Tensor) -> Tensor:
    """States (B, ...) as those of three sequences a row, of which the middle one is real: (3B, ...)."""
    nothing = torch.zeros_like(s)
    return torch.stack((nothing, s, nothing), dim=1).flatten(0, 1)
