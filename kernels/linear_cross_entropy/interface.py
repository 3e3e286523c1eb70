"""The cross-entropy of a linear head as one operation: of its logits only some rows exist at a time.

The logits of T tokens over V words are the largest tensor of a language model by far, and autograd keeps their
log-softmax and makes two gradients of that size. Here rows of logits, while they are there, become their own gradient,
and those of x and of the weight are made of it at once, in the forward:

    l = x W';  loss = mean(log sum exp(l) - l_target);  dl = softmax(l) - [target];  dx = dl W;  dW = dl' x

What the backward does is to multiply dx and dW by dloss / T. Letters: T tokens, D width, V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose, traced
from ..operators import module, of_first_order

LOGITS = 2**28  # that exist at once, at most


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, dtype: torch.dtype | None = None, ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Mean cross-entropy, in nats, of the logits x weight' against targets; what is `ignore_index` does not count.

    Shapes: x (T, D), weight (V, D), targets int64 (T,). dtype: that of the matrix products, by default x's; all sums
    are in float32 at least, and so is the loss. NaN where nothing counts, as PyTorch's own. A target that is no word
    makes it NaN on a GPU and raises IndexError or RuntimeError elsewhere; ValueError for other shapes. No gradients of
    second order.
    """
    if x.dim() != 2 or targets.shape != x.shape[:1] or weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            "x must be (tokens, width), weight (words, width) and targets (tokens,); "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    dtype = dtype or x.dtype
    backend = choose(backend, x.device, dtype)
    with torch.autocast(x.device.type, enabled=False):
        if traced(x, weight, targets):
            logits = F.linear(x.to(dtype), weight.to(dtype))
            wide = torch.promote_types(dtype, torch.float32)
            return F.cross_entropy(logits.to(wide), targets, ignore_index=ignore_index)
        return _Loss.apply(x, weight, targets, dtype, ignore_index, backend, torch.is_grad_enabled())


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, ignore_index, backend, trained):  # pyright: ignore[reportIncompatibleMethodOverride]
        of_x, of_weight = (trained and needed for needed in ctx.needs_input_grad[:2])
        rows, words = x.to(dtype), weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        nats = torch.empty(len(rows), dtype=wide, device=x.device)
        dx = torch.empty_like(rows) if of_x else None
        dweight = torch.zeros(0 if len(rows) else words.shape, dtype=wide, device=x.device)
        into_gradients = module(__package__ or "", "triton").into_gradients if backend == "triton" else _into_gradients
        piece = 1 << max(LOGITS // max(len(words), 1), 1).bit_length() - 1
        for first in range(0, len(rows), piece):
            some = slice(first, first + piece)
            logits = torch.mm(rows[some], words.t())
            gradients = into_gradients(logits, targets[some], ignore_index, nats[some])
            if dx is not None:
                torch.mm(gradients, words, out=dx[some])
            if of_weight:
                dweight = _add_product(dweight, gradients, rows[some])
        count = (targets != ignore_index).sum()
        ctx.save_for_backward(dx, dweight if of_weight else None, count)
        ctx.dtypes = x.dtype, weight.dtype
        return nats.sum() / count

    @staticmethod
    def backward(ctx, dloss):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, dloss)


@of_first_order
def _gradients(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
    *found, count = ctx.saved_tensors
    factor = dloss / count.clamp(min=1)

    def scaled(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if gradient is None:
            return None
        # In factor's dtype: else it would be rounded to the gradient's.
        return (gradient.to(factor.dtype) * factor).to(dtype)

    return *map(scaled, found, ctx.dtypes), None, None, None, None, None


def _add_product(total: Tensor, gradients: Tensor, rows: Tensor) -> Tensor:
    """total + gradients' rows, in total's dtype; an empty total is none."""
    a = gradients.t()
    if a.is_cuda and a.dtype != total.dtype:
        if not total.numel():
            return torch.mm(a, rows, out_dtype=total.dtype)
        return torch.addmm(total, a, rows, out_dtype=total.dtype)
    product = torch.mm(a.to(total.dtype), rows.to(total.dtype))
    return product.add_(total) if total.numel() else product


def _into_gradients(logits: Tensor, targets: Tensor, ignore_index: int, nats: Tensor) -> Tensor:
    """The gradients of the rows' cross-entropies, which are written to nats; both are 0 where nothing counts."""
    wide, counts = logits.to(nats.dtype), targets != ignore_index
    targets = targets.where(counts, 0)[:, None]
    total = wide.logsumexp(1, keepdim=True)
    nats.copy_((total - wide.gather(1, targets))[:, 0].where(counts, 0))
    gradients = (wide - total).exp_()
    gradients.scatter_add_(1, targets, gradients.new_full(targets.shape, -1.0))
    return gradients.mul_(counts[:, None]).to(logits.dtype)
