"""The public selective scan: checks, the choice of a backend, and the operator that torch.compile and autograd see."""

import torch
from torch import Tensor

from ..backends import choose, watched
from ..operators import Implementations, Operator
from .plain import selective_scan_plain
from .reference import selective_scan_reference, selective_scan_step_reference

MOST_COMPLEX_STATES = 256  # that triton_complex.py takes: a program has all of a channel's in registers

implementation = Implementations(
    __package__, torch="chunked", numba="cpu", triton="triton", triton_complex="triton_complex", cuda="cuda"
)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    *, delta_bias: Tensor | None = None, delta_softplus: bool = False, initial_state: Tensor | None = None,
    return_final_state: bool = False, cu_seqlens: Tensor | None = None, reverse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The selective state-space recurrence of Mamba (arXiv 2312.00752, algorithm 2).

        dt = delta + delta_bias, through softplus if delta_softplus
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
        y_t = (C_t h_t + D u_t) silu(z_t);  2 Re(C_t h_t) for complex A

    Shapes, with B batch, L length, D channels, N states, G groups (channel d belongs to group d // (D / G)):
        u, delta, z            (B, L, D)
        A                      (D, N), real or complex; its real part is negative in a stable model
        B, C                   (B, L, N) or (B, L, G, N), or (D, N) where they do not depend on the input;
                               may be complex if A is
        D, delta_bias          (D,)
        cu_seqlens             (S + 1,) int32: B = 1 holds S sequences end to end, sequence s in
                               [cu_seqlens[s], cu_seqlens[s+1])
        initial_state          (B, D, N), or (S, D, N) with cu_seqlens

    Returns y (B, L, D) in u's dtype; with return_final_state also the state after each sequence's last step, in
    float32 (float64 for float64 inputs, complex64 or complex128 for complex A). Both carry gradients. reverse=True
    equals flipping time, running and flipping back, within each sequence; the initial state then enters from the right.

    The backward is deterministic. Sums and the state are in float32 at least. Raises ValueError if shapes disagree
    or if `backend` (one of reference, torch, plain, numba, triton, cuda; by default chosen by device) cannot run these
    inputs: plain (plain.py) takes neither states nor packs; numba, cuda and plain take real A only, triton complex A of
    up to 256 states.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    in_triton = A.shape[1] <= MOST_COMPLEX_STATES
    if backend == "triton" and A.is_complex() and not in_triton:
        raise ValueError(
            f"backend='triton' takes complex A of at most {MOST_COMPLEX_STATES} states, not {A.shape[1]}: use 'torch'"
        )
    backend = choose(backend, u.device, u.dtype, is_complex=A.is_complex(), in_cuda=True, complex_in_triton=in_triton)
    if backend == "triton" and A.is_complex():
        backend = "triton_complex"
    if backend == "reference":
        return selective_scan_reference(
            *(u, delta, A, B, C, D, z),
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            initial_state=initial_state,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
        )
    if backend == "plain":
        if initial_state is not None or return_final_state or cu_seqlens is not None:
            raise ValueError("backend='plain' takes no initial_state, return_final_state or cu_seqlens")
        options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, "reverse": reverse}
        return selective_scan_plain(u, delta, A, B, C, D, z, **options)
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    flat_u, flat_delta, flat_z = u.flatten(0, 1), delta.flatten(0, 1), None if z is None else z.flatten(0, 1)
    flat_B, flat_C = _flat_matrix(B), _flat_matrix(C)
    tensors = (flat_u, flat_delta, A, flat_B, flat_C, D, flat_z, delta_bias, initial_state, cu_seqlens)
    y, final, _ = _scan(*tensors, u.shape[0], delta_softplus, reverse, save, backend)
    return (y.view(u.shape), final) if return_final_state else y.view(u.shape)


