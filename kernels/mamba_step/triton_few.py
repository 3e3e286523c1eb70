"""A Mamba block's step in Triton for a few sequences: each product of a matrix with a few vectors, row by row.

Such a step is a chain of four small kernels, each bound by how fast its weights come. So a program asks for its tile of
them before it waits for the kernel that makes its vectors (programmatic dependent launch: Hopper GPUs and later). The
first of the four lets the next begin only when its own wait is over, the others at once: so that from the first to the
next block's first there is work for the memory as long as there is room for programs.

Letters: B sequences, M model width, E inner width, R rank of dt, N states, W convolution width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..triton_runtime import LOG2E, ceil_div, early_launch, load_float, sigmoid, softplus

# All of this is measured, on an H100 (benchmarks/results/gpu_model.md, "One sequence in pieces").
ELEMENTS, LANE = 4096, 64  # numbers that a program, and a lane of it, has of a matrix at most, unless `_tile` says more
PROGRAMS = 264  # that a product is cut into at least: two for each multiprocessor
CHANNELS = 8  # of a program of the scan
# A width that is a multiple of it is taken in pieces, of the largest power of two that divides it: no lane is idle.
SMALLEST = 256


@triton.jit
def after_the_kernel_before(EARLY: tl.constexpr):
    """Wait for the end of the kernel before; then let the next one begin.

    What is read before a kernel's wait has to be written by one that stands before the last kernel in front of it that
    has come through here: the end of all those is what this has seen.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _pieces(x, at, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """The vector x[at : at + WIDTH] in float32, in pieces; zeros where x is absent."""
    k, pieces = tl.arange(0, PIECE), ()
    for i in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        pieces += (load_float(x, at + i * PIECE + k, i * PIECE + k < WIDTH),)
    return pieces


@triton.jit
def _rows(weight, o, in_o, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """Rows o of a matrix, in pieces of its width."""
    k, pieces = tl.arange(0, PIECE), ()
    for i in tl.static_range((WIDTH + PIECE - 1) // PIECE):
        inside = in_o[:, None] & (i * PIECE + k < WIDTH)[None, :]
        pieces += (tl.load(weight + o[:, None] * WIDTH + (i * PIECE + k)[None, :], mask=inside, other=0.0),)
    return pieces


@triton.jit
def _products(rows, x):
    """The products of rows with a vector, both in pieces: added up over pieces, and then once over lanes."""
    total = rows[0].to(tl.float32) * x[0][None, :]
    for i in tl.static_range(1, len(rows)):
        total += rows[i].to(tl.float32) * x[i][None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _enter(
    x, stream, norm, norm_bias, weight, conv_state, conv, conv_bias, new_stream, uz, eps, n_rows,
    M: tl.constexpr, E: tl.constexpr, W: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    CENTRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Residual add, norm, in_proj and convolution: uz (B, 2E). Each program norms the rows again."""
    e, m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PIECE)
    in_e, is_u = e < 2 * E, e < E
    tile = _rows(weight, e, in_e, M, PIECE)
    factors, shifts = _pieces(norm, 0, M, PIECE), _pieces(norm_bias, 0, M, PIECE)
    shift = load_float(conv_bias, e, is_u)
    taps = ()
    for k in tl.static_range(W):
        taps += (load_float(conv, e * W + k, is_u),)
    after_the_kernel_before(EARLY)
    for b in range(n_rows):
        state_at = (b * E + e.to(tl.int64)) * (W - 1)
        window = ()
        for k in tl.static_range(W - 1):
            window += (load_float(conv_state, state_at + k, is_u),)
        added, old = _pieces(x, b * M, M, PIECE), _pieces(stream, b * M, M, PIECE)
        row, total = (), tl.zeros((PIECE,), tl.float32)
        for i in tl.static_range(len(added)):
            piece = added[i] + old[i]
            if stream is not None:
                if tl.program_id(0) == 0:
                    tl.store(new_stream + b * M + i * PIECE + m, piece, mask=i * PIECE + m < M)
            row += (piece,)
            total += piece
        mean = tl.sum(total, axis=0) / M if CENTRED else 0.0
        squares, centred = tl.zeros((PIECE,), tl.float32), ()
        for i in tl.static_range(len(row)):
            piece = tl.where(i * PIECE + m < M, row[i] - mean, 0.0) if CENTRED else row[i]
            centred += (piece,)
            squares += piece * piece
        scale, normed = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / M + eps), ()
        for i in tl.static_range(len(row)):
            normed += (centred[i] * scale * factors[i] + shifts[i],)
        out = _products(tile, normed)
        # The convolution, of the half that it is for: the window moves on by one.
        mixed = shift + out * taps[W - 1]
        for k in tl.static_range(W - 1):
            mixed += window[k] * taps[k]
        for k in tl.static_range(1, W - 1):
            tl.store(conv_state + state_at + (k - 1), window[k], mask=is_u)
        if W > 1:
            tl.store(conv_state + state_at + (W - 2), out, mask=is_u)
        tl.store(uz + b * 2 * E + e, tl.where(is_u, mixed * sigmoid(mixed), out), mask=in_e)


@triton.jit
def _multiply(
    x, weight, out, x_stride, n_rows, n_out, WIDTH: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out (B, n_out) = x (B, WIDTH) weight^T."""
    if EARLY:
        gdc_launch_dependents()
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = _rows(weight, o, o < n_out, WIDTH, PIECE)
    if EARLY:
        gdc_wait()
    for b in range(n_rows):
        tl.store(out + b * n_out + o, _products(tile, _pieces(x, b * x_stride, WIDTH, PIECE)), mask=o < n_out)


@triton.jit
def _scan(
    u, z, projected, dt_proj, dt_bias, A_log, D, state, y, u_stride, z_stride, E: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """dt's wide projection, a step of the state, gate: y (B, E), a program for some channels of one sequence."""
    if EARLY:
        gdc_launch_dependents()
    e, r, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    in_e, in_r, in_n = e < E, r < R, n < N
    inside = in_e[:, None] & in_n[None, :]
    b = tl.program_id(1)
    row = b * E + e.to(tl.int64)
    state_at = row[:, None] * N + n[None, :]
    widen = tl.load(dt_proj + e[:, None] * R + r[None, :], mask=in_e[:, None] & in_r[None, :], other=0.0)
    h = tl.load(state + state_at, mask=inside, other=0.0)
    A2 = -tl.exp2(load_float(A_log, e[:, None] * N + n[None, :], inside) * LOG2E) * LOG2E
    bias, skip = load_float(dt_bias, e, in_e), load_float(D, e, in_e)
    if EARLY:
        gdc_wait()
    at = projected + b * (R + 2 * N)
    low = load_float(at, r, in_r)
    drive, readout = load_float(at, R + n, in_n), load_float(at, R + N + n, in_n)
    x, gate = load_float(u, b * u_stride + e, in_e), load_float(z, b * z_stride + e, in_e)
    dt = softplus(tl.sum(widen.to(tl.float32) * low[None, :], axis=1) + bias)
    h = tl.exp2(dt[:, None] * A2) * h + (dt * x)[:, None] * drive[None, :]
    tl.store(state + state_at, h, mask=inside)
    out = tl.sum(h * readout[None, :], axis=1) + skip * x
    tl.store(y + row, out * gate * sigmoid(gate), mask=in_e)


def _tile(n_out: int, width: int, model_width: int, itemsize: int) -> dict[str, int]:
    """Rows of a weight that a program has, the pieces that it takes of their width, and its warps."""
    is_in_proj = width == model_width  # or another where E is M: no tile is wrong, only slower
    piece = width & -width if width % SMALLEST == 0 else triton.next_power_of_2(width)
    whole = ceil_div(width, piece) * piece
    rows, warps = 1, 8
    if n_out >= PROGRAMS:  # else x_proj
        if 1024 < model_width < 2048 and width % SMALLEST == 0:  # the 972M model: 448 bytes a lane
            rows, warps = (32 // itemsize, 4) if is_in_proj else (1, 1)
        else:
            # The latter is out_proj of 1.4B: four rows, not one.
            most = ELEMENTS if is_in_proj or model_width < 2048 else 4 * ELEMENTS
            rows = 1 << max(most // whole, 1).bit_length() - 1
            while rows > 1 and ceil_div(n_out, rows) < PROGRAMS:
                rows //= 2
            warps = min(triton.next_power_of_2(ceil_div(rows * whole, 32 * LANE)), 16)
    return {"PIECE": piece, "BLOCK": rows, "num_warps": warps}


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype, model_width: int, early: dict[str, bool]) -> Tensor:
    (n_out, width), n_rows = weight.shape, len(x)
    out = torch.empty(n_rows, n_out, dtype=dtype, device=x.device)
    tile = _tile(n_out, width, model_width, weight.element_size())
    _multiply[(ceil_div(n_out, tile["BLOCK"]),)](
        x, weight, out, x.stride(0), n_rows, n_out, WIDTH=width, **tile, **early
    )
    return out


def step(x, stream, conv_state, ssm_state, w, eps, centred):
    early = early_launch(x.device)
    (n_rows, width), (n_channels, n_states) = x.shape, w.A_log.shape
    rank, dtype = w.dt_proj.shape[1], w.in_proj.dtype
    new_stream = x.float() if stream is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    uz = torch.empty(n_rows, 2 * n_channels, dtype=dtype, device=x.device)
    tile = _tile(2 * n_channels, width, width, dtype.itemsize)
    _enter[(ceil_div(2 * n_channels, tile["BLOCK"]),)](
        x, stream, w.norm, w.norm_bias, w.in_proj, conv_state, w.conv, w.conv_bias, new_stream, uz, eps, n_rows,
        M=width, E=n_channels, W=w.conv.shape[1], CENTRED=centred,
        **tile, **early,
    )  # fmt: skip
    u, z = uz.chunk(2, dim=1)
    projected = _product(u, w.x_proj, torch.float32, width, early)
    y = torch.empty(n_rows, n_channels, dtype=dtype, device=x.device)
    _scan[(ceil_div(n_channels, CHANNELS), n_rows)](
        u, z, projected, w.dt_proj, w.dt_bias, w.A_log, w.D, ssm_state, y, u.stride(0), z.stride(0),
        E=n_channels, R=rank, N=n_states, BLOCK_R=triton.next_power_of_2(rank),
        BLOCK_N=triton.next_power_of_2(n_states), BLOCK=CHANNELS, num_warps=1, **early,
    )  # fmt: skip
    return _product(y, w.out_proj, dtype, width, early), new_stream
