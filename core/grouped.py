"""Rows that are sorted by group, each group times its own matrix: the matrix product of a mixture of experts.

PyTorch's grouped GEMM does it in one call where it can: bf16 on a GPU of compute capability 9 and up is one kernel that
never waits for the host, other GPUs and dtypes and the CPU are a loop of its own. What it does not take (float64, other
devices; while compiling, whatever is not bf16) goes through the loop below, an operator that compilers see as one.

Letters: T rows, E groups, I and O widths of a row before and after.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (T, I), weight (E, I, O), ends (E,) int32, ascending -> (T, O): rows ends[e - 1] to ends[e] times weight[e].

    I and O are multiples of 8 (rows of whole 16 bytes). Rows from ends[-1] on belong to no group: the results and the
    gradients of these are undefined, and may be NaN. The gradient that comes in must be dense (no expanded one).
    """
    if _in_one_call(x):
        return F.grouped_mm(x, weight, offs=ends)
    return _by_loop(x, weight, ends)


def waits_for_host(x: Tensor) -> bool:
    """Whether `grouped_matmul` of such rows makes the host read `ends`, which a CUDA graph cannot."""
    return x.dtype != torch.bfloat16 or not x.is_cuda or torch.cuda.get_device_capability(x.device) < (9, 0)


def _in_one_call(x: Tensor) -> bool:
    if x.device.type not in ("cpu", "cuda"):
        return False
    if torch.compiler.is_compiling():  # which knows the operator for bf16 only
        return x.dtype == torch.bfloat16
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(group, its rows) of the groups that have any."""
    for e, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            yield e, slice(start, end)


@torch.library.custom_op("polymamba::grouped_matmul", mutates_args=())
def _by_loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = x.new_zeros(len(x), weight.shape[2])
    for e, rows in _groups(ends):
        torch.mm(x[rows], weight[e], out=y[rows])
    return y


@_by_loop.register_fake
def _(x, weight, ends):
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("polymamba::grouped_matmul_backward", mutates_args=())
def _by_loop_backward(dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    for e, rows in _groups(ends):
        torch.mm(dy[rows], weight[e].T, out=dx[rows])
        torch.mm(x[rows].T, dy[rows], out=dweight[e])
    return dx, dweight


@_by_loop_backward.register_fake
def _(dy, x, weight, ends):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return *_by_loop_backward(dy, *ctx.saved_tensors), None


_by_loop.register_autograd(_backward, setup_context=_setup_context)
