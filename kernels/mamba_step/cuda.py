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

FEWEST, MOST, WIDEST = 3, 64, 1024  # sequences, and M, that `step` serves: measured, benchmarks/results/gpu_model.md
WARPS = 8  # of a block of threads
MIDDLE, EARLY, RESIDENT, MIDDLE_RESIDENT, BESIDE, ENTER_RESIDENT, LEAVE_RESIDENT = 1, 1, 1, 2, 4, 2, 3  # variants
CLUSTER, CLUSTERS = 8, 16  # blocks of a cluster of `middle`; clusters that run at once
_FOLDER = Path(__file__).parent / "cuda_kernels"
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_pack = struct.Struct("19qdq").pack  # struct Problem of stack.cu
_pack_outer = struct.Struct("12qdq").pack
FILE, FLIGHT, ENTER_BANDS, PER_PROCESSOR = "stack.cu", 20, 2, 1
_broken: set[int] = set()  # devices that NVRTC does not serve


def serves(x: Tensor, states: Sequence[tuple[Tensor, Tensor]], weights: Sequence, centred: bool) -> bool:
    """Whether `step` takes these."""
    w, (n_rows, width) = weights[0], x.shape
    (n_channels, n_states), rank, taps = w.A_log.shape, w.dt_proj.shape[1], w.conv.shape[1]
    shapes = w.in_proj.shape, w.x_proj.shape, w.conv.shape
    return (
        FEWEST <= n_rows <= MOST
        and width <= WIDEST
        and (not centred or n_rows <= 6)
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
            kernels = _kernels(width, n_channels, rank, w.conv.shape[1], octets, device, int(centred))
        except nvrtc.Unavailable as error:
            return _give_up(device, error)

        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=x.device)

        x, stream = x.contiguous(), room(n_rows, width)
        written = [stream, room(n_rows, width, dtype=x.dtype), room(width // 16, 8 * octets)]
        squares_and_sums = written[2], room(width // 16, 8 * octets)
        written += [room(n_rows, 2 * n_channels, dtype=x.dtype), room(n_rows, w.x_proj.shape[0])]
        written += [room(n_rows, n_channels, dtype=x.dtype)]
        begin, *of_a_block = kernels
        between = middle_of(written[3], written[5], weights[0], device) if MIDDLE else None
        for i, (one, state) in enumerate(zip(weights, states, strict=True)):
            behind = weights[i + 1].norm if i + 1 < len(weights) else None
            if FILE == "stack.cu":
                stream, scaled, squares, uz, _, y = written
                sums = squares if not centred else squares_and_sums[1]
                outer = stream, scaled, squares, uz, y, *((one.norm, one.norm_bias, sums) if centred else (None,) * 3)
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
            if between is None:
                for kernel in of_a_block:
                    kernel(argument)
            else:
                of_a_block[0](argument)
                between(written[3], *state, one, written[5])
                of_a_block[3](argument)
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
        processors *= PER_PROCESSOR if name == "enter" else 1
        self.blocks = -(-units // -(-units // processors))
        self.kernel = nvrtc.kernel(_source(FILE, **sizes, BLOCKS=self.blocks, WARPS=WARPS, CONV=int(not MIDDLE), EARLY=EARLY, RESIDENT=RESIDENT, ENTER_RESIDENT=ENTER_RESIDENT, LEAVE_RESIDENT=LEAVE_RESIDENT), name, device)

    def __call__(self, argument: bytes) -> None:
        self.kernel(self.blocks, 32 * WARPS, argument, early=True)


class _Middle:
    """What lies between the projections, for so many sequences."""

    def __init__(self, E: int, R: int, W: int, at_once: int, device: int):
        self.at_once, channels = at_once, E // CLUSTER
        self.threads = 2 * channels // -(-channels // 256)
        resident = MIDDLE_RESIDENT if self.threads <= 384 and at_once <= 4 else 1
        sizes = {"E": E, "R": R, "W": W, "CLUSTER": CLUSTER, "SEQS": at_once, "EARLY": EARLY, "RESIDENT": resident, "HELD_BESIDE": BESIDE}
        self.kernel = nvrtc.kernel(_source("middle.cu", **sizes), "middle", device)
        if CLUSTER > 8:
            nvrtc._driver().cuFuncSetAttribute(self.kernel._function, 14, 1)

    def __call__(self, uz: Tensor, conv: Tensor, ssm: Tensor, w, y: Tensor) -> None:
        tensors = w.conv, w.conv_bias, w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D, conv, ssm, uz, y
        argument = struct.pack("12q", *_addresses(*tensors), len(y))
        self.kernel(-(-len(y) // self.at_once) * CLUSTER, self.threads, argument, early=True)


@lru_cache(64)
def _middle(E: int, R: int, W: int, at_once: int, device: int) -> _Middle:
    return _Middle(E, R, W, at_once, device)


def middle_of(uz: Tensor, y: Tensor, w, device: int) -> _Middle:
    at_once = next(n for n in (1, 2, 4, 8, 16) if n * CLUSTERS >= len(y) or n == 16)
    return _middle(y.shape[1], w.dt_proj.shape[1], w.conv.shape[1], at_once, device)


def serves_middle(x: Tensor, conv: Tensor, ssm: Tensor, w) -> bool:
    """Whether `middle` takes these, x (B, M)."""
    (n_channels, n_states), rank, taps = w.A_log.shape, w.dt_proj.shape[1], w.conv.shape[1]
    of_a_block = n_channels // CLUSTER
    return (
        n_channels % CLUSTER == 0
        and of_a_block % (64 if of_a_block > 256 else 32) == 0
        and 2 * (rank + 32) * -(-of_a_block // 256) <= 2 * of_a_block <= 1024
        and rank % 16 == 0
        and n_states == 16
        and taps > 1
        and _capable(x)
        and x.dtype == conv.dtype == torch.bfloat16
        and ssm.dtype == torch.float32
        and all(_fits(t) and (t is None or t.device == x.device) for t in w[3:10])
        and all(t.data_ptr() % 16 == 0 and t.device == x.device for t in (conv, ssm))
    )


def middle(uz: Tensor, conv: Tensor, ssm: Tensor, w) -> Tensor | None:
    """uz (B, 2E) -> y (B, E), what lies between the projections, states in place; None where NVRTC fails."""
    device, y = uz.get_device(), uz.new_empty(len(uz), uz.shape[1] // 2)
    with torch.cuda.device_of(uz):
        try:
            run = middle_of(uz, y, w, device)
        except nvrtc.Unavailable as error:
            return _give_up(device, error)
        run(uz, conv, ssm, w, y)
    return y


RING = 5
PRODUCT_EARLY = 1


def _width_of_block(M: int) -> int:
    return next((M // n for n in (1, 2, 4) if M % (256 * n) == 0 and M // n <= 1024), 0)


def _product_blocks(M: int, device: int) -> int:
    processors = nvrtc.processors(device)
    if _width_of_block(M) == M:
        return processors
    return processors - processors % (16 if processors >= 16 else 4)


@lru_cache(64)
def _product(M: int, octets: int, device: int):
    cluster = M // _width_of_block(M)
    ring = RING if cluster == 1 and M <= 768 else 4
    sizes = {"M": M, "OCTETS": octets, "BLOCKS": _product_blocks(M, device), "WARPS": WARPS, "RING": ring, "EARLY": PRODUCT_EARLY, "CLUSTER": cluster}
    return nvrtc.kernel(_source("product.cu", **sizes), "product", device)


def product(x: Tensor, weight: Tensor) -> Tensor | None:
    """x (B, K) weight (V, K)' of few rows by a matrix that is read once; None where this does not serve."""
    n_out, width = weight.shape
    if not (len(x) <= MOST and _width_of_block(width) and n_out % 4 == 0 and _capable(x)):
        return None
    if not (_fits(weight) and x.dtype == torch.bfloat16):
        return None
    device, x, out = x.get_device(), x.contiguous(), x.new_empty(len(x), n_out)
    with torch.cuda.device_of(x):
        try:
            kernel = _product(width, -(-len(x) // 8), device)
        except nvrtc.Unavailable as error:
            return _give_up(device, error)
        blocks = _product_blocks(width, device)
        kernel(blocks, 32 * WARPS, struct.pack("5q", *_addresses(weight, x, out), len(x), n_out), early=True)
    return out


def _source(file: str, **macros: int) -> str:
    parts = [f"#define {name} {value}" for name, value in macros.items()]
    files = (_COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / file)
    return "\n".join([*parts, *(path.read_text() for path in files)]) + "\n"


@lru_cache(64)
def _kernels(M: int, E: int, R: int, W: int, octets: int, device: int, centred: int = 0) -> list[_Kernel]:
    """begin, enter, project, scan, leave."""
    units = {
        "begin": 8 * octets, "enter": E // (8 * ENTER_BANDS if FILE == "stack.cu" else 16), "project": (R + 32) // 16 * octets, "scan": E // 16 * octets,
        "leave": M // 16 * -(-octets // 4),
    }  # fmt: skip
    sizes = {"M": M, "E": E, "R": R, "W": W, "OCTETS": octets, "FLIGHT": FLIGHT, "ENTER_BANDS": ENTER_BANDS, "CENTRED": centred}
    if FILE == "stack.cu":
        units = {name: units[name] for name in ("begin", "enter", "leave")}
    return [_Kernel(name, device, n, sizes) for name, n in units.items()]
