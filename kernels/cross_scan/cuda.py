"""The 2-D scan of one state in CUDA C++: plan and launches. The kernels: cuda_kernels/*.cu, compiled by ../nvrtc.py.

One launch forwards: directions are maps from positions to tokens, step sizes are made from their low rank in the
kernel, and the directions are added up in the result itself. An image's result depends, to the bit, on nothing but that
image and the parameters. Backwards the kernel leaves the gradients of the step sizes for all directions, and two matrix
products make those of `dt` and `dt_weight`; what images or blocks share of a gradient is left in shares, which are
added up in order.
"""

import struct
import warnings
from functools import cache
from operator import itemgetter
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
_FIELDS = (  # of struct Problem in cuda_kernels/common.cu, in its order
    *("x", "dt", "B", "C", "dt_weight", "bias", "A", "D", "y", "saved", "dy", "sum", "dx", "ddelta"),
    *("share_BC", "share_A", "share_bias", "share_D"),
    *("n_images", "height", "width", "n_channels", "inverse_height", "split", "every"),
    *("dt_token", "dt_direction", "B_token", "B_direction", "C_token", "C_direction"),
)
_PACK = struct.Struct(f"{len(_FIELDS)}q").pack
_ABSENT = dict.fromkeys(_FIELDS, 0)
_in_order = itemgetter(*_FIELDS)
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
    every = _every(n_channels, dt.shape[4])
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


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, W, 4, R) as (token, 4, R), its last dimension contiguous."""
    x = x.to(dtype).flatten(0, 2)
    return x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()


class _Problem:
    """Arguments of the kernels, and the macros that they are compiled with."""

    def __init__(self, x, dt, A, B, C, D, dt_weight, dt_bias):
        n_images, height, width, n_channels = x.shape
        self.device, self.length = x.get_device(), height * width
        self.blocks = n_images * -(-n_channels // BLOCK_CHANNELS)
        self.x = x.contiguous()
        kind = dt.dtype if dt.dtype == B.dtype == C.dtype else torch.float32
        self.dt, self.B, self.C = (_by_token(m, kind) for m in (dt, B, C))
        tensors = {
            "x": self.x, "dt": self.dt, "B": self.B, "C": self.C, "dt_weight": _floats(dt_weight),
            "bias": _floats(dt_bias), "A": _floats(A), "D": _floats(D),
        }  # fmt: skip
        self.kept = tensors  # until all is launched
        at_once = 4  # elements of dt; strides and address divide by them
        while at_once > 1 and (
            self.dt.shape[2] % at_once
            or any(s % at_once for s in self.dt.stride()[:2])
            or self.dt.data_ptr() % (at_once * self.dt.element_size())
        ):
            at_once //= 2
        wide = n_channels % 4 == 0 and self.x.data_ptr() % (4 * self.x.element_size()) == 0
        self.macros = (
            ("U", _TYPES[x.dtype]), ("M", _TYPES[kind]), ("R", self.dt.shape[2]), ("VR", at_once), ("WIDE", int(wide)),
            ("FAST", int(x.dtype != torch.float32)),
        )  # fmt: skip
        self.values = _ABSENT | {name: m.data_ptr() for name, m in tensors.items()} | {
            "n_images": n_images, "height": height, "width": width, "n_channels": n_channels,
            "inverse_height": -(-(2**32) // height) % 2**32,
            "every": _every(n_channels, self.dt.shape[2]),
        }  # fmt: skip
        for name, m in (("dt", self.dt), ("B", self.B), ("C", self.C)):
            self.values |= {f"{name}_token": m.stride(0), f"{name}_direction": m.stride(1)}

    def launch(self, kernel: str, blocks: int, **values: Tensor | int | None) -> None:
        plan = _plan(kernel, self.length, self.x.shape[3], self.dt.shape[2])
        numbers = {k: 0 if v is None else v if isinstance(v, int) else v.data_ptr() for k, v in values.items()}
        function = _function(kernel, self.device, (*self.macros, *zip(plan._fields, plan, strict=True)))
        function(blocks, 32 * plan.WARPS, _PACK(*_in_order(self.values | numbers)))


def forward(x, dt, A, B, C, D, dt_weight, dt_bias, save: bool) -> tuple[Tensor, Tensor]:
    """(y, saved states)."""
    arguments = (x, dt, A, B, C, D, dt_weight, dt_bias)
    saved = torch.empty(saved_shape(x, dt) if save else (0,), device=x.device)
    if usable(x.get_device()):
        with torch.cuda.device_of(x):
            try:
                return _forward(_Problem(*arguments), saved), saved
            except nvrtc.Unavailable as error:
                _give_up(x.get_device(), error)
    return four_scans(*arguments), saved


def _give_up(device: int, error: nvrtc.Unavailable) -> None:
    _broken.add(device)
    message = f"cross_scan runs as four selective scans, which is slower: {error}"
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _forward(p: _Problem, saved: Tensor) -> Tensor:
    split = p.blocks < nvrtc.processors(p.device)
    shape = (4, *p.x.shape) if split else p.x.shape
    y = torch.empty(shape, dtype=torch.float32, device=p.x.device)
    states = saved if saved.numel() else None
    p.launch("forward", p.blocks * (4 if split else 1), y=y, saved=states, split=int(split))
    return y[0].add_(y[1]).add_(y[2]).add_(y[3]) if split else y


def backward(dy, x, dt, A, B, C, D, dt_weight, dt_bias, saved) -> tuple[Tensor, ...]:
    """Gradients of (x, dt, A, B, C, D, dt_weight, dt_bias)."""
    arguments = (x, dt, A, B, C, D, dt_weight, dt_bias)
    if usable(x.get_device()):
        with torch.cuda.device_of(x):
            try:
                return _backward(_Problem(*arguments), dy.float().contiguous(), D, dt_weight, saved)
            except nvrtc.Unavailable as error:
                _give_up(x.get_device(), error)
    with torch.enable_grad():
        leaves = [m.detach().requires_grad_() for m in arguments]
        return torch.autograd.grad(four_scans(*leaves), leaves, dy, materialize_grads=True)


def _backward(p: _Problem, dy: Tensor, D: Tensor, dt_weight: Tensor, saved: Tensor) -> tuple[Tensor, ...]:
    n_images, height, width, n_channels = p.x.shape
    n_tokens, rank = n_images * p.length, p.dt.shape[2]

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=p.x.device)

    dx, ddelta = torch.empty_like(p.x), p.x.new_empty(n_tokens, 4 * n_channels)
    total = dx if dx.dtype == torch.float32 else floats(*p.x.shape)
    share_BC = floats(-(-n_channels // BLOCK_CHANNELS), 2, 4, n_tokens)
    share_A, share_bias = floats(n_images, 4, n_channels), floats(n_images, 4, n_channels)
    share_D = floats(n_images, n_channels)
    p.launch(
        "backward", p.blocks, dy=dy, saved=saved, sum=total, dx=dx, ddelta=ddelta,
        share_BC=share_BC, share_A=share_A, share_bias=share_bias, share_D=share_D,
    )  # fmt: skip
    # All directions in one product: the weights stand along the diagonal.
    weights = dx.new_zeros(4, n_channels, 4, rank)
    weights.diagonal(dim1=0, dim2=2).copy_(dt_weight.permute(1, 2, 0))
    ddt = (ddelta @ weights.view(4 * n_channels, 4 * rank)).view(n_images, height, width, 4, rank)
    dweight = (ddelta.T @ p.dt.to(dx.dtype).flatten(1)).view(4, n_channels, 4, rank)
    dweight = dweight.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    sums = share_BC.sum(0).transpose(1, 2).view(2, n_images, height, width, 4, 1)
    dB, dC = (torch.empty(m.shape, dtype=p.B.dtype, device=m.device).copy_(m) for m in sums)
    return dx, ddt, share_A.sum(0)[:, :, None], dB, dC, share_D.sum(0).expand(D.shape), dweight, share_bias.sum(0)
