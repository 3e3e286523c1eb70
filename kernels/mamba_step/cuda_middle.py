"""What lies between the projections of a Mamba block, of one token, as one CUDA kernel: cuda_kernels/middle.cu.

For bf16 weights and GPUs that have clusters of blocks (Hopper and later).

Letters: B sequences, M model width, E inner width, R rank of dt, N states, W convolution width.
"""

import struct
from functools import lru_cache

from torch import Tensor

from .. import nvrtc
from .cuda_sources import PASS_UP_TO, addresses, between, between_fits, source

CLUSTER = 8  # blocks of a cluster, which have all channels of some sequences
WIDEST = 2048  # E: measured, benchmarks/results/gpu_model.md
MOST = 20  # sequences of a cluster


def serves(x: Tensor, conv: Tensor, ssm: Tensor, w) -> bool:
    """Whether this takes these, x (B, M)."""
    (n_channels, n_states), rank = w.A_log.shape, w.dt_proj.shape[1]
    return (
        len(x) > 0
        and n_channels <= WIDEST
        and n_channels % (32 * CLUSTER) == rank % 16 == 0
        and 2 * n_channels >= rank + 2 * n_states
        and between_fits(x, conv, ssm, w)
    )


def step(uz: Tensor, conv: Tensor, ssm: Tensor, w) -> Tensor | None:
    """`between` by these kernels."""
    return between(kernel_for, uz, conv, ssm, w)


class _Kernel:
    """For clusters that have `at_once` sequences each."""

    def __init__(self, E: int, R: int, W: int, at_once: int, passing: bool, device: int):
        self.at_once, self.threads = at_once, 2 * E // CLUSTER
        sizes = {"E": E, "R": R, "W": W, "CLUSTER": CLUSTER, "SEQS": at_once, "PASSING": int(passing)}
        self.kernel = nvrtc.kernel(source("convolution.cu", "middle.cu", **sizes), "middle", device)
        self.clusters = 16 if nvrtc.EMULATED else self.kernel.clusters_at_once(self.threads, CLUSTER)

    def __call__(self, uz: Tensor, conv: Tensor, ssm: Tensor, w, y: Tensor) -> None:
        tensors = w.conv, w.conv_bias, w.x_proj, w.dt_proj, w.dt_bias, w.A_log, w.D, conv, ssm, uz, y
        blocks = -(-len(y) // self.at_once) * CLUSTER
        self.kernel(blocks, self.threads, struct.pack("12q", *addresses(*tensors), len(y)), early=True)


def kernel_for(n_rows: int, w, device: int) -> _Kernel:
    """Raises nvrtc.Unavailable."""
    return _with_all_at_once(n_rows, *w.dt_proj.shape, w.conv.shape[1], device)


@lru_cache(64)
def _with_all_at_once(n_rows: int, E: int, R: int, W: int, device: int) -> _Kernel:
    """With as many sequences a cluster as it takes for all clusters to run at once, if that is not too many.

    How many clusters run at once is for the device to say: a GPU's processors stand in groups of unequal size.
    """
    most = min(MOST, 2 * E // (R + 32))  # a block adds up a value with each of its threads at most
    at_once = min(-(-n_rows // 16), most)
    while True:
        kernel = _kernel(E, R, W, at_once, n_rows <= PASS_UP_TO, device)
        wanted = min(-(-n_rows // kernel.clusters), most)
        if wanted <= at_once:
            return kernel
        at_once = wanted


@lru_cache(64)
def _kernel(E: int, R: int, W: int, at_once: int, passing: bool, device: int) -> _Kernel:
    return _Kernel(E, R, W, at_once, passing, device)
