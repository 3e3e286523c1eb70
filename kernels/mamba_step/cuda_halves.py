"""What lies between the projections of a Mamba block, of one token, as two CUDA kernels: project.cu and scan.cu.

For wide blocks, whose weights are too much for each cluster of cuda_middle.py to read. Convolution and x_proj are
shared out by channels and sequences; the states come while they run, and where a journal is open (journal.py) those of
many sequences do not go back with each token. For bf16 weights and GPUs that have clusters of blocks and bulk copies
(Hopper and later).

Letters: B sequences, M model width, E inner width, R rank of dt, N states, W convolution width.
"""

import struct
from functools import lru_cache

import torch
from torch import Tensor

from .. import nvrtc
from . import cuda_middle, journal
from .cuda_sources import addresses, between, between_fits, has_room, source

CHANNELS = 256  # of a block of `scan`
# Of a block of `project` for up to so many sequences, if it takes no more than two a processor; else CHANNELS. Alike
# for all numbers of sequences up to there: so x_proj's sums are parted alike, and have the same bits.
FEWER_CHANNELS, UP_TO = 128, 64
CLUSTERS = 4, 2, 1  # blocks of a cluster of `project`, whose sums are added up: the most that E allows
MOST = 32  # sequences of a block
# Sequences whose states are on their way, fewer where they do not go back, and those that are asked for at once:
# measured. dt_proj's rows, up to 160 wide, come to slots that are not among these.
SLOTS, SLOTS_OF_KEPT, EARLY = 8, 6, 2
FEWEST_IN_JOURNAL = 16  # sequences from which a journal is used: measured


def serves(x: Tensor, conv: Tensor, ssm: Tensor, w) -> bool:
    """Whether this takes these, x (B, M)."""
    n_channels, rank = w.dt_proj.shape
    return (
        len(x) > 0
        and n_channels > cuda_middle.WIDEST
        and n_channels % CHANNELS == rank % 16 == 0
        and rank <= 160  # of which scan.cu has the weights in registers
        and between_fits(x, conv, ssm, w)
        and has_room(x)
    )


def step(uz: Tensor, conv: Tensor, ssm: Tensor, w) -> Tensor | None:
    """`between` by these kernels."""
    return between(kernel_for, uz, conv, ssm, w)


class _Kernels:
    """Both, for so many sequences."""

    def __init__(self, n_rows: int, E: int, R: int, W: int, device: int):
        self.project = _Project(n_rows, E, R, W, device)
        self.scan = _Scan(n_rows, E, R, self.project, device)

    def __call__(self, uz: Tensor, conv: Tensor, ssm: Tensor, w, y: Tensor) -> None:
        n_rows, u = len(uz), torch.empty_like(y)
        rank = w.dt_proj.shape[1]
        projected = torch.empty(self.project.splits, n_rows, rank + 32, dtype=torch.float32, device=uz.device)
        self.project(w.conv, w.conv_bias, w.x_proj, conv, uz, u, projected, n_rows=n_rows)
        page = journal.page_of(ssm) if n_rows >= FEWEST_IN_JOURNAL else None
        self.scan(projected, w.dt_proj, w.dt_bias, w.A_log, w.D, u, uz, ssm, y, page=page, n_rows=n_rows)


class _Project:
    def __init__(self, n_rows: int, E: int, R: int, W: int, device: int):
        processors = nvrtc.processors(device)
        two_each = n_rows <= UP_TO and 2 * processors >= E // FEWER_CHANNELS * (UP_TO // 16)
        channels = FEWER_CHANNELS if two_each else CHANNELS
        groups = E // channels
        seqs = 8 if two_each and groups * -(-n_rows // 8) <= processors else 16
        cluster = next(n for n in CLUSTERS if groups % n == 0)
        self.blocks, self.threads, self.splits = groups * -(-n_rows // seqs), 2 * (R + 32), groups // cluster
        sizes = {"E": E, "R": R, "W": W, "CHANNELS": channels, "CLUSTER": cluster, "SEQS": seqs}
        self.kernel = nvrtc.kernel(source("convolution.cu", "project.cu", **sizes), "project", device)
        # Processors on which none of its blocks stands, as far as it is known.
        self.left = processors - -(-self.blocks // 2) if two_each else 0

    def __call__(self, *tensors: Tensor | None, n_rows: int) -> None:
        self.kernel(self.blocks, self.threads, struct.pack("8q", *addresses(*tensors), n_rows), early=True)


class _Scan:
    def __init__(self, n_rows: int, E: int, R: int, project: _Project, device: int):
        groups, splits, self.left = E // CHANNELS, project.splits, project.left
        self.seqs = min(MOST, -(-n_rows // max(1, nvrtc.processors(device) // groups)))
        self.blocks, room = groups * -(-n_rows // self.seqs), -(-self.seqs // 8) * 8
        rounds = -(-self.seqs * (R + 32) // (4 * CHANNELS))
        self.sizes = {"E": E, "R": R, "SPLITS": splits, "SEQS": room, "ROUNDS": rounds, "WARPS": CHANNELS // 32}
        self.device, self.kernels = device, {}
        self.kernel_of(0, False)  # raises where there is none

    def kernel_of(self, held: int, kept: bool) -> nvrtc.Kernel:
        """That of a page of a journal."""
        if (held, kept) not in self.kernels:
            slots = max(SLOTS_OF_KEPT if kept else SLOTS, EARLY + -(-self.sizes["R"] // 32))
            more = {"SLOTS": slots, "EARLY": EARLY, "HELD": held, "KEPT": int(kept)}
            more |= {"ENTRIES": journal.Journal.PERIOD - 1, "ENTRY": journal.Journal.ENTRY}
            self.kernels[held, kept] = nvrtc.kernel(source("scan.cu", **self.sizes, **more), "scan", self.device)
        return self.kernels[held, kept]

    def __call__(self, *tensors: Tensor, page: journal.Page | None, n_rows: int) -> None:
        held, kept, *of_journal = page or (0, False, None, None)
        argument = struct.pack("14q", *addresses(*tensors, *of_journal), n_rows, self.seqs, self.left)
        self.kernel_of(held, kept)(self.blocks, CHANNELS, argument, early=True)


def kernel_for(n_rows: int, w, device: int) -> _Kernels:
    """Raises nvrtc.Unavailable."""
    return _kernels(n_rows, *w.dt_proj.shape, w.conv.shape[1], device)


_kernels = lru_cache(64)(_Kernels)
