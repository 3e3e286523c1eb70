"""How the selective scan in CUDA C++ is laid out: from the shape of a call to lanes, warps and blocks.

What follows from the number of sequences changes no bit of a result. All figures are measured
(benchmarks/SCAN_NOTES.md).
"""

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """All of a call that a plan follows from. Types and strides: of u, delta, z, dy, B, C; 0 for what is absent."""

    device: int
    n_tokens: int
    n_channels: int
    n_states: int
    n_seqs: int
    batch: int
    packed: bool
    groups: int
    vector: int  # channels that are moved at once, at least
    matrix_vector: int  # elements of B and C that are
    static: tuple[bool, bool]  # whether B and C are
    types: tuple[torch.dtype, ...]
    strides: tuple[int, ...]  # from token to token, in bytes
    y_stride: int  # of y, likewise, and of u's gradient
    ddelta_stride: int  # of delta's gradient
    dz_stride: int  # of z's
    group_strides: tuple[int, int]  # of B and C, in elements
    softplus: bool
    reverse: bool
    gate: bool


MOST_PAIRS = 6  # of a block: 96 KiB of shared memory
_MOST_WALKING = 10  # warps of a block of chunk_gradients


class Tile(NamedTuple):
    """How a warp's work is laid out: the macros of cuda_kernels/common.cu."""

    NL: int  # states of a lane
    S: int  # lanes of a channel
    CL: int  # channels of a lane
    T: int  # steps of a tile
    V: int  # channels of a lane where rows are shared out
    WARPS: int  # of a block
    MIN_BLOCKS: int = 1  # that a multiprocessor is to have room for
    TEAM: int = 1  # warps that share the states of the same channels
    AT_ONCE: int = 2  # steps whose states the forward computes together

    @property
    def channels(self) -> int:
        """Of a block."""
        return 32 // self.S * self.CL * (self.WARPS // self.TEAM)


# Of the forward for 9 to 16 states where rows are many: the one in which four channels are moved at once.
MANY_ROWS = Tile(NL=4, S=4, CL=2, T=16, V=2, WARPS=4, MIN_BLOCKS=4)


def lanes_of(n_states: int) -> tuple[int, int]:
    """(states of a lane, lanes of a channel). It fixes the order of sums over states: by the number of states alone."""
    if n_states == 1:
        return 1, 1
    if n_states <= 32:
        return 4, 1 if n_states <= 4 else 2 if n_states <= 8 else 4 if n_states <= 16 else 8
    return 8, 8


def forward_tile(n_states: int, rows: int, vector: int, processors: int) -> Tile:
    """rows: sequences (or chunks) times channels. What follows from them changes no bit of a result.

    Two channels to a lane read B and C half as often as one. One makes more warps where rows are few; and below 9
    states, where a lane moves more of a row, it is what registers hold. They are kept to 128 where there are warps
    enough to use the room. Measured: benchmarks/SCAN_NOTES.md.
    """
    states, lanes = lanes_of(n_states)
    if states == 1:
        return _narrow(vector, 4 if rows >= 1024 * processors else 2)
    if states == 8:
        return _fitting(states, lanes, 4, 8, vector, 1)._replace(MIN_BLOCKS=8)
    if rows * lanes < 256 * processors:
        return _fitting(states, lanes, 1, 16, vector, 2)
    return _fitting(states, lanes, 1 if lanes < 4 else 2, 16, vector, 4)._replace(MIN_BLOCKS=4)


