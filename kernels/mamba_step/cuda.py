"""A step of a whole stack of Mamba blocks in CUDA C++: cuda_kernels/*.cu, compiled for its sizes by ../nvrtc.py.

Letters: B sequences, M model width, E inner width, R rank of dt, N states, W convolution width.
"""

import os
import struct
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..selective_scan import cuda as selective_scan

LAYERS = 32  # of a launch: its argument has 4,096 bytes
_FOLDER = Path(__file__).parent / "cuda_kernels"
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_pack = struct.Struct(f"{13 * LAYERS + 9}q3if").pack  # struct Problem of grid.cu
_broken: set[int] = set()  # devices that NVRTC does not serve

FEW = os.environ.get("ENG_FEW", "mega")
MANY = os.environ.get("ENG_MANY", "mega")
AHEAD = int(os.environ.get("ENG_AHEAD", "0"))
HEAD = os.environ.get("ENG_HEAD", "cuda")
FEW_WARPS = int(os.environ.get("ENG_WARPS", "16"))
MANY_WARPS = 8
HYBRID = int(os.environ.get("ENG_HYBRID", "1"))
SCAN_WARPS = int(os.environ.get("ENG_SCAN_WARPS", "12"))


def kind_of(n_rows: int, width: int, rank: int, centred: bool) -> str | None:
    """Whether a few or many sequences' kernels serve."""
    if n_rows * width <= 4096 and FEW != "triton":
        return "few"
    if MANY != "triton" and n_rows <= 64 and width <= 1024 and rank % 16 == 0 and not centred:
        return "many"
    return None


def serves(x: Tensor, states, weights, centred: bool) -> bool:
    w = weights[0]
    (n_channels, n_states), rank, width = w.A_log.shape, w.dt_proj.shape[1], x.shape[1]
    device, shapes = x.get_device(), (w.in_proj.shape, w.x_proj.shape, w.conv.shape)
    return (
        (x.is_cuda or nvrtc.EMULATED)
        and x.dtype == torch.bfloat16
        and n_states == 16
        and width % 256 == n_channels % 256 == rank % 8 == 0
        and w.conv.shape[1] > 1
        and kind_of(len(x), width, rank, centred) is not None
        and device not in _broken
        and _capable(device)
        and all(
            a is None or (a.dtype == torch.bfloat16 and a.is_contiguous() and a.data_ptr() % 16 == 0)
            for one in weights
            for a in one
        )
        and all((a.in_proj.shape, a.x_proj.shape, a.conv.shape) == shapes for a in weights)
        and all(c.dtype == torch.bfloat16 and s.dtype == torch.float32 for c, s in states)
        and all(c.is_contiguous() and s.is_contiguous() for c, s in states)
    )


@cache
def _capable(device: int) -> bool:
    return nvrtc.EMULATED or (torch.cuda.get_device_capability(device) >= (9, 0) and nvrtc.loads())


@cache
def source(kind: str, macros: tuple[tuple[str, int], ...]) -> str:
    parts = [f"#define {name} {value}" for name, value in macros]
    files = (_COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / "grid.cu")
    return "\n".join([*parts, *(path.read_text() for path in (*files, _FOLDER / f"{kind}.cu"))]) + "\n"


def macros_of(kind: str, shape: tuple[int, int, int, int], n_rows: int, centred: bool, blocks: int, only: int = -1, n_out: int = 0, warps: int = 0):
    M, E, R, W = shape
    warps = warps or (FEW_WARPS if kind == "few" else MANY_WARPS)
    sizes = {"M": M, "E": E, "R": R, "W": W, "ROWS": n_rows, "CENTRED": int(centred)}
    return tuple((sizes | {"BLOCKS": blocks, "WARPS": warps, "LAYERS": LAYERS, "AHEAD": AHEAD, "ONLY": only, "VOCABULARY": n_out}).items())


def step(x: Tensor, states, weights, eps: float, centred: bool) -> Tensor | None:
    """The stream (B, M), float32, after all blocks; None where NVRTC does not serve after all."""
    device = x.get_device()
    try:
        with torch.cuda.device_of(x):
            return _step(x.contiguous(), states, weights, eps, centred, device)
    except nvrtc.Unavailable as error:
        _broken.add(device)
        warnings.warn(f"a step of Mamba blocks runs in Triton, which is slower: {error}", RuntimeWarning, stacklevel=2)
        return None


