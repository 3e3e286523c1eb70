"""The 2-D scan of one state in CUDA C++: plan and launches. The kernels: cuda_kernels/*.cu, compiled by ../nvrtc.py.

One launch forwards: directions are maps from positions to tokens, step sizes are made from their low rank in the
kernel, and the directions are added up in the result itself. An image's result depends, to the bit, on nothing but that
image and the parameters. Backwards the kernel leaves the gradients of the step sizes for all directions, and two matrix
products make those of `dt` and `dt_weight`; what images or blocks share of a gradient is left in shares, which are
added up in order.
"""

import math
import struct
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nvrtc
from ..selective_scan import cuda as selective_scan
from .scans import four_scans

BLOCK_CHANNELS = 32
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_OWN = Path(__file__).parent / "cuda_kernels"
_PACK = struct.Struct("29q").pack  # struct Problem in cuda_kernels/common.cu: 16 addresses, 13 numbers
_ROOM = 96 * 1024  # bytes of shared memory that a block takes at most for what its positions share


class Plan(NamedTuple):
    """Macros of cuda_kernels/common.cu."""

    T: int  # positions of a lane: another T is another order of sums
    WARPS: int  # of a block
    MIN_BLOCKS: int  # that a multiprocessor is to have room for


def _most_warps(T: int, rank: int, wanted: int) -> int:
    return max(min(wanted, _ROOM // (32 * T * (rank + 7))), 1)


def _round_warps(n_channels: int, rank: int) -> int:
    """Warps that go from one saved state to the next: their number must not follow from the length, which a compiler
    leaves open. Few channels make few blocks, which then need more warps each."""
    return _most_warps(4, rank, 4 if n_channels <= 128 else 2)


@cache
def _plan(kernel: str, length: int, n_channels: int, rank: int) -> Plan:
    """As many warps as the positions need, up to what is best where they need several rounds. (Of an H100.)"""
    T = 8 if kernel == "forward" and length > 64 else 4
    most = _most_warps(T, rank, 4) if kernel == "forward" else _round_warps(n_channels, rank)
    warps = min(-(-length // (4 * T)), most)
    return Plan(T, warps, 12 // warps)  # 168 registers to a thread: with fewer some of them spill


def _every(n_channels: int, rank: int) -> int:
    """Positions from one saved state to the next."""
    return 16 * _round_warps(n_channels, rank)


def saved_shape(x: Tensor, dt: Tensor) -> tuple[int, ...]:
    n_images, height, width, n_channels = x.shape
    every = _every(n_channels, dt.shape[-1])
    return n_images, 4, (height * width + every - 1) // every, n_channels


_broken: set[int] = set()  # devices on which NVRTC failed


def usable(device: int) -> bool:
    """Whether these kernels run on a CUDA device, as far as one can tell without compiling any."""
    return device not in _broken and selective_scan.usable(device)


@cache
def _source(kernel: str, macros: tuple[tuple[str, Any], ...]) -> str:
    parts = [f"#define {name} {value}" for name, value in macros]
    files = (_COMMON / "device.cu", _COMMON / "numbers.cu", _OWN / "common.cu", _OWN / f"{kernel}.cu")
    return "\n".join([*parts, *(path.read_text() for path in files)]) + "\n"


@cache
def _function(kernel: str, device: int, macros: tuple[tuple[str, Any], ...]):
    return nvrtc.kernel(_source(kernel, macros), f"scan_{kernel}", device)


def _common(*tensors: Tensor) -> torch.dtype:
    """The dtype of all, or float32."""
    dtype = tensors[0].dtype
    return dtype if dtype in _TYPES and all(x.dtype == dtype for x in tensors) else torch.float32


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(.., 4, R) as (token, 4, R), its last dimension contiguous."""
    x = x.to(dtype).flatten(0, -3)
    return x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()


class _Layout(NamedTuple):
    """All of a call but its addresses."""

    device: int
    shape: tuple[int, int, int, int]  # of x
    rank: int
    types: tuple[torch.dtype, torch.dtype, torch.dtype]  # of x, of dt, B and C, of what is one for all images
    log: bool  # A is given as log(-A)
    at_once: int  # elements of dt that are moved at once: its strides and its address divide by them
    wide: bool  # channels of x are moved in fours
    strides: tuple[int, ...]  # from token to token and from direction to direction: of dt, of B, of C

    @property
    def length(self) -> int:
        return self.shape[1] * self.shape[2]

    @property
    def blocks(self) -> int:
        return self.shape[0] * -(-self.shape[3] // BLOCK_CHANNELS)


class _Launch(NamedTuple):
    function: Callable[[int, int, bytes], None]
    blocks: int
    threads: int
    numbers: tuple[int, ...]


@cache
def _launch_of(kernel: str, on: _Layout, split: bool) -> _Launch:
    """split: a block for each direction."""
    n_images, height, width, n_channels = on.shape
    plan, types = _plan(kernel, on.length, n_channels, on.rank), [_TYPES[t] for t in on.types]
    macros = (
        *zip("UMP", types, strict=True), ("LOG", int(on.log)), ("R", on.rank), ("VR", on.at_once),
        ("WIDE", int(on.wide)), ("FAST", int(on.types[0] != torch.float32)), *zip(plan._fields, plan, strict=True),
    )  # fmt: skip
    inverse_height, every = -(-(2**32) // height) % 2**32, _every(n_channels, on.rank)
    numbers = (n_images, height, width, n_channels, inverse_height, int(split), every, *on.strides)
    blocks = on.blocks * (4 if split else 1)
    return _Launch(_function(kernel, on.device, macros), blocks, 32 * plan.WARPS, numbers)


class _Problem(NamedTuple):
    """What the kernels read, as they take it."""

    layout: _Layout
    x: Tensor
    dt: Tensor  # (token, 4, R)
    parameters: tuple[Tensor, ...]  # dt_weight, dt_bias, A, D
    inputs: tuple[int, ...]  # addresses of x, dt, B, C and the parameters
    kept: tuple[Tensor, ...] = ()  # until all is launched

    def launch(self, kernel: str, *results: Tensor | None, split: bool = False) -> None:
        """results: y, saved, dy, sum, dx, ddelta, share_BC, shares, as many as the kernel has."""
        function, blocks, threads, numbers = _launch_of(kernel, self.layout, split)
        addresses = [0 if m is None else m.data_ptr() for m in results]
        function(blocks, threads, _PACK(*self.inputs, *addresses, *[0] * (8 - len(addresses)), *numbers))


def _problem(x, dt, A, B, C, D, dt_weight, dt_bias) -> _Problem:
    x, kind, shared = x.contiguous(), _common(dt, B, C), _common(dt_weight, dt_bias, A, D)
    dt, B, C = (_by_token(m, kind) for m in (dt, B, C))
    parameters = tuple(m.to(shared).contiguous() for m in (dt_weight, dt_bias, A, D))
    at_once = _at_once(dt.shape[2], *dt.stride()[:2], dt.data_ptr() // dt.element_size())
    wide = x.shape[3] % 4 == 0 and x.data_ptr() % (4 * x.element_size()) == 0
    strides = (*dt.stride()[:2], *B.stride()[:2], *C.stride()[:2])
    types = (x.dtype, kind, shared)
    layout = _Layout(x.get_device(), tuple(x.shape), dt.shape[2], types, False, at_once, wide, strides)
    return _Problem(layout, x, dt, parameters, tuple(m.data_ptr() for m in (x, dt, B, C, *parameters)), (B, C))


def _at_once(*numbers: int) -> int:
    """The largest power of 2 up to 4 that divides all."""
    return math.gcd(4, *numbers)


def forward(x, dt, A, B, C, D, dt_weight, dt_bias, save: bool) -> tuple[Tensor, Tensor]:
    """(y, saved states)."""
    arguments = (x, dt, A, B, C, D, dt_weight, dt_bias)
    saved = torch.empty(saved_shape(x, dt) if save else (0,), device=x.device)
    if usable(x.get_device()):
        with torch.cuda.device_of(x):
            try:
                return _forward(_problem(*arguments), saved), saved
            except nvrtc.Unavailable as error:
                _give_up(x.get_device(), error)
    return four_scans(*arguments), saved


def _give_up(device: int, error: nvrtc.Unavailable) -> None:
    _broken.add(device)
    message = f"cross_scan runs as four selective scans, which is slower: {error}"
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _forward(p: _Problem, saved: Tensor) -> Tensor:
    split = p.layout.blocks < nvrtc.processors(p.layout.device)
    shape = (4, *p.x.shape) if split else p.x.shape
    y = torch.empty(shape, dtype=torch.float32, device=p.x.device)
    p.launch("forward", y, saved if saved.numel() else None, split=split)
    return y[0].add_(y[1]).add_(y[2]).add_(y[3]) if split else y


def backward(dy, x, dt, A, B, C, D, dt_weight, dt_bias, saved) -> tuple[Tensor, ...]:
    """Gradients of (x, dt, A, B, C, D, dt_weight, dt_bias)."""
    arguments = (x, dt, A, B, C, D, dt_weight, dt_bias)
    if usable(x.get_device()):
        with torch.cuda.device_of(x):
            try:
                p = _problem(*arguments)
                dx, ddelta, sum_BC, (dA, dbias, dD) = _backward(p, dy.float().contiguous(), saved)
            except nvrtc.Unavailable as error:
                _give_up(x.get_device(), error)
            else:
                ddt = (ddelta @ _along_diagonal(dt_weight, dx.dtype)).view(dt.shape)
                d_dt_weight = _of_diagonal(ddelta.T @ p.dt.to(dx.dtype).flatten(1))
                dB, dC = (
                    torch.empty(m.shape, dtype=p.dt.dtype, device=m.device).copy_(m)
                    for m in sum_BC.transpose(1, 2).view(2, *B.shape)
                )
                return dx, ddt, dA[:, :, None], dB, dC, dD.expand(D.shape), d_dt_weight, dbias
    with torch.enable_grad():
        leaves = [m.detach().requires_grad_() for m in arguments]
        return torch.autograd.grad(four_scans(*leaves), leaves, dy, materialize_grads=True)


def _backward(p: _Problem, dy: Tensor, saved: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the step sizes (token, 4 E), of B and C (2, 4, token), and of A, the bias and D (3, 4, E).

    dy: float32, contiguous.
    """
    n_images, _, _, n_channels = p.x.shape
    n_tokens = n_images * p.layout.length

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=p.x.device)

    dx, ddelta = torch.empty_like(p.x), p.x.new_empty(n_tokens, 4 * n_channels)
    total = dx if dx.dtype == torch.float32 else floats(*p.x.shape)
    share_BC, shares = floats(-(-n_channels // BLOCK_CHANNELS), 2, 4, n_tokens), floats(n_images, 3, 4, n_channels)
    p.launch("backward", None, saved, dy, total, dx, ddelta, share_BC, shares)
    return dx, ddelta, share_BC.sum(0), shares.sum(0)


def _along_diagonal(dt_weight: Tensor, dtype: torch.dtype, beside: int = 0) -> Tensor:
    """dt_weight (4, E, R) as one matrix (4 E, 4 (R + beside)) for all directions, zero where they would mix."""
    n_channels, rank = dt_weight.shape[1:]
    weights = torch.zeros(4, n_channels, 4, rank + beside, dtype=dtype, device=dt_weight.device)
    weights[..., :rank].diagonal(dim1=0, dim2=2).copy_(dt_weight.permute(1, 2, 0))
    return weights.view(4 * n_channels, -1)


def _of_diagonal(matrix: Tensor, beside: int = 0) -> Tensor:
    """(4 E, 4 (R + beside)) -> (4, E, R), the reverse of `_along_diagonal`."""
    blocks = matrix.view(4, len(matrix) // 4, 4, -1)
    blocks = blocks[..., : blocks.shape[3] - beside]
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


# For VMamba's block (kernels/vss_block): dt, B and C as its projection leaves them, (T, 4 (R + 2)), A as its logarithm.


@cache
def _projected_layout(device, shape, rank, types) -> _Layout:
    """All tensors are PyTorch's own, whose addresses divide by more than is moved at once."""
    token, direction = 4 * (rank + 2), rank + 2
    at_once = _at_once(rank, token, direction)
    return _Layout(device, shape, rank, types, True, at_once, shape[3] % 4 == 0, (token, direction) * 3)


def _of_projection(x, low, A_log, D, dt_weight, dt_bias) -> _Problem:
    rank = dt_weight.shape[2]
    parameters = tuple([m.contiguous() for m in (dt_weight, dt_bias, A_log, D)])
    layout = _projected_layout(x.get_device(), tuple(x.shape), rank, (x.dtype, low.dtype, D.dtype))
    first, size = low.data_ptr(), low.element_size()
    addresses = [m.data_ptr() for m in parameters]
    inputs = x.data_ptr(), first, first + rank * size, first + (rank + 1) * size, *addresses
    return _Problem(layout, x, low, parameters, inputs)


def forward_projected(x, low, A_log, D, dt_weight, dt_bias, save: bool) -> tuple[Tensor, Tensor]:
    """(y, saved states); x (B, H, W, E), as low contiguous and at an address of PyTorch's. Raises Unavailable."""
    p = _of_projection(x, low, A_log, D, dt_weight, dt_bias)
    saved = torch.empty(saved_shape(x, dt_weight) if save else (0,), device=x.device)
    return _forward(p, saved), saved


def backward_projected(dy, x, low, A_log, D, dt_weight, dt_bias, saved, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients of (x, low), and of (A_log, D, dt_weight, dt_bias) in the given dtype. dy: float32, contiguous."""
    p, rank = _of_projection(x, low, A_log, D, dt_weight, dt_bias), dt_weight.shape[2]
    dx, ddelta, sum_BC, shares = _backward(p, dy, saved)
    dlow = torch.mm(ddelta, _along_diagonal(dt_weight, dx.dtype, beside=2))
    dlow.view(-1, 4, rank + 2)[..., rank:].copy_(sum_BC.permute(2, 1, 0))
    d_dt_weight = _of_diagonal(torch.mm(ddelta.T, low), beside=2)
    dA, dbias, dD = shares.to(dtype)
    # Laid out as the parameter is, or autograd would copy it once more.
    d_dt_weight = d_dt_weight.to(dtype).contiguous()
    return dx, dlow, dA.view(A_log.shape), dD.view(D.shape), d_dt_weight, dbias
