"""The selective scan in CUDA C++: from tensors to launches (cuda_plan.py) of cuda_kernels/*.cu (by ../nvrtc.py).

What Triton cannot say and this needs: which lane holds what, and sums by way of shared memory (SCAN_NOTES.md). It takes
real A with up to 64 states in float32, bfloat16 and float16, and close to 2^31 tokens, on Ampere and later; all else,
and any machine where NVRTC is missing or fails, goes to the Triton kernels, which read and write the same saved states.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from .. import nvrtc
from . import cuda_plan as plans
from . import cuda_tiles as tiles
from . import triton as fallback
from .cuda_tiles import Layout
from .triton import saved_shape

__all__ = ["backward", "forward", "saved_shape", "usable"]

MOST_STATES = 64
MOST_TOKENS = 2**31 - 2**14  # of all sequences: steps are counted in 32 bits, up to a chunk or two past the end
_broken: set[int] = set()  # devices on which NVRTC failed


def usable(device: int) -> bool:
    """Whether these kernels run on a CUDA device, as far as one can tell without compiling any."""
    return device not in _broken and _capable(device)


@cache
def _capable(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and nvrtc.loads()


def _serves(u: Tensor, *others: Tensor | None, n_states: int) -> bool:
    tensors = [x for x in (u, *others) if x is not None]
    return (
        0 < n_states <= MOST_STATES
        and u.numel() > 0
        and u.shape[0] < MOST_TOKENS
        and all(x.dtype in plans.TYPES for x in tensors)
        and all(abs(x.stride(0)) * x.element_size() < 2**31 for x in tensors)
        and usable(_device(u))
    )


def _device(x: Tensor) -> int:
    return x.get_device()


def _with_rows(x: Tensor, at_once: int = 1) -> Tensor:
    """x with a contiguous last dimension, of which `at_once` elements can be moved together."""
    in_rows = x.shape[-1] <= 1 or x.stride(-1) == 1
    return x if in_rows and _widest(at_once, x) == at_once else x.clone(memory_format=torch.contiguous_format)


def _floats(x: Tensor) -> Tensor:
    """x in float32 and contiguous, so that 16 bytes of it can be moved at once."""
    x = x.float().contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _floats_of(x: Tensor | None) -> Tensor | None:
    return None if x is None else _floats(x)


def _widest(most: int, *tensors: Tensor) -> int:
    """Elements, a power of 2 up to `most`, that may be moved at once: addresses and all strides but the last divide."""
    for x in tensors:
        size, bits = x.element_size(), x.data_ptr()
        for stride in x.stride()[:-1]:
            bits |= stride * size
        most = min(most, (bits & -bits) // size or most)
    return most


def _ready(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse, dy=None):
    """(The inputs as the kernels take them, by name; their layout)."""
    n_channels, n_states = A.shape
    static = B.dim() == 2, C.dim() == 2
    groups = C.shape[1] if static[0] and not static[1] else 1 if static[0] else B.shape[1]
    # Not by the tensors' addresses: the order of sums would follow from them. They are copied if need be.
    vector = 1 if n_channels // groups % 2 else 2
    u, delta = _with_rows(u, vector), _with_rows(delta, vector)
    z, dy = (None if x is None else _with_rows(x, vector) for x in (z, dy))
    B, C = (_floats(x) if x.dim() == 2 else _with_rows(x) for x in (B, C))
    matrices = [x for x in (B, C) if x.dim() == 3]
    most = 16 // max((x.element_size() for x in matrices), default=4)
    n_seqs = batch
    if cu_seqlens is not None:
        n_seqs = cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    rows = u, delta, u if z is None else z, u if dy is None else dy, B, C
    layout = Layout(
        _device(u), u.shape[0], n_channels, n_states, n_seqs, batch, cu_seqlens is not None, groups, vector,
        _widest(min(most, n_states & -n_states), *matrices), static, tuple([x.dtype for x in rows]),
        tuple([x.stride(0) * x.element_size() for x in rows]), n_channels * u.element_size(),
        n_channels * delta.element_size(), n_channels * rows[2].element_size(),
        (B.stride(1), C.stride(1)), softplus, reverse, z is not None,
    )  # fmt: skip
    tensors = {
        "u": u, "delta": delta, "z": z, "dy": dy, "B": B, "C": C, "A": _floats(A), "D": _floats_of(D),
        "bias": _floats_of(delta_bias), "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    return tensors, layout


def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save, y=None):
    """y: room for the result, which may be some columns of a wider matrix."""
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save)
    if _serves(u, delta, B, C, z, n_states=A.shape[1]):
        with torch.cuda.device_of(u):
            try:
                return _forward(*arguments, y)
            except nvrtc.Unavailable as error:
                _give_up(_device(u), error)
    found, *others = fallback.forward(*arguments)
    return (found if y is None else y.copy_(found)), *others


def backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse,
    dz=None, du=None, ddelta=None,
):  # fmt: skip
    """dz: room for z's gradient, which may be some columns of a wider matrix.

    du, ddelta: room that those gradients may take: dy's and delta's own will do. In `scan_backward` one lane alone
    reads an element of these, before it writes the gradient there.
    """
    arguments = (dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved)
    if _serves(u, delta, B, C, z, dy, n_states=A.shape[1]):
        with torch.cuda.device_of(u):
            try:
                return _backward(*arguments, softplus, reverse, dz, du, ddelta)
            except nvrtc.Unavailable as error:
                _give_up(_device(u), error)
    return fallback.backward(*arguments, softplus, reverse, dz)


def _give_up(device: int, error: nvrtc.Unavailable) -> None:
    _broken.add(device)
    warnings.warn(f"selective_scan runs in Triton, which is slower: {error}", RuntimeWarning, stacklevel=2)


def _forward(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, softplus, reverse, save, room):
    tensors, layout = _ready(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse)
    on = u.device
    y = None if room is None or _widest(layout.vector, room) < layout.vector else room
    if y is None:
        y = torch.empty(u.shape, dtype=u.dtype, device=on)
    else:
        layout = layout._replace(y_stride=y.stride(0) * y.element_size())
    by_four = tiles.moves_by_four(layout)
    if by_four:
        rows = (tensors["u"], tensors["delta"], y, *([] if z is None else [tensors["z"]]))
        by_four = _widest(4, *rows) == 4
    p = plans.forward_plan(layout, by_four)
    final = torch.empty(layout.n_seqs, *A.shape, device=on)
    saved = torch.empty(saved_shape(u.shape[0], layout.n_seqs, *A.shape) if save else (0, *A.shape), device=on)
    first = _floats_of(initial_state)
    scratch, own, sums = None, None, None
    if p.at_once:  # a state and a sum of dt of each chunk
        scratch = torch.empty(p.states + p.n_chunks * layout.n_channels, device=on)
        own = scratch.data_ptr()
        sums = own + 4 * p.states
    results = {"y": y, "final_state": final, "saved": saved if save else None}
    pointers = plans.pack_pointers(**tensors, **results, first=first, own=own, sums=sums)
    for launch in p.launches:
        launch(pointers)
    return (y if room is None or y is room else room.copy_(y)), final, saved


def _backward(
    dy, dfinal, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, batch, saved, softplus, reverse, room,
    du, ddelta,
):  # fmt: skip
    tensors, layout = _ready(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, batch, softplus, reverse, dy)
    dz, du, ddelta = (
        None if x is None or x.dtype != of.dtype or _widest(layout.vector, x) < layout.vector else x
        for x, of in ((room, z), (du, u), (ddelta, delta))
    )
    strides = {"dz_stride": dz, "y_stride": du, "ddelta_stride": ddelta}
    layout = layout._replace(**{name: x.stride(0) * x.element_size() for name, x in strides.items() if x is not None})
    several = u.shape[0] // max(batch, 1) > plans.chunk_and_unit(layout.n_channels, layout.n_states)[0]
    from_zero = dfinal is None and not several
    p = plans.backward_plan(layout, from_zero, D is not None, delta_bias is not None)

    def like(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    gradients = {
        "du": like(u) if du is None else du, "ddelta": like(delta) if ddelta is None else ddelta,
        "dz": like(z) if dz is None else dz,
        "dh0": like(initial_state, torch.float32),
        "dA": like(A, torch.float32), "dD": like(D, torch.float32), "dbias": like(delta_bias, torch.float32),
        "dB": like(B, torch.float32 if layout.static[0] else None),
        "dC": like(C, torch.float32 if layout.static[1] else None),
    }  # fmt: skip
    scratch = torch.empty(p.offsets[-1], device=u.device)
    base = scratch.data_ptr()
    own, sums, entering, share_A, share_D, share_bias, share_B, share_C = (base + 4 * at for at in p.offsets[:-1])
    if layout.packed:  # the pieces of packed sequences leave numbers out
        scratch[p.offsets[3] : p.offsets[-1 if any(layout.static) else 6]].zero_()
    own = None if from_zero else own
    first = _floats_of(dfinal)
    pointers = plans.pack_pointers(
        **tensors, **gradients, saved=saved, first=first, own=own, sums=sums,
        entering=entering if p.span < p.chunk else own, share_A=share_A, share_B=share_B, share_C=share_C,
        share_D=None if D is None else share_D,
        share_bias=None if delta_bias is None else share_bias,
    )  # fmt: skip
    for launch in p.launches:
        launch(pointers)
    if room is not None and dz is None:
        room.copy_(gradients["dz"])
    return tuple(gradients[name] for name in ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dh0"))