def _step(x, states, weights, eps, centred, device) -> Tensor:
    w, (n_rows, width) = weights[0], x.shape
    (n_channels, n_states), rank = w.A_log.shape, w.dt_proj.shape[1]
    kind = kind_of(n_rows, width, rank, centred)
    assert kind is not None
    blocks = nvrtc.processors(device)
    together = (FEW if kind == "few" else MANY) == "mega" and not nvrtc.EMULATED
    separate = not together and not nvrtc.EMULATED
    shape = (width, n_channels, rank, w.conv.shape[1])

    def kernel_of(phase: int):
        only = -1 if not separate else phase % 4 if kind == "few" else 4 if phase == 0 else (phase - 1) % 4
        return nvrtc.kernel(source(kind, macros_of(kind, shape, n_rows, centred, blocks, only)), "stack", device)

    threads = 32 * (FEW_WARPS if kind == "few" else MANY_WARPS)
    inner = torch.float32 if kind == "few" else torch.bfloat16

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    stream, uz, low = room(n_rows, width), room(n_rows, 2 * n_channels, dtype=inner), room(n_rows, rank + 2 * n_states)
    y = room(n_rows, n_channels, dtype=inner)
    scaled, squares = room(n_rows, width, dtype=torch.bfloat16), room(width // 16, n_rows)
    n_launches = -(-len(weights) // LAYERS)
    arrivals = torch.zeros(n_launches, dtype=torch.int32, device=x.device) if together else None
    for launch in range(n_launches):
        at = launch * LAYERS
        some = list(zip(weights[at : at + LAYERS], states[at : at + LAYERS], strict=True))
        behind = weights[at + LAYERS].norm if at + LAYERS < len(weights) else None
        pointers = [0 if t is None else t.data_ptr() for one, state in some for t in (*one, *state)]
        pointers += [0] * (13 * LAYERS - len(pointers))
        pointers += [
            0 if t is None else t.data_ptr()
            for t in (x if launch == 0 else None, behind, stream, uz, low, y, scaled, squares)
        ]
        pointers.append(0 if arrivals is None else arrivals[launch:].data_ptr())
        first, last = (0, 4 * len(some)) if kind == "few" else (int(launch > 0), 4 * len(some) + 1)
        for phase in [first] if together else range(first, last):
            argument = _pack(*pointers, phase, last if together else phase + 1, len(some), eps)
            if nvrtc.EMULATED:
                kernel_of(phase)(blocks, threads, argument)
            else:
                kernel_of(phase)(blocks, threads, argument, early=True)
    return stream


def head(stream: Tensor, norm: Tensor, norm_bias: Tensor | None, weight: Tensor, eps: float) -> Tensor | None:
    """bf16 logits (B, V)."""
    (n_rows, width), device = stream.shape, stream.get_device()
    tensors = [norm, weight] if norm_bias is None else [norm, norm_bias, weight]
    if (
        HEAD != "cuda"
        or not (stream.is_cuda or nvrtc.EMULATED)
        or n_rows * width > 4096
        or width % 256
        or device in _broken
        or not _capable(device)
        or any(t.dtype != torch.bfloat16 or not t.is_contiguous() or t.data_ptr() % 16 for t in tensors)
    ):
        return None
    logits = torch.empty(n_rows, len(weight), dtype=weight.dtype, device=stream.device)
    blocks = nvrtc.processors(device)
    macros = macros_of("few", (width, width, 16, 4), n_rows, norm_bias is not None, blocks, 4, len(weight))
    pointers = [norm.data_ptr(), 0 if norm_bias is None else norm_bias.data_ptr(), weight.data_ptr()]
    pointers += [0] * (13 * LAYERS + 2 - len(pointers)) + [stream.data_ptr(), logits.data_ptr(), 0, 0, 0, 0, 0]
    with torch.cuda.device_of(stream):
        kernel = nvrtc.kernel(source("few", macros), "stack", device)
        if nvrtc.EMULATED:
            kernel(blocks, 32 * FEW_WARPS, _pack(*pointers, 0, 1, 1, eps))
        else:
            kernel(blocks, 32 * FEW_WARPS, _pack(*pointers, 0, 1, 1, eps), early=True)
    return logits


def project_and_scan(uz: Tensor, w, ssm_state: Tensor) -> Tensor | None:
    """From the convolution to out_proj for many sequences: uz (B, 2E), u convolved already -> y (B, E)."""
    (n_rows, _), device = uz.shape, uz.get_device()
    (n_channels, n_states), rank = w.A_log.shape, w.dt_proj.shape[1]
    tensors = (w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D)
    if (
        not HYBRID
        or not (uz.is_cuda or nvrtc.EMULATED)
        or n_states != 16
        or rank % 16
        or n_channels % 256
        or device in _broken
        or not _capable(device)
        or any(t.dtype != torch.bfloat16 or not t.is_contiguous() or t.data_ptr() % 16 for t in tensors)
    ):
        return None
    low = torch.empty(n_rows, rank + 2 * n_states, device=uz.device)
    y = torch.empty(n_rows, n_channels, dtype=uz.dtype, device=uz.device)
    blocks = nvrtc.processors(device)
    none = (0,) * 5
    layer = (*none, w.x_proj.data_ptr(), w.dt_proj.data_ptr(), w.dt_bias.data_ptr(), w.A_log.data_ptr())
    pointers = [*layer, w.D.data_ptr(), 0, 0, ssm_state.data_ptr(), *[0] * (13 * (LAYERS - 1))]
    pointers += [0, 0, 0, uz.data_ptr(), low.data_ptr(), y.data_ptr(), 0, 0, 0]
    with torch.cuda.device_of(uz):
        for part in (1, 2):
            warps = MANY_WARPS if part == 1 else SCAN_WARPS
            macros = macros_of("many", (256, n_channels, rank, 4), n_rows, False, blocks, part, warps=warps)
            kernel = nvrtc.kernel(source("many", macros), "stack", device)
            argument = _pack(*pointers, part + 1, part + 2, 1, 0.0)
            if nvrtc.EMULATED:
                kernel(blocks, 32 * warps, argument)
            else:
                kernel(blocks, 32 * warps, argument, early=True)
    return y
