"""A Mamba block's step in Triton for many sequences: products by PyTorch, states by tiles of sequences and channels.

What lies between the products is CUDA C++ (cuda_middle.py, cuda_halves.py) where that serves.

Products of Triton's own, which could begin early, were measured at half the speed of cuBLAS's.

Letters: B sequences, E inner width, R rank of dt, N states.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..causal_conv1d.triton import step as conv_step
from ..triton_runtime import LOG2E, ceil_div, early_launch, load_float, multiply_add, sigmoid, softplus
from . import cuda_halves, cuda_middle
from .triton_few import after_the_kernel_before

BLOCK = 16  # sequences of a program of the scan, and channels: what the matrix units take at least
EARLY_SCAN = 64  # sequences up to which the scan begins while the product before it ends: measured


@triton.jit
def _add_norm(
    x, stream, weight, bias, new_stream, y, eps, M: tl.constexpr, BLOCK_M: tl.constexpr, CENTRED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Residual add and norm, a program for a sequence."""
    m = tl.arange(0, BLOCK_M)
    inside, at = m < M, tl.program_id(0) * M + m
    factor, shift = load_float(weight, m, inside), load_float(bias, m, inside)
    after_the_kernel_before(EARLY)
    row = load_float(x, at, inside) + load_float(stream, at, inside)
    tl.store(new_stream + at, row, mask=inside)
    if CENTRED:
        row = tl.where(inside, row - tl.sum(row, axis=0) / M, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(row * row, axis=0) / M + eps)
    tl.store(y + at, row * scale * factor + shift, mask=inside)


@triton.jit
def _scan(
    u, z, projected, dt_proj, dt_bias, A_log, D, state, y, u_stride, z_stride, n_rows, E: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """dt's wide projection, a step of the state, gate: y (B, E), a program for some channels of some sequences."""
    e, r, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_e, in_r, in_n, in_b = e < E, r < R, n < N, b < n_rows
    row = b.to(tl.int64)[:, None] * E + e[None, :]
    here = in_b[:, None] & in_e[None, :]
    state_at, inside = row[:, :, None] * N + n[None, None, :], here[:, :, None] & in_n[None, None, :]
    h = tl.load(state + state_at, mask=inside, other=0.0)
    widen = tl.load(dt_proj + e[None, :] * R + r[:, None], mask=in_r[:, None] & in_e[None, :], other=0.0)
    pairs = in_e[:, None] & in_n[None, :]
    A2 = -tl.exp2(load_float(A_log, e[:, None] * N + n[None, :], pairs) * LOG2E) * LOG2E
    bias, skip = load_float(dt_bias, e, in_e), load_float(D, e, in_e)
    after_the_kernel_before(EARLY)
    at, of_n = projected + b[:, None] * (R + 2 * N), in_b[:, None] & in_n[None, :]
    low = tl.load(at + r[None, :], mask=in_b[:, None] & in_r[None, :], other=0.0)
    drive, readout = load_float(at, R + n[None, :], of_n), load_float(at, R + N + n[None, :], of_n)
    x = load_float(u, b[:, None] * u_stride + e[None, :], here)
    gate = load_float(z, b[:, None] * z_stride + e[None, :], here)
    dt = softplus(multiply_add(low, widen, tl.zeros((BLOCK_B, BLOCK), tl.float32)) + bias[None, :])
    h = tl.exp2(dt[:, :, None] * A2[None, :, :]) * h + (dt * x)[:, :, None] * drive[:, None, :]
    tl.store(state + state_at, h, mask=inside)
    out = tl.sum(h * readout[:, None, :], axis=2) + skip[None, :] * x
    tl.store(y + row, out * gate * sigmoid(gate), mask=here)


def step(x, stream, conv_state, ssm_state, w, eps, centred):
    (n_channels, n_states), rank, (n_rows, width) = w.A_log.shape, w.dt_proj.shape[1], x.shape
    early, late = early_launch(x.device), {"EARLY": False}
    new_stream, normed = torch.empty(x.shape, dtype=torch.float32, device=x.device), torch.empty_like(x)
    block_m = triton.next_power_of_2(width)
    _add_norm[(n_rows,)](
        x, stream, w.norm, w.norm_bias, new_stream, normed, eps, M=width, BLOCK_M=block_m, CENTRED=centred,
        num_warps=max(1, min(block_m // 256, 8)), **early,
    )  # fmt: skip
    uz = F.linear(normed, w.in_proj)
    for module in (cuda_middle, cuda_halves):
        if module.serves(x, conv_state, ssm_state, w):
            y = module.step(uz, conv_state, ssm_state, w)
            if y is not None:
                return F.linear(y, w.out_proj), new_stream
    u, z = uz.chunk(2, dim=1)
    u = conv_step(conv_state, u, w.conv, w.conv_bias, True)
    y, block_n = torch.empty_like(u), triton.next_power_of_2(n_states)
    _scan[(ceil_div(n_channels, BLOCK), ceil_div(n_rows, BLOCK))](
        u, z, F.linear(u, w.x_proj), w.dt_proj, w.dt_bias, w.A_log, w.D, ssm_state, y, u.stride(0), z.stride(0), n_rows,
        E=n_channels, R=rank, N=n_states, BLOCK_B=BLOCK, BLOCK=BLOCK, BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_N=block_n, num_warps=max(4, min(BLOCK * BLOCK * block_n // 1024, 16)),
        **(early if n_rows <= EARLY_SCAN else late),
    )  # fmt: skip
    return F.linear(y, w.out_proj), new_stream
