"""Routing and moving rows in Triton: a choice and a softmax in one pass, a sort by counting, sums by gathering.

No sum is left to an order that may vary: none uses an atomic operation.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ..triton_runtime import ceil_div, exp_negative, load_float, multiply_add, with_rows

TILE = 4096  # elements of a tile, unless a row is longer
PIECES = 128  # programs of the sort, at most: each adds up the counts of all
SORTED_AT_ONCE = 128  # assignments of a tile of the sort, at most


@triton.jit(do_not_specialize=["n_rows"])
def _choose(
    logits, probabilities, gates, experts, n_rows, width, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)[None, :]
    at = row[:, None] * width + d
    inside = (row < n_rows)[:, None] & (d < width)
    values = tl.where(d < width, load_float(logits, at, inside), float("-inf"))
    weights = exp_negative(values - tl.max(values, axis=1)[:, None])
    # Said here, since neither the largest of NaN nor its exponential need be one.
    is_nan = tl.max((values != values).to(tl.int32), axis=1) > 0
    p = tl.where(is_nan[:, None], float("nan"), weights / tl.sum(weights, axis=1)[:, None])
    tl.store(probabilities + at, p, mask=inside)
    left = tl.where(d < width, p, -1.0)
    for k in range(TOP_K):
        _, found = tl.max(left, axis=1, return_indices=True)
        found = tl.where(is_nan, k, found)
        gate = tl.sum(tl.where(d == found[:, None], p, 0.0), axis=1)
        tl.store(gates + row * TOP_K + k, gate, mask=row < n_rows)
        tl.store(experts + row * TOP_K + k, found, mask=row < n_rows)
        left = tl.where(d == found[:, None], -2.0, left)


@triton.jit(do_not_specialize=["n_rows"])
def _choose_backward(
    dlogits, dprobabilities, dgates, probabilities, experts, out, dlogits_row, dlogits_column, dp_row, dp_column,
    n_rows, width, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows)[:, None] & (d < width)
    p = load_float(probabilities, row[:, None] * width + d, inside)
    grad = load_float(dprobabilities, row[:, None] * dp_row + d * dp_column, inside)
    if dgates is not None:
        for k in range(TOP_K):
            expert = tl.load(experts + row * TOP_K + k, mask=row < n_rows, other=0)
            dgate = tl.load(dgates + row * TOP_K + k, mask=row < n_rows, other=0.0)
            grad += tl.where(d == expert[:, None], dgate[:, None], 0.0)
    grad = p * (grad - tl.sum(p * grad, axis=1)[:, None])
    grad += load_float(dlogits, row[:, None] * dlogits_row + d * dlogits_column, inside)
    if HALVES:
        high = grad.to(tl.bfloat16)
        tl.store(out + row[:, None] * (2 * width) + d, high, mask=inside)
        tl.store(out + row[:, None] * (2 * width) + width + d, grad - high.to(tl.float32), mask=inside)
    else:
        tl.store(out + row[:, None] * width + d, grad, mask=inside)


def _matmul(a, b):
    """a b, summed and returned in float32; what tensor cores do with matrices of bf16, whose products are exact."""
    if a.dtype == b.dtype == torch.bfloat16 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def route(x, weight, top_k):
    with torch.autocast(x.device.type, enabled=False):
        logits = _matmul(x, weight.T)
    probabilities = torch.empty_like(logits)
    gates = torch.empty(len(x), top_k, dtype=torch.float32, device=x.device)
    experts = torch.empty(len(x), top_k, dtype=torch.int64, device=x.device)
    shape = _shape(logits.shape[1])
    with torch.cuda.device_of(x):
        _choose[(ceil_div(len(x), shape["ROWS"]),)](
            logits, probabilities, gates, experts, *logits.shape, TOP_K=top_k, **shape
        )
    return logits, probabilities, gates, experts


@triton.jit(do_not_specialize=["n_rows"])
def _add_product(
    base, a, weight, out, base_stride, n_rows, width, n_inner, n_experts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out = base + a weight, or a (weight, weight) where a is as wide as that."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < n_rows) & (d < width)
    total = load_float(base, row * base_stride + d, inside)
    for first in range(0, n_inner, INNER):
        i = first + tl.arange(0, INNER)
        left = tl.load(a + row * n_inner + i[None, :], mask=(row < n_rows) & (i < n_inner)[None, :], other=0.0)
        of_expert = weight + (i % n_experts)[:, None] * width + d
        right = tl.load(of_expert, mask=(i < n_inner)[:, None] & (d < width), other=0.0)
        total = multiply_add(left, right.to(left.dtype), total)
    tl.store(out + row * width + d, total, mask=inside)


def route_backward(dx, dlogits, dprobabilities, dgates, x, weight, probabilities, experts):
    """Gradients of x, in addition to dx, and of weight."""
    n_rows, n_experts = probabilities.shape
    # A gradient as the sum of two numbers of bf16 has 16 digits: products in bf16 lose nothing that a result keeps.
    halves = x.dtype == weight.dtype == torch.bfloat16
    n_inner, dtype = (2 * n_experts, torch.bfloat16) if halves else (n_experts, torch.float32)
    out, dx_sum = torch.empty(n_rows, n_inner, dtype=dtype, device=x.device), x.new_empty(x.shape)
    dx, shape = None if dx is None else with_rows(dx), _shape(n_experts)
    with torch.cuda.device_of(x):
        _choose_backward[(ceil_div(n_rows, shape["ROWS"]),)](
            dlogits, dprobabilities, None if dgates is None else dgates.contiguous(), probabilities, experts, out,
            *((0, 0) if dlogits is None else dlogits.stride()),
            *((0, 0) if dprobabilities is None else dprobabilities.stride()),
            n_rows, n_experts, TOP_K=experts.shape[1], **shape, HALVES=halves,
        )  # fmt: skip
        _add_product[(ceil_div(n_rows, 64), ceil_div(x.shape[1], 128))](
            dx, out, weight.contiguous(), dx_sum, 0 if dx is None else dx.stride(0), n_rows, x.shape[1], n_inner,
            n_experts, ROWS=64, COLUMNS=128, INNER=32,
        )  # fmt: skip
    with torch.autocast(x.device.type, enabled=False):
        dweight = _matmul(out.T, x)
    if not halves:
        return dx_sum, dweight.to(weight.dtype)
    return dx_sum, torch.add(dweight[:n_experts], dweight[n_experts:], out=torch.empty_like(weight))


@triton.jit(do_not_specialize=["n", "piece"])
def _count(experts, counts, n, piece, ROWS: tl.constexpr, BINS: tl.constexpr):
    """How many of a piece's assignments go to each expert."""
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, piece, ROWS):
        i = tl.program_id(0) * piece + first + tl.arange(0, ROWS)
        expert = tl.load(experts + i, mask=i < n, other=BINS)  # of no bin
        total += tl.sum((expert[:, None] == bins[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * BINS + bins, total)


@triton.jit(do_not_specialize=["n", "piece", "n_pieces"])
def _place(
    experts, counts, order, places, ends, totals, n, piece, n_pieces, n_experts, ROWS: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """An assignment's place: after all of lower experts, and those of its own expert in earlier pieces and rows."""
    bins = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    for first in range(0, n_pieces, ROWS):
        other = first + tl.arange(0, ROWS)[:, None]
        count = tl.load(counts + other * BINS + bins[None, :], mask=other < n_pieces, other=0)
        total += tl.sum(count, axis=0)
        earlier += tl.sum(tl.where(other < tl.program_id(0), count, 0), axis=0)
    end = tl.cumsum(total, axis=0)
    if tl.program_id(0) == 0:
        tl.store(ends + bins, end, mask=bins < n_experts)
        tl.store(totals + bins, total, mask=bins < n_experts)
    next_place = end - total + earlier
    for first in range(0, piece, ROWS):
        i = tl.program_id(0) * piece + first + tl.arange(0, ROWS)
        expert = tl.load(experts + i, mask=i < n, other=BINS)
        own = (expert[:, None] == bins[None, :]).to(tl.int32)
        place = tl.sum(own * (next_place[None, :] + tl.cumsum(own, axis=0) - 1), axis=1)
        tl.store(places + i, place, mask=i < n)
        tl.store(order + place, i, mask=i < n)
        next_place += tl.sum(own, axis=0)


def sort_by_expert(experts, n_experts):
    n, bins = len(experts), 1 << n_experts.bit_length()  # and one for none
    at_once = min(max(2 * TILE // bins, 1), SORTED_AT_ONCE)
    piece = max(ceil_div(n, PIECES * at_once), 1) * at_once
    n_pieces = max(ceil_div(n, piece), 1)
    order, ends = (torch.empty(size, dtype=torch.int32, device=experts.device) for size in (n, n_experts))
    places, totals, counts = torch.empty_like(order), torch.empty_like(ends), ends.new_empty(n_pieces, bins)
    experts = experts.contiguous()
    with torch.cuda.device_of(experts):
        shape = {"ROWS": at_once, "BINS": bins, "num_warps": 8}
        _count[(n_pieces,)](experts, counts, n, piece, **shape)
        _place[(n_pieces,)](experts, counts, order, places, ends, totals, n, piece, n_pieces, n_experts, **shape)
    return order, places, ends, totals


@triton.jit(do_not_specialize=["n_rows"])
def _gather(x, order, rows, x_stride, n_rows, width, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows)[:, None] & (d < width)
    token = tl.load(order + row, mask=row < n_rows, other=0).to(tl.int64) // TOP_K
    tl.store(rows + row[:, None] * width + d, tl.load(x + token[:, None] * x_stride + d, mask=inside), mask=inside)


def gather(x, order, top_k):
    x, rows = with_rows(x), x.new_empty(len(order), x.shape[1])
    shape = _shape(x.shape[1])
    with torch.cuda.device_of(x):
        _gather[(ceil_div(len(rows), shape["ROWS"]),)](x, order, rows, x.stride(0), *rows.shape, TOP_K=top_k, **shape)
    return rows


@triton.jit(do_not_specialize=["n_tokens"])
def _collect(
    rows, gates, places, kept, y, rows_stride, n_tokens, width,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)[None, :]
    inside = token < n_tokens
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in range(TOP_K):
        place = tl.load(places + token * TOP_K + k, mask=inside, other=0).to(tl.int64)
        real = inside
        if kept is not None:
            real = real & (place < tl.load(kept))
        values = load_float(rows, place[:, None] * rows_stride + d, real[:, None] & (d < width))
        if gates is not None:
            values *= tl.load(gates + token * TOP_K + k, mask=inside, other=0.0)[:, None]
        total += values
    tl.store(y + token[:, None] * width + d, total, mask=inside[:, None] & (d < width))


def collect(rows, gates, places, kept, top_k):
    rows, y = with_rows(rows), rows.new_empty(len(places) // top_k, rows.shape[1])
    gates = None if gates is None else gates.contiguous()
    shape = _shape(y.shape[1])
    with torch.cuda.device_of(y):
        _collect[(ceil_div(len(y), shape["ROWS"]),)](
            rows, gates, places, kept, y, rows.stride(0), *y.shape, TOP_K=top_k, **shape
        )
    return y


@triton.jit(do_not_specialize=["n_tokens"])
def _spread(
    dy, rows, gates, places, kept, drows, dgates, dy_stride, rows_stride, n_tokens, width,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)[None, :]
    inside = token < n_tokens
    grad = load_float(dy, token[:, None] * dy_stride + d, inside[:, None] & (d < width))
    for k in range(TOP_K):
        place = tl.load(places + token * TOP_K + k, mask=inside, other=0).to(tl.int64)
        real = inside
        if kept is not None:
            real = real & (place < tl.load(kept))
        at = real[:, None] & (d < width)
        values = load_float(rows, place[:, None] * rows_stride + d, at)
        tl.store(dgates + token * TOP_K + k, tl.sum(values * grad, axis=1), mask=inside)
        gate = tl.load(gates + token * TOP_K + k, mask=inside, other=0.0)
        tl.store(drows + place[:, None] * width + d, grad * gate[:, None], mask=at)


def spread(dy, rows, gates, order, places, kept):
    dy, rows, gates = with_rows(dy), with_rows(rows), gates.contiguous()
    drows, dgates = rows.new_empty(rows.shape), torch.empty_like(gates)
    shape = _shape(dy.shape[1])
    with torch.cuda.device_of(dy):
        _spread[(ceil_div(len(dy), shape["ROWS"]),)](
            dy, rows, gates, places, kept, drows, dgates, dy.stride(0), rows.stride(0), *dy.shape,
            TOP_K=gates.shape[1], **shape,
        )  # fmt: skip
    return drows, dgates


@cache
def _shape(width: int) -> dict[str, int]:
    """Shape of a tile of rows and its warps, 32 elements a lane up to rows of 16384."""
    block = 1 << (width - 1).bit_length()
    n_rows = max(TILE // block, 1)
    return {"ROWS": n_rows, "BLOCK": block, "num_warps": min(max(n_rows * block // 1024, 1), 16)}