def pairs_tile(layout: Layout, runs: int, processors: int) -> Tile:
    """Of the forward in pairs of warps (forward_pairs.cu). runs: sequences or chunks.

    Where rows are few, a lane has one channel, and a block many pairs: the more it has, the longer are the pieces of
    memory that it moves.
    """
    states, lanes = lanes_of(layout.n_states)
    if runs * layout.n_channels * lanes >= 256 * processors:
        return _fitting(states, lanes, 2, 16, layout.vector, 4)._replace(MIN_BLOCKS=2)
    pairs = _most_even(layout, runs, 32 // lanes, processors, MOST_PAIRS)
    return _fitting(states, lanes, 1, 32, layout.vector, pairs)._replace(MIN_BLOCKS=8 // pairs)


def _most_even(layout: Layout, runs: int, channels: int, processors: int, most: int) -> int:
    """Of warps, or pairs of them, with so many channels each: up to `most` of a block, as many as leave the fullest
    multiprocessor with the fewest."""

    def fullest(of_block: int) -> int:
        blocks = runs * layout.groups * -(-layout.n_channels // layout.groups // (channels * of_block))
        return -(-blocks // processors) * of_block

    return min(range(most, 0, -1), key=fullest)


def backward_tile(n_states: int, rows: int, vector: int, processors: int, room: int, gate: bool) -> Tile:
    """room: bytes of shared memory that a block may have.

    Channels of a lane and of a block fix the order in which dB and dC are summed: they do not follow from `rows`.
    """
    states, lanes = lanes_of(n_states)
    if states == 1:
        return _narrow(vector, 3 if rows >= 1024 * processors and not gate else 2)
    if states == 8:  # 16 states in each of the four warps of a block, as if there were no more
        return Tile(4, 4, 2, 8, 1, 4, TEAM=4)
    # Of 4 warps blocks take up to 113 KiB; with 2 lanes to a channel, too much for two to fit. With 1 they are slower.
    warps = 4 if lanes >= 4 and room >= 113 * 1024 else 2
    return _fitting(states, lanes, 1 if lanes == 1 else 2, 8, vector, warps)


def parts_tile(layout: Layout, tile: Tile) -> Tile:
    """Of chunk_gradients where it runs parts of chunks from 0. With one channel to a lane there are more warps.

    tile: the backward's.
    """
    states, lanes = lanes_of(layout.n_states)
    if states != 4:
        return _fitting(states, lanes, tile.CL, 16, layout.vector, tile.WARPS)
    return _fitting(states, lanes, 1, 32, layout.vector, tile.WARPS)._replace(MIN_BLOCKS=16 // tile.WARPS)


def walking_tile(layout: Layout, runs: int, processors: int) -> Tile:
    """Of chunk_gradients where it walks chunks step by step, so by as many warps as can be: half as many states to a
    lane as in the backward. runs: chunks."""
    states, lanes = lanes_of(layout.n_states)
    warps = _most_even(layout, runs, 16 // lanes, processors, _MOST_WALKING)
    return _fitting(states // 2, 2 * lanes, 1, 32, layout.vector, warps)


def _narrow(vector: int, blocks: int) -> Tile:
    """For one state: cuda_kernels/narrow_*.cu, whose warps share out time."""
    return Tile(1, 1, vector, 8, vector, 1, MIN_BLOCKS=blocks)


def _fitting(states: int, lanes: int, channels: int, steps: int, vector: int, warps: int) -> Tile:
    """A tile whose rows a warp can share out: at most 32 lanes to a row, and at most `steps` rows at once."""
    channels = min(channels, vector * lanes)
    while vector > 1 and channels * steps < lanes * vector:
        vector //= 2
    while channels * steps < lanes:
        channels *= 2
    return Tile(states, lanes, channels, steps, vector, warps)


def in_pairs(layout: Layout) -> bool:
    """Whether pairs of warps may run it: as many states as have been measured (benchmarks/SCAN_NOTES.md)."""
    return 8 < layout.n_states <= 16


def moves_by_four(layout: Layout) -> bool:
    """Whether its forward may move four channels of a row at once, where addresses allow it."""
    return lanes_of(layout.n_states) == MANY_ROWS[:2] and layout.n_channels // layout.groups % 4 == 0


def run_tile(layout: Layout, runs: int, walked: bool, processors: int, by_four: bool = False) -> tuple[Tile, bool]:
    """(The forward's tile, whether pairs of warps run it). runs: sequences or chunks; walked: chunk after chunk.

    by_four: whether four channels of a row may be moved at once.
    """
    rows = runs * layout.n_channels
    if in_pairs(layout) and (walked or rows < 64 * processors):
        return pairs_tile(layout, runs, processors), True
    tile = forward_tile(layout.n_states, rows, layout.vector, processors)
    if by_four and tile == MANY_ROWS:
        tile = tile._replace(V=4)
    return tile, False
