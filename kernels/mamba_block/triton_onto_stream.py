"""What follows the two scans of a bidirectional Mamba block in inference, as one kernel in Triton:

    y       = (y_1 + y_2) silu(z)                   (T, E); the scans leave the gate to this
    stream += y W_out'                              (T, M)
    normed  = stream / sqrt(mean(stream^2) + eps) * weight

A program has some tokens of all M columns, in two parts whose widths are powers of 2, so it can norm its rows. They
begin as the stream's rows: the product is added to them, and nothing has to be loaded behind it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, launch, load_float, multiply_add, sigmoid

TOKENS, CHANNELS = 64, 64  # of a program; of what it multiplies at once
WARPS, STAGES = 4, 2
REGISTERS = 168  # of a thread: room for three programs on a multiprocessor
WIDEST = 256  # M of a program whose sums fit its registers


@triton.jit(do_not_specialize=["n_tokens"])
def _onto_stream(
    y, z, out_proj, weight, stream, new_stream, normed, n_tokens, eps,
    Z_STRIDE: tl.constexpr, E: tl.constexpr, M: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * TOKENS  # addresses are of the first token, plus what 32 bits hold
    row = tl.arange(0, TOKENS)[:, None]
    there = begin + row < n_tokens
    y += begin * 2 * E
    z += begin * Z_STRIDE
    stream += begin * M
    new_stream += begin * M
    normed += begin * M
    a, b = tl.arange(0, HEAD)[None, :], HEAD + tl.arange(0, TAIL)[None, :]
    in_head, in_tail, at = there & (a < M), there & (b < M), row * M
    head, tail = load_float(stream, at + a, in_head), load_float(stream, at + b, in_tail)
    for first in tl.range(0, E, CHANNELS, loop_unroll_factor=1):
        d = first + tl.arange(0, CHANNELS)[None, :]
        inside = there & (d < E)
        forth = tl.load(y + row * 2 * E + d, mask=inside, other=0.0).to(tl.float32)
        back = tl.load(y + row * 2 * E + E + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(z + row * Z_STRIDE + d, mask=inside, other=0.0).to(tl.float32)
        gated = ((forth + back) * gate * sigmoid(gate)).to(y.dtype.element_ty)
        k = first + tl.arange(0, CHANNELS)[:, None]
        of_head = tl.load(out_proj + a * E + k, mask=(k < E) & (a < M), other=0.0)
        of_tail = tl.load(out_proj + b * E + k, mask=(k < E) & (b < M), other=0.0)
        head, tail = multiply_add(gated, of_head, head), multiply_add(gated, of_tail, tail)
    tl.store(new_stream + at + a, head, mask=in_head)
    tl.store(new_stream + at + b, tail, mask=in_tail)
    scale = (1.0 / tl.sqrt_rn((tl.sum(head * head, axis=1) + tl.sum(tail * tail, axis=1)) / M + eps))[:, None]
    tl.store(normed + at + a, head * scale * load_float(weight, a, a < M), mask=in_head)
    tl.store(normed + at + b, tail * scale * load_float(weight, b, b < M), mask=in_tail)


def serves(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether this is faster than its parts, and can be compiled: for hidden (.., M) and products in `dtype`."""
    if dtype.itemsize != 2 or hidden.shape[-1] > WIDEST or not hidden.numel():
        return False
    return not hidden.is_cuda or (
        torch.version.hip is None and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
    )


def onto_stream(
    y: Tensor, z: Tensor, out_proj: Tensor, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y (T, 2, E), of either scan, z (T, E) and out_proj (M, E), of one dtype; stream (T, M), weight (M,).

    Returns normed (T, M) in y's dtype and the new stream, in float32.
    """
    n_tokens, (width, n_channels) = len(y), out_proj.shape
    head = triton.next_power_of_2(width + 1) // 2
    normed = y.new_empty(n_tokens, width)
    new_stream = torch.empty(n_tokens, width, device=y.device)
    with torch.cuda.device_of(y):
        launch(
            _onto_stream, ceil_div(n_tokens, TOKENS), y, z, out_proj.contiguous(), weight.contiguous(),
            stream.contiguous(), new_stream, normed, n_tokens, eps, Z_STRIDE=z.stride(0), E=n_channels, M=width,
            TOKENS=TOKENS, CHANNELS=CHANNELS, HEAD=max(head, 16), TAIL=max(triton.next_power_of_2(width - head), 16),
            num_warps=WARPS, num_stages=STAGES, maxnreg=REGISTERS,
        )  # fmt: skip
    return normed, new_stream
