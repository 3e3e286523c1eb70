"""The public causal convolution: checks, choice of a backend, and the operators that torch.compile and autograd see."""

import torch
from torch import Tensor

from ..backends import IN_PYTORCH, choose, watched
from ..operators import Implementations, Operator
from ..sequences import sequence_bounds
from .reference import causal_conv1d_reference, causal_conv1d_step_reference

implementation = Implementations(__package__, numba="cpu", triton="triton")


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu",
    initial_state: Tensor | None = None, return_final_state: bool = False, cu_seqlens: Tensor | None = None,
    reverse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Depthwise convolution over time that sees no later step: y_t = act(bias + sum_k weight[:, k] x_{t - (W-1) + k}).

    Shapes, with B batch, L length, D channels, W width, S sequences:
        x                (B, L, D)
        weight, bias     (D, W), (D,)
        cu_seqlens       (S + 1,) int32: B = 1 holds S sequences end to end
        initial_state    (B, D, W - 1), or (S, D, W - 1) with cu_seqlens: the inputs before the first, most recent last

    activation is "silu" or None. Returns y (B, L, D) in x's dtype; with return_final_state also the last W - 1 inputs
    of each sequence, in x's dtype, ready to be the next initial state. Both carry gradients. reverse=True equals
    flipping time, running and flipping back, within each sequence; the initial state then enters from the right.

    Raises ValueError if shapes disagree or if `backend` cannot run these inputs.
    """
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    backend = choose(backend, x.device, x.dtype)
    if backend in IN_PYTORCH:  # the reference is already one vector operation per tap
        y = causal_conv1d_reference(
            x, weight, bias, activation=activation, initial_state=initial_state, cu_seqlens=cu_seqlens, reverse=reverse
        )
    else:
        flat = x.flatten(0, 1)
        silu = activation == "silu"
        y = _conv(flat, weight, bias, initial_state, cu_seqlens, x.shape[0], silu, reverse, backend).view(x.shape)
    if not return_final_state:
        return y
    return y, last_inputs(x, weight.shape[1] - 1, initial_state, cu_seqlens, reverse)


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = "silu",
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """One step of `causal_conv1d` for decoding: returns y (B, D) and updates `state` (B, D, W - 1) in place.

    For inference: no gradients.
    """
    _check(x[:, None], weight, bias, activation, state, None)
    if choose(backend, x.device, x.dtype) == "triton":
        run = _step if watched(state, x, weight, bias) else _unwatched_step
        return run(state, x, weight, bias, activation == "silu")
    with torch.no_grad():
        return causal_conv1d_step_reference(state, x, weight, bias, activation=activation)


def last_inputs(
    x: Tensor, width: int, initial_state: Tensor | None, cu_seqlens: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """The last `width` inputs of each sequence, most recent last: (S, D, width). Differentiable indexing, no kernel."""
    batch, length, n_channels = x.shape
    untouched = initial_state is None or not initial_state.requires_grad  # whose gradient would be zeros
    if cu_seqlens is None and untouched and length >= width:  # the usual case, by few operations
        return (x[:, :width].flip(1) if reverse else x[:, length - width :]).mT.contiguous()
    bounds = sequence_bounds(cu_seqlens, batch, batch * length).to(x.device)
    steps = torch.arange(width, device=x.device)
    if reverse:  # the last input is the leftmost one
        tokens = (bounds[:-1, None] + width - 1) - steps
        beyond = tokens - bounds[1:, None] + 1  # > 0: that many rows into the initial state
    else:
        tokens = (bounds[1:, None] - width) + steps
        beyond = bounds[:-1, None] - tokens
    if initial_state is None:
        initial_state = x.new_zeros(len(bounds) - 1, n_channels, width)
    padded = torch.cat((x.flatten(0, 1), x.new_zeros(1, n_channels)))  # so that an empty x can be indexed
    inside = padded[tokens.clamp(0, batch * length)]
    rows = (width - beyond).clamp(0, max(width - 1, 0))[:, None, :].expand(-1, n_channels, -1)
    before = initial_state.to(x.dtype).gather(2, rows)
    return torch.where((beyond > 0)[:, None, :], before, inside.mT)


def _check(x, weight, bias, activation, initial_state, cu_seqlens):
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ValueError(
            "x must be (batch, length, channels) and weight (channels, width); "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation={activation!r} is not 'silu' or None")
    n_channels, width = weight.shape
    if bias is not None and tuple(bias.shape) != (n_channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {(n_channels,)}")
    n_seqs = x.shape[0]
    if cu_seqlens is not None:
        if x.shape[0] != 1 or cu_seqlens.dim() != 1:
            raise ValueError(
                "cu_seqlens (S + 1,) packs sequences in a batch of 1; "
                f"got batch {x.shape[0]} and shape {tuple(cu_seqlens.shape)}"
            )
        n_seqs = cu_seqlens.shape[0] - 1
    if initial_state is not None and tuple(initial_state.shape) != (n_seqs, n_channels, width - 1):
        raise ValueError(
            f"initial_state has shape {tuple(initial_state.shape)}; expected {(n_seqs, n_channels, width - 1)}"
        )


# The operators below see flat tokens (sequences.py): x is (T, D). A tensor that does not apply is returned empty.


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    batch: int, silu: bool, reverse: bool, backend: str,
) -> Tensor:  # fmt: skip
    return implementation(backend, "forward")(x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse)


def _fake(x, *_):
    return x.new_empty(x.shape)


_conv = Operator("causal_conv1d", _run, _fake)


def _run_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, batch: int, silu: bool, reverse: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = implementation(backend, "backward")(dy, x, weight, bias, initial_state, cu_seqlens, batch, silu, reverse)
    inputs = (x, weight, bias, initial_state)
    return tuple(  # pyright: ignore[reportReturnType] - four, by construction
        x.new_empty(0) if i is None else g.to(i.dtype).contiguous() for i, g in zip(inputs, grads, strict=True)
    )


def _fake_backward(dy, x, weight, bias, initial_state, *_):
    return tuple(x.new_empty(0) if i is None else i.new_empty(i.shape) for i in (x, weight, bias, initial_state))


_conv_backward = Operator("causal_conv1d_backward", _run_backward, _fake_backward)


def _setup_context(ctx, inputs, output):
    *tensors, batch, silu, reverse, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (batch, silu, reverse, backend)


def _backward(ctx, dy):
    tensors = ctx.saved_tensors
    grads = _conv_backward(dy, *tensors, *ctx.options)
    present = (None if x is None else g for x, g in zip(tensors[:4], grads, strict=True))
    return *present, None, None, None, None, None


_conv.differentiate(_backward, _setup_context)


def _unwatched_step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    return implementation("triton", "step")(state, x, weight, bias, silu)


_step = torch.library.custom_op("polymamba::causal_conv1d_step", _unwatched_step, mutates_args={"state"})


@_step.register_fake
def _(state, x, *_):
    return x.new_empty(x.shape)
