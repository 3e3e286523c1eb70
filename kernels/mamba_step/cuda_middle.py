"""What lies between the projections of a Mamba block, of one token, as one CUDA kernel: cuda_kernels/middle.cu.

For many sequences or wide blocks, between two products of cuBLAS's, on GPUs with clusters of blocks (Hopper and later).

Letters: B sequences, E inner width, R rank of dt, N states, W convolution width.
"""

import struct
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..selective_scan import cuda as selective_scan

CLUSTER = 8  # blocks of a cluster
BESIDE = 4
_FOLDER = Path(__file__).parent / "cuda_kernels"
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_broken: set[int] = set()  # devices that NVRTC does not serve


def serves(x: Tensor, conv: Tensor, ssm: Tensor, w) -> bool:
    """Whether `step` takes these, x (B, M)."""
    (n_channels, n_states), rank, taps = w.A_log.shape, w.dt_proj.shape[1], w.conv.shape[1]
    of_a_block = n_channels // CLUSTER
    return (
        n_channels % CLUSTER == 0
        and of_a_block % (64 if of_a_block > 256 else 32) == 0
        and 3 * (rank + 32) * -(-of_a_block // 256) <= 2 * of_a_block
        and rank % 16 == 0
        and n_states == 16
        and taps > 1
        and _capable(x)
        and x.dtype == conv.dtype == torch.bfloat16
        and ssm.dtype == torch.float32
        and all(_fits(t) and (t is None or t.device == x.device) for t in w[3:10])
        and all(t.data_ptr() % 16 == 0 and t.device == x.device for t in (conv, ssm))
    )


def _capable(x: Tensor) -> bool:
    return nvrtc.EMULATED or (x.is_cuda and x.get_device() not in _broken and _capable_device(x.get_device()))


@cache
def _capable_device(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and nvrtc.loads()


def _fits(t: Tensor | None) -> bool:
    return t is None or (t.dtype == torch.bfloat16 and t.is_contiguous() and t.data_ptr() % 16 == 0)


def step(uz: Tensor, conv: Tensor, ssm: Tensor, w) -> Tensor | None:
    """uz (B, 2E) -> y (B, E), states in place; None where NVRTC fails."""
    device, y = uz.get_device(), uz.new_empty(len(uz), uz.shape[1] // 2)
    with torch.cuda.device_of(uz):
        try:
            run = of(len(uz), w, device)
        except nvrtc.Unavailable:
            _broken.add(device)
            return None
        run(uz, conv, ssm, w, y)
    return y


@lru_cache(64)
def _convolve(E: int, W: int, device: int):
    macros = [f"#define E {E}", f"#define W {W}"]
    files = (_COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / "convolve.cu")
    return nvrtc.kernel("\n".join([*macros, *(path.read_text() for path in files)]) + "\n", "convolve", device)


def serves_convolution(x: Tensor, conv: Tensor, w) -> bool:
    """Whether `convolve` takes these, x (B, M)."""
    n_channels, taps = w.conv.shape
    return (
        n_channels % 8 == 0
        and taps > 1
        and _capable(x)
        and x.dtype == conv.dtype == torch.bfloat16
        and all(_fits(t) and (t is None or t.device == x.device) for t in (w.conv, w.conv_bias))
        and conv.data_ptr() % 16 == 0
    )


def convolve(uz: Tensor, conv: Tensor, w) -> Tensor | None:
    """uz (B, 2E) -> u (B, E), the window in place; None where NVRTC fails."""
    device, (n_channels, taps) = uz.get_device(), w.conv.shape
    u = uz.new_empty(len(uz), n_channels)
    with torch.cuda.device_of(uz):
        try:
            kernel = _convolve(n_channels, taps, device)
        except nvrtc.Unavailable:
            _broken.add(device)
            return None
        tensors = w.conv, w.conv_bias, conv, uz, u
        argument = struct.pack("6q", *(0 if t is None else t.data_ptr() for t in tensors), len(uz))
        kernel(-(-len(uz) * (n_channels // 8) // 128), 128, argument, early=True)
    return u


@lru_cache(64)
def _scan(E: int, R: int, device: int):
    macros = [f"#define E {E}", f"#define R {R}"]
    files = (_COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / "scan.cu")
    return nvrtc.kernel("\n".join([*macros, *(path.read_text() for path in files)]) + "\n", "scan", device)


def serves_scan(x: Tensor, ssm: Tensor, w) -> bool:
    """Whether `scan` takes these, x (B, M)."""
    (n_channels, n_states), rank = w.A_log.shape, w.dt_proj.shape[1]
    return (
        n_channels % 128 == rank % 16 == 0
        and n_states == 16
        and _capable(x)
        and x.dtype == torch.bfloat16
        and ssm.dtype == torch.float32
        and all(_fits(t) and t.device == x.device for t in (w.dt_proj, w.dt_bias, w.A_log, w.D))
        and ssm.data_ptr() % 16 == 0
    )


def scan(u: Tensor, uz: Tensor, low: Tensor, ssm: Tensor, w) -> Tensor | None:
    """u (B, E), uz (B, 2E), low (B, R + 2N) -> y (B, E), the states in place; None where NVRTC fails."""
    device, (n_channels, rank), y = uz.get_device(), w.dt_proj.shape, torch.empty_like(u)
    with torch.cuda.device_of(uz):
        try:
            kernel = _scan(n_channels, rank, device)
        except nvrtc.Unavailable:
            _broken.add(device)
            return None
        tensors = w.dt_proj, w.dt_bias, w.A_log, w.D, ssm, u, uz, low, y
        argument = struct.pack("10q", *(t.data_ptr() for t in tensors), len(uz))
        kernel(n_channels // 128 * -(-len(uz) // 8), 256, argument, early=True)
    return y


class _Middle:
    """The kernel for clusters that have `at_once` sequences each."""

    def __init__(self, E: int, R: int, W: int, at_once: int, device: int):
        self.at_once, channels = at_once, E // CLUSTER
        self.threads = 2 * channels // -(-channels // 256)
        resident = 2 if self.threads <= 384 and at_once <= BESIDE else 1
        sizes = {"E": E, "R": R, "W": W, "CLUSTER": CLUSTER, "SEQS": at_once, "EARLY": 1, "RESIDENT": resident, "HELD_BESIDE": BESIDE}
        macros = [f"#define {name} {value}" for name, value in sizes.items()]
        files = (_COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / "middle.cu")
        source = "\n".join([*macros, *(path.read_text() for path in files)]) + "\n"
        self.kernel = nvrtc.kernel(source, "middle", device)
        self.clusters = 16 if nvrtc.EMULATED else self.kernel.clusters_at_once(self.threads, CLUSTER)

    def __call__(self, uz: Tensor, conv: Tensor, ssm: Tensor, w, y: Tensor) -> None:
        tensors = w.conv, w.conv_bias, w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D, conv, ssm, uz, y
        argument = struct.pack("12q", *(0 if t is None else t.data_ptr() for t in tensors), len(y))
        self.kernel(-(-len(y) // self.at_once) * CLUSTER, self.threads, argument, early=True)


@lru_cache(64)
def _middle(E: int, R: int, W: int, at_once: int, device: int) -> _Middle:
    return _Middle(E, R, W, at_once, device)


@lru_cache(64)
def _for(n_rows: int, E: int, R: int, W: int, device: int) -> _Middle:
    """With as many sequences a cluster as it takes for all to run at once, up to MOST."""
    at_once = min(-(-n_rows // 32), MOST)
    while True:
        run = _middle(E, R, W, at_once, device)
        wanted = min(-(-n_rows // run.clusters), MOST)
        if wanted <= at_once:
            return run
        at_once = wanted


MOST = 20


def of(n_rows: int, w, device: int) -> _Middle:
    return _for(n_rows, *w.dt_proj.shape, w.conv.shape[1], device)
