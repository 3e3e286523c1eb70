"""The 2-D scan of VMamba (arXiv 2401.10166, section 4.2, SS2D): four selective scans over one image, summed."""

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..backends import choose, traced
from ..operators import Operator
from .reference import cross_scan_reference
from .scans import four_scans


def cross_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor,
    *, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Scan the pixels of an image in K = 4 directions, each with parameters of its own, and add up the results.

    Directions: 0 row by row, 1 column by column, 2 and 3 the same backwards, from the last pixel to the first.
    Each is `selective_scan` with step sizes softplus(dt_weight dt + dt_bias).

    Shapes, with B batch, H height, W width, E channels, N states, R rank of the step sizes:
        x               (B, H, W, E)
        dt              (B, H, W, K, R)
        B, C            (B, H, W, K, N), each at its own pixel, whatever the direction
        A               (K, E, N), its values negative
        D, dt_bias      (K, E)
        dt_weight       (K, E, R)

    Returns (B, H, W, E), the sum over the directions, in float32 (float64 for float64 inputs): it is normed next.
    Raises ValueError if shapes disagree or if `backend` (as of `selective_scan`) cannot run these inputs. One state has
    a kernel of its own on a GPU (cuda.py); all else is four selective scans (scans.py).
    """
    _check(x, dt, A, B, C, D, dt_weight, dt_bias)
    tensors = (x, dt, A, B, C, D, dt_weight, dt_bias)
    if backend == "reference":
        return cross_scan_reference(*tensors)
    if choose(backend, x.device, x.dtype, in_cuda=True) != "cuda" or not _has_kernel(x, dt, A, B, C):
        return four_scans(*tensors, backend)
    save = torch.is_grad_enabled() and any(m.requires_grad for m in tensors)
    if not traced(*tensors) and not _kernels().usable(x.get_device()):
        return four_scans(*tensors, backend)
    return _scan(*tensors, save)[0]


def _has_kernel(x, dt, A, B, C) -> bool:
    """Whether cuda.py takes these shapes and types."""
    height, width, n_channels = x.shape[1:]
    return (
        A.shape[2] == 1
        and 0 < dt.shape[4] <= 256
        and x.numel() > 0
        and all(m.dtype in (torch.float32, torch.bfloat16, torch.float16) for m in (x, dt, B, C))
        and height * height * width < 2**32  # see Place.token in cuda_kernels/common.cu
        and 16 * n_channels < 2**31
    )


def _kernels() -> ModuleType:
    return import_module(".cuda", __package__)  # it imports Triton


def _run(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """(y, saved states)."""
    return _kernels().forward(x, dt, A, B, C, D, dt_weight, dt_bias, save)


def _fake(x, dt, A, B, C, D, dt_weight, dt_bias, save):
    shape = _kernels().saved_shape(x, dt) if save else (0,)
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


_scan = Operator("cross_scan", _run, _fake)


def _run_backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_weight: Tensor, dt_bias: Tensor,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (x, dt, A, B, C, D, dt_weight, dt_bias)."""
    inputs = (x, dt, A, B, C, D, dt_weight, dt_bias)
    grads = _kernels().backward(dy, *inputs, saved)
    return tuple(g.to(m.dtype).contiguous() for m, g in zip(inputs, grads, strict=True))  # pyright: ignore[reportReturnType] - eight


def _fake_backward(dy, *inputs):
    return tuple(m.new_empty(m.shape) for m in inputs[:8])


_scan_backward = Operator("cross_scan_backward", _run_backward, _fake_backward)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8], output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    return (None,) * 9 if dy is None else (*_scan_backward(dy, *ctx.saved_tensors), None)


_scan.differentiate(_backward, _setup_context)


def _check(x, dt, A, B, C, D, dt_weight, dt_bias):
    if x.dim() != 4 or A.dim() != 3 or dt.dim() != 5:
        raise ValueError(
            "x must be (batch, height, width, channels), dt (batch, height, width, directions, rank), A (directions, "
            f"channels, states); got {tuple(x.shape)}, {tuple(dt.shape)} and {tuple(A.shape)}"
        )
    n_channels, n_states, rank = x.shape[3], A.shape[2], dt.shape[4]
    place = tuple(x.shape[:3])
    expected = {
        "dt": (dt, (*place, 4, rank)),
        "A": (A, (4, n_channels, n_states)),
        "B": (B, (*place, 4, n_states)),
        "C": (C, (*place, 4, n_states)),
        "D": (D, (4, n_channels)),
        "dt_weight": (dt_weight, (4, n_channels, rank)),
        "dt_bias": (dt_bias, (4, n_channels)),
    }
    for name, (given, shape) in expected.items():
        if tuple(given.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {shape}")