def selective_scan_step(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, *, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """One step of `selective_scan` for decoding: returns y (B, D) and updates `state` (B, D, N) in place.

    u, delta, z are (B, D); B, C are (B, G, N), or (D, N) if static. For inference: no gradients. With
    backend="cuda" the step is Triton's; of complex A it is PyTorch's, with backend="triton", too.
    """
    backend = "triton" if backend == "cuda" else backend
    backend = "torch" if backend == "triton" and A.is_complex() else backend
    if B.dim() not in (2, 3) or C.dim() not in (2, 3):
        raise ValueError(
            f"B and C of a step must be (B, G, N), or (D, N) if static; got {tuple(B.shape)} and {tuple(C.shape)}"
        )
    B_, C_ = (m if m.dim() == 2 else m[:, None] for m in (B, C))
    _check(u[:, None], delta[:, None], A, B_, C_, D, None if z is None else z[:, None], delta_bias, state, None)
    backend = choose(backend, u.device, u.dtype, is_complex=A.is_complex())
    if backend == "triton":
        tensors = (state, u, delta, A, B, C, D, z, delta_bias)
        run = _step if watched(*tensors) else _unwatched_step
        return run(*tensors, delta_softplus)
    # On a CPU one step is a handful of small vector operations: PyTorch's own are as fast as a kernel call.
    with torch.no_grad():
        return selective_scan_step_reference(
            state, u, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=delta_softplus
        )


def _flat_matrix(x: Tensor) -> Tensor:
    """B or C as (T, G, N) over all tokens, or (D, N) if static."""
    if x.dim() == 2:
        return x
    return (x if x.dim() == 4 else x[:, :, None]).flatten(0, 1)


def _check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens):
    def expect(name: str, x: Tensor | None, *allowed: tuple[int, ...]) -> None:
        if x is not None and tuple(x.shape) not in allowed:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {' or '.join(map(str, allowed))}")

    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"u must be (batch, length, channels) and A (channels, states); got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, length, n_channels = u.shape
    n_states = A.shape[1]
    expect("A", A, (n_channels, n_states))
    expect("delta", delta, (batch, length, n_channels))
    expect("z", z, (batch, length, n_channels))
    expect("D", D, (n_channels,))
    expect("delta_bias", delta_bias, (n_channels,))
    groups = {x.shape[2] for x in (B, C) if x.dim() == 4} | {1 for x in (B, C) if x.dim() == 3}
    if len(groups) > 1 or any(g < 1 or n_channels % g for g in groups):
        raise ValueError(
            f"B and C must have the same number of groups, a divisor of {n_channels} channels; got {sorted(groups)}"
        )
    n_groups = next(iter(groups), 1)
    for name, x in (("B", B), ("C", C)):
        expect(name, x, (batch, length, n_states), (batch, length, n_groups, n_states), (n_channels, n_states))
        if x.is_complex() and not A.is_complex():
            raise ValueError(f"{name} is complex but A is real: a complex {name} needs a complex A")
    n_seqs = batch
    if cu_seqlens is not None:
        if batch != 1 or cu_seqlens.dim() != 1:
            raise ValueError(
                "cu_seqlens (S + 1,) packs sequences in a batch of 1; "
                f"got batch {batch} and shape {tuple(cu_seqlens.shape)}"
            )
        n_seqs = cu_seqlens.shape[0] - 1
    expect("initial_state", initial_state, (n_seqs, n_channels, n_states))


# What the operators below see is flat: T tokens of all sequences laid end to end (sequences.py). u, delta, z are
# (T, D); B, C (T, G, N) or (D, N); without cu_seqlens each of the `batch` sequences has T / batch tokens. A tensor
# that does not apply is returned as an empty one.


def _run(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    batch: int, softplus: bool, reverse: bool, save: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, final state, saved states)."""
    forward = implementation(backend, "forward")
    options = cu_seqlens, batch, softplus, reverse, save
    y, final, saved = forward(u, delta, A, B, C, D, z, delta_bias, initial_state, *options)
    return y, final.contiguous(), saved


def _fake(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save, backend):
    n_seqs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(u.dtype, torch.float32)
    final = u.new_empty(n_seqs, *A.shape, dtype=dtype.to_complex() if A.is_complex() else dtype)
    saved = implementation(backend, "saved_shape")(u.shape[0], n_seqs, *A.shape) if save else (0, *A.shape)
    return u.new_empty(u.shape), final, final.new_empty(saved)


_scan = Operator("selective_scan", _run, _fake)


def _run_backward(
    dy: Tensor, dfinal: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    saved: Tensor, batch: int, softplus: bool, reverse: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state)."""
    backward = implementation(backend, "backward")
    grads = backward(
        dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse
    )
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(  # pyright: ignore[reportReturnType] - nine, by construction
        u.new_empty(0) if x is None else g.to(x.dtype).contiguous() for x, g in zip(inputs, grads, strict=True)
    )


def _fake_backward(dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, *_):
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


_scan_backward = Operator("selective_scan_backward", _run_backward, _fake_backward)


def _setup_context(ctx, inputs, output):
    *tensors, batch, softplus, reverse, _, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = (batch, softplus, reverse, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):
    *tensors, saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    grads = _scan_backward(dy, dfinal, *tensors, saved, *ctx.options)
    present = (None if x is None else g for x, g in zip(tensors[:9], grads, strict=True))
    return *present, None, None, None, None, None, None


_scan.differentiate(_backward, _setup_context)


def _unwatched_step(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    return implementation("triton", "step")(state, u, delta, A, B, C, D, z, delta_bias, softplus)


_step = torch.library.custom_op("polymamba::selective_scan_step", _unwatched_step, mutates_args={"state"})


@_step.register_fake
def _(state, u, *_):
    return u.new_empty(u.shape)
