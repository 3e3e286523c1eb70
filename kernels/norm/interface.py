"""The public norms: checks, choice of a backend, and the operators that torch.compile and autograd see."""

import torch
from torch import Tensor

from ..backends import IN_PYTORCH, choose
from ..operators import Implementations, Operator
from .reference import norm_reference

implementation = Implementations(__package__, numba="cpu", triton="triton")


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, residual: Tensor | None = None, dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add x to the residual stream and normalise that by its root mean square (arXiv 1910.07467), in one pass.

        stream = residual + x
        y = stream / sqrt(mean(stream^2) + eps) * weight

    Shapes: x, residual (.., D), weight (D,). The stream is float32, or float64 for float64 inputs, and `residual` must
    be so too; without it the stream is x. Returns (y in `dtype`, by default weight's, and stream), both (.., D), both
    with gradients; those of the weight are summed in a fixed order.

    Raises ValueError if shapes or dtypes disagree or if `backend` cannot run these inputs.
    """
    return _with_stream(x, *_choose_and_run(x, residual, weight, None, eps, False, dtype, backend))


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None,
    dtype: torch.dtype | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `rms_norm`, of the stream less its mean, plus a bias (D,) if given (arXiv 1607.06450)."""
    return _with_stream(x, *_choose_and_run(x, residual, weight, bias, eps, True, dtype, backend))


def layer_norm_alone(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`layer_norm` without a residual stream: y alone, so that a 16-bit x is not widened into a stream."""
    return _choose_and_run(x, None, weight, bias, eps, True, dtype, backend)[0]


def _with_stream(x: Tensor, y: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
    return y, x.to(torch.float32) if stream is None else stream


def _choose_and_run(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    dtype: torch.dtype | None, backend: str | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(y, stream); no stream without a residual: then it is x."""
    _check(x, residual, weight, bias)
    backend = choose(backend, x.device, torch.promote_types(x.dtype, weight.dtype))
    dtype = dtype or weight.dtype
    if backend in IN_PYTORCH:
        return norm_reference(x, residual, weight, bias, eps, centred, dtype)
    rows = x.reshape(-1, x.shape[-1])
    flat_residual = None if residual is None else residual.reshape(rows.shape)
    y, stream = _norm(rows, flat_residual, weight, bias, eps, centred, dtype, backend)
    return y.view(x.shape), None if residual is None else stream.view(x.shape)


def _check(x, residual, weight, bias):
    if x.dim() < 1 or tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"x must be (.., channels) and weight (channels,); got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {tuple(weight.shape)}")
    if residual is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if residual.shape != x.shape or residual.dtype != dtype:
            raise ValueError(
                f"residual is {residual.dtype} {tuple(residual.shape)}; expected {dtype} {tuple(x.shape)} for this x"
            )


# The operators below see rows: x and residual are (T, D). A tensor that does not apply is returned empty.


def _run(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool,
    dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, stream); the stream is empty without a residual: then it is x."""
    return implementation(backend, "forward")(x, residual, weight, bias, eps, centred, dtype)


def _fake(x, residual, weight, bias, eps, centred, dtype, backend):
    stream = (0,) if residual is None else x.shape
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(stream, dtype=torch.float32)


_norm = Operator("norm", _run, _fake)


def _run_backward(
    dy: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    centred: bool, x_dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of (residual, x, weight, bias); x's is empty if x is float32: then it is the residual's."""
    backward = implementation(backend, "backward")
    dresidual, dx, dweight, dbias = backward(dy, dstream, stream, weight, bias, eps, centred, x_dtype)
    dx = stream.new_empty(0, dtype=x_dtype) if x_dtype == torch.float32 else dx
    return dresidual, dx, dweight.to(weight.dtype), weight.new_empty(0) if bias is None else dbias.to(bias.dtype)


def _fake_backward(dy, dstream, stream, weight, bias, eps, centred, x_dtype, backend):
    return (
        stream.new_empty(stream.shape, dtype=torch.float32),
        stream.new_empty((0,) if x_dtype == torch.float32 else stream.shape, dtype=x_dtype),
        weight.new_empty(weight.shape),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


_norm_backward = Operator("norm_backward", _run_backward, _fake_backward)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, eps, centred, _, backend = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, bias)
    ctx.options = (eps, centred, x.dtype, backend)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dstream):
    stream, weight, bias = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(stream, dtype=weight.dtype)
    dstream = dstream if ctx.has_residual else None  # else of an empty tensor
    dresidual, dx, dweight, dbias = _norm_backward(dy, dstream, stream, weight, bias, *ctx.options)
    return (
        *(dx if dx.shape == stream.shape else dresidual, dresidual if ctx.has_residual else None),
        *(dweight, None if bias is None else dbias, None, None, None, None),
    )


_norm.differentiate(_backward, _setup_context)
