"""A step of a whole stack of Mamba blocks in CUDA C++: cuda_kernels/stack.cu, compiled for its sizes by ../nvrtc.py.

Four kernels a block, each of which begins before the last one has ended: for GPUs that can do that (Hopper and later),
and for bf16 weights. What does not fit goes block by block to Triton.

Letters: B sequences, M model width, E inner width, R rank of dt, N states, W convolution width.
"""

import struct
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..selective_scan import cuda as selective_scan
from . import cuda_middle

FEWEST, MOST, WIDEST = 3, 64, 1024  # sequences, and M, that `step` serves: measured, benchmarks/results/gpu_model.md
MIDDLE, QUARTERS, FILE = 0, 1, "stack.cu"
_pack_outer = struct.Struct("9qdq").pack
WARPS = 8  # of a block of threads
_FOLDER = Path(__file__).parent / "cuda_kernels"
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_pack = struct.Struct("19qdq").pack  # struct Problem of stack.cu
_broken: set[int] = set()  # devices that NVRTC does not serve


def serves(x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence, centred: bool) -> bool:
    """Whether `step` takes these."""
    w, (n_rows, width) = weights[0], x.shape
    (n_channels, n_states), rank, taps = w.A_log.shape, w.dt_proj.shape[1], w.conv.shape[1]
    shapes = w.in_proj.shape, w.x_proj.shape, w.conv.shape
    return (
        FEWEST <= n_rows <= MOST
        and width <= WIDEST
        and not centred
        and width % 256 == n_channels % 256 == rank % 16 == 0
        and n_states == 16
        and taps > 1
        and _capable(x)
        and x.dtype == torch.bfloat16
        and all(_fits(t) for one in weights for t in one)
        and all((one.in_proj.shape, one.x_proj.shape, one.conv.shape) == shapes for one in weights)
        and all(conv.dtype == torch.bfloat16 and ssm.dtype == torch.float32 for conv, ssm in states)
        and all(t.data_ptr() % 16 == 0 and t.device == x.device for state in states for t in state)
        and all(t is None or t.device == x.device for one in weights for t in one)
    )


def step(
    x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence, eps: float, centred: bool
) -> Tensor | None:
    """The stream (B, M), float32, after all blocks; None where NVRTC fails."""
    if not serves(x, states, weights, centred):
        return None
    w, (n_rows, width), device = weights[0], x.shape, x.get_device()
    n_channels, rank = w.dt_proj.shape
    octets = -(-n_rows // 8)
    with torch.cuda.device_of(x):
        try:
            kernels = _kernels(width, n_channels, rank, w.conv.shape[1], octets, device)
        except nvrtc.Unavailable as error:
            return _give_up(device, error)

        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        x, stream = x.contiguous(), room(n_rows, width)
        written = [stream, room(n_rows, width, dtype=x.dtype), room(width // 16, 8 * octets)]
        written += [room(n_rows, 2 * n_channels, dtype=x.dtype), room(n_rows, w.x_proj.shape[0])]
        written += [room(n_rows, n_channels, dtype=x.dtype)]
        begin, *of_a_block = kernels
        between = cuda_middle.of(n_rows, weights[0], device) if MIDDLE else None
        for i, (one, state) in enumerate(zip(weights, states, strict=True)):
            behind = weights[i + 1].norm if i + 1 < len(weights) else None
            if between is not None:
                stream, scaled, squares, uz, _, y = written
                outer = stream, scaled, squares, uz, y
                if i == 0:
                    begin(_pack_outer(*_addresses(one.in_proj, one.out_proj, one.norm, x, *outer), eps, n_rows))
                argument = _pack_outer(*_addresses(one.in_proj, one.out_proj, behind, None, *outer), eps, n_rows)
                of_a_block[0](argument)
                between(uz, *state, one, y)
                of_a_block[1](argument)
                continue
            own = one.in_proj, one.conv, one.conv_bias, one.x_proj, one.dt_proj, one.dt_bias, one.A_log, one.D
            if i == 0:
                begin(_pack(*_addresses(*own, one.out_proj, one.norm, x, *state, *written), eps, n_rows))
            argument = _pack(*_addresses(*own, one.out_proj, behind, None, *state, *written), eps, n_rows)
            for kernel in of_a_block:
                kernel(argument)
    return stream


def _capable(x: Tensor) -> bool:
    return nvrtc.EMULATED or (x.is_cuda and x.get_device() not in _broken and _capable_device(x.get_device()))


@cache
def _capable_device(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and nvrtc.loads()


def _fits(t: Tensor | None) -> bool:
    return t is None or (t.dtype == torch.bfloat16 and t.is_contiguous() and t.data_ptr() % 16 == 0)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _give_up(device: int, error: nvrtc.Unavailable) -> None:
    _broken.add(device)
    warnings.warn(f"a step of Mamba blocks runs in Triton, which is slower: {error}", RuntimeWarning, stacklevel=4)


class _Kernel:
    """One kernel, with as many blocks of threads as there is work for."""

    def __init__(self, name: str, device: int, units: int, sizes: dict[str, int]):
        processors = nvrtc.processors(device)
        self.blocks = min(units, processors)
        self.kernel = nvrtc.kernel(_source(**sizes, BLOCKS=processors, WARPS=WARPS, CONV=1, QUARTERS=QUARTERS), name, device)

    def __call__(self, argument: bytes) -> None:
        self.kernel(self.blocks, 32 * WARPS, argument, early=True)


def _source(**macros: int) -> str:
    file = "outer.cu" if MIDDLE else FILE
    parts = [f"#define {name} {value}" for name, value in macros.items()]
    files = (_COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / file)
    return "\n".join([*parts, *(path.read_text() for path in files)]) + "\n"


@lru_cache(64)
def _kernels(M: int, E: int, R: int, W: int, octets: int, device: int) -> list[_Kernel]:
    """begin, enter, project, scan, leave."""
    units = {
        "begin": 8 * octets, "enter": E // 16, "project": (R + 32) // 16 * octets, "scan": E // 16 * octets,
        "leave": M // 16 * -(-octets // 4),
    }  # fmt: skip
    sizes = {"M": M, "E": E, "R": R, "W": W, "OCTETS": octets}
    if MIDDLE:
        units = {name: units[name] for name in ("begin", "enter", "leave")}
    return [_Kernel(name, device, n, sizes) for name, n in units.items()]
