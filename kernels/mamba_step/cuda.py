"""Kernels of a step in CUDA C++: cuda_kernels/*.cu, compiled for their sizes by ../nvrtc.py.

`step` takes a whole stack of Mamba blocks for some 3 to 64 sequences: four kernels a block, each of which begins before
the last one has ended. `head` is the end of a language model for a few sequences. Both take bf16 weights, and GPUs that
can begin a kernel early (Hopper and later).

Letters: B sequences, M model width, E inner width, R rank of dt, N states, W convolution width, V vocabulary.
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

FEWEST, MOST, WIDEST = 3, 64, 1024  # sequences, and M, that `step` serves: measured, benchmarks/results/gpu_model.md
FEW = 4096  # sequences times M up to which `head` is faster than a norm and cuBLAS's product
STACK_WARPS, HEAD_WARPS = 8, 16  # of a block of threads
_FOLDER = Path(__file__).parent / "cuda_kernels"
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_pack_stack, _pack_head = struct.Struct("19qd").pack, struct.Struct("5qd").pack  # struct Problem of stack.cu, head.cu
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
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for state in states for t in state)
    )


def step(
    x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence, eps: float, centred: bool
) -> Tensor | None:
    """The stream (B, M), float32, after all blocks; None where NVRTC fails."""
    if not serves(x, states, weights, centred):
        return None
    w, (n_rows, width), device = weights[0], x.shape, x.get_device()
    n_channels, rank = w.dt_proj.shape
    with torch.cuda.device_of(x):
        try:
            kernels = _stack_kernels(width, n_channels, rank, w.conv.shape[1], n_rows, device)
        except nvrtc.Unavailable as error:
            return _give_up(device, error)

        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        x, stream = x.contiguous(), room(n_rows, width)
        written = [stream, room(n_rows, width, dtype=x.dtype), room(width // 16, n_rows)]
        written += [room(n_rows, 2 * n_channels, dtype=x.dtype), room(n_rows, w.x_proj.shape[0])]
        written += [room(n_rows, n_channels, dtype=x.dtype)]
        begin, *of_a_block = kernels
        for i, (one, state) in enumerate(zip(weights, states, strict=True)):
            behind = weights[i + 1].norm if i + 1 < len(weights) else None
            own = one.in_proj, one.conv, one.conv_bias, one.x_proj, one.dt_proj, one.dt_bias, one.A_log, one.D
            if i == 0:
                begin(_pack_stack(*_addresses(*own, one.out_proj, one.norm, x, *state, *written), eps))
            argument = _pack_stack(*_addresses(*own, one.out_proj, behind, None, *state, *written), eps)
            for kernel in of_a_block:
                kernel(argument)
    return stream


def head(stream: Tensor, norm: Tensor, norm_bias: Tensor | None, weight: Tensor, eps: float) -> Tensor | None:
    """Logits (B, V), bf16; None where this does not serve."""
    (n_rows, width), device = stream.shape, stream.get_device()
    if n_rows * width > FEW or n_rows > 16 or width % 256 or not _capable(stream):
        return None
    if not all(_fits(t) for t in (norm, norm_bias, weight)) or stream.dtype != torch.float32:
        return None
    with torch.cuda.device_of(stream):
        try:
            kernel = _head_kernel(width, len(weight), n_rows, norm_bias is not None, device)
        except nvrtc.Unavailable as error:
            return _give_up(device, error)
        stream, logits = stream.contiguous(), torch.empty(n_rows, len(weight), dtype=weight.dtype, device=stream.device)
        kernel(_pack_head(*_addresses(stream, norm, norm_bias, weight, logits), eps))
    return logits


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


class _Launch:
    """One kernel, with as many blocks as there is work for."""

    def __init__(self, file: str, name: str, device: int, units: int, warps: int, **macros: int):
        processors = nvrtc.processors(device)
        self.blocks, self.threads = min(units, processors), 32 * warps
        self.kernel = nvrtc.kernel(_source(file, BLOCKS=processors, WARPS=warps, **macros), name, device)

    def __call__(self, argument: bytes) -> None:
        self.kernel(self.blocks, self.threads, argument, early=True)


def _source(file: str, **macros: int) -> str:
    parts = [f"#define {name} {value}" for name, value in macros.items()]
    files = (_COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / f"{file}.cu")
    return "\n".join([*parts, *(path.read_text() for path in files)]) + "\n"


@lru_cache(64)
def _stack_kernels(M: int, E: int, R: int, W: int, n_rows: int, device: int) -> list[_Launch]:
    """begin, enter, project, scan, leave."""
    octets = -(-n_rows // 8)
    units = {
        "begin": n_rows, "enter": E // 16, "project": (R + 32) // 16 * octets, "scan": E // 16 * octets,
        "leave": M // 16 * -(-octets // 4),
    }  # fmt: skip
    sizes = {"M": M, "E": E, "R": R, "W": W, "ROWS": n_rows}
    return [_Launch("stack", name, device, n, STACK_WARPS, **sizes) for name, n in units.items()]


@lru_cache(64)
def _head_kernel(M: int, n_tokens: int, n_rows: int, centred: bool, device: int) -> _Launch:
    sizes = {"M": M, "VOCABULARY": n_tokens, "ROWS": n_rows, "CENTRED": int(centred)}
    return _Launch("head", "head", device, n_tokens, HEAD_WARPS, **sizes)
