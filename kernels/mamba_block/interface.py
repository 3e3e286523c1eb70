"""The Mamba block for training as one operation of autograd: little to save, little for the host to do.

Forward, with T tokens of all sequences laid end to end, M model width, E inner width, R rank of dt, N states:

    (x, z)      = hidden W_in'                          (T, 2E); each half a view
    u           = silu(conv(x))                         (T, E)
    (t, B, C)   = u W_x'                                (T, R + 2N)
    delta       = t W_dt'                               (T, E); the scan adds dt's bias in float32
    y           = scan(u, delta, -exp(A_log), B, C, D) silu(z)
    out         = y W_out'                              (T, M)

Saved are hidden, (x, z), (t, B, C), y and the scan's checkpoints; u and delta, as large as y, are made again. Backward:

    dy          = dout W_out                            dW_out = dout' y
    du, ddelta, dA, dB, dC, dD, dz, dbias               the scan's own backward
    d(t, B, C)  = (ddelta W_dt, dB, dC)                 dW_dt = ddelta' t
    du         += d(t, B, C) W_x                        dW_x = d(t, B, C)' u;  dA_log = dA A
    dx                                                  the convolution's own backward, of du
    dhidden     = (dx, dz) W_in                         dW_in = (dx, dz)' hidden

dx and dz are written to the two halves of one matrix. Either projection may be left out: what comes in is then (x, z),
what comes out y.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import IN_PYTORCH, choose, traced
from ..causal_conv1d import interface as conv_interface
from ..selective_scan import interface as scan_interface


class BlockWeights(NamedTuple):
    """M model width, E inner width, R rank of dt, N states, W conv width."""

    in_proj: Tensor | None  # (2E, M)
    conv: Tensor  # (E, 1, W)
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + 2N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor | None  # (E,)
    A_log: Tensor  # (E, N)
    D: Tensor  # (E,)
    out_proj: Tensor | None  # (M, E)


def serves(hidden: Tensor, weights: BlockWeights, dtype: torch.dtype) -> bool:
    """Whether `mamba_block` does what the block's single operations would do.

    That is: autograd, and no tracer, looks on; kernels of ours are to run; no tensor is in float64.
    """
    tensors = [hidden, *(w for w in weights if w is not None)]
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in tensors)
        and all(x.dtype != torch.float64 for x in tensors)
        and not traced(*tensors)
        and choose(None, hidden.device, dtype) not in IN_PYTORCH
    )


def mamba_block(
    hidden: Tensor, weights: BlockWeights, *, dtype: torch.dtype, cu_seqlens: Tensor | None = None,
    reverse: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """hidden (B, L, M), or (x, z) (B, L, 2E) without in_proj -> (B, L, M), or y (B, L, E) without out_proj.

    dtype: that of the matrix products and of what lies between them. cu_seqlens and reverse are `selective_scan`'s. The
    gradients are deterministic; there are none of second order. Ask `serves` first: no tracer may see this, and it has
    no implementation in PyTorch's own operations (ValueError).
    """
    n_channels, rank = weights.dt_proj.shape
    scan = choose(backend, hidden.device, dtype, in_cuda=True)
    conv = "triton" if scan == "cuda" else scan
    if conv in IN_PYTORCH:
        raise ValueError(f"mamba_block runs on numba, triton or cuda, which do not serve {dtype}; got backend={scan!r}")
    settings = _Settings(dtype, n_channels, rank, weights.A_log.shape[1], hidden.shape[0], reverse, conv, scan)
    return _Block.apply(settings, cu_seqlens, hidden, *weights)


class _Settings(NamedTuple):
    dtype: torch.dtype
    n_channels: int
    rank: int
    n_states: int
    batch: int
    reverse: bool
    conv_backend: str
    scan_backend: str

    def halves(self, xz: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 2E) -> x, z (T, E)."""
        return xz[:, : self.n_channels], xz[:, self.n_channels :]

    def parts(self, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, R + 2N) -> t (T, R), B, C (T, 1, N)."""
        matrices = low[:, None, self.rank :]
        return low[:, : self.rank], matrices[..., : self.n_states], matrices[..., self.n_states :]

    def convolution(self, direction: str, *inputs: Any, **options: Any) -> Any:
        """`forward` or `backward` of (.., x, weight, bias, initial state, cu_seqlens)."""
        run = conv_interface.implementation(self.conv_backend, direction)
        return run(*inputs, self.batch, True, self.reverse, **options)

    def scan(self, direction: str, *inputs: Any) -> Any:
        return scan_interface.implementation(self.scan_backend, direction)(*inputs)


def _projected(rows: Tensor, weight: Tensor | None) -> Tensor:
    return rows if weight is None else torch.mm(rows, weight.t())


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, cu_seqlens, hidden, in_proj, conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, out_proj):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast(hidden.device.type, enabled=False):
            x_proj, dt_proj = x_proj.to(s.dtype), dt_proj.to(s.dtype)
            in_proj, out_proj = (None if w is None else w.to(s.dtype) for w in (in_proj, out_proj))
            rows, taps, A = hidden.to(s.dtype).flatten(0, 1), conv[:, 0], -torch.exp(A_log.float())
            xz = _projected(rows, in_proj)
            x, z = s.halves(xz)
            u = s.convolution("forward", x, taps, conv_bias, None, cu_seqlens)
            low = torch.mm(u, x_proj.t())
            t, B, C = s.parts(low)
            delta = torch.mm(t, dt_proj.t())
            y, _, saved = s.scan(
                "forward", u, delta, A, B, C, D, z, dt_bias, None, cu_seqlens, s.batch, True, s.reverse, True
            )
            out = _projected(y, out_proj)
        ctx.settings, ctx.hidden_shape = s, hidden.shape
        weights = in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj
        own = None if in_proj is None else xz, low, None if out_proj is None else y, saved
        ctx.save_for_backward(cu_seqlens, rows, *own, *weights)
        return out.view(*hidden.shape[:2], out.shape[1])

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        # As once_differentiable sees it, gradients depend on dout alone; but on the inputs, too, they do.
        return _gradients(ctx, dout.detach().requires_grad_() if torch.is_grad_enabled() else dout)


@once_differentiable
def _gradients(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    s, saved_tensors = ctx.settings, ctx.saved_tensors
    cu_seqlens, rows, xz, low, y, saved = saved_tensors[:6]
    in_proj, taps, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj = saved_tensors[6:]
    wanted = BlockWeights(*ctx.needs_input_grad[3:])
    d_in_proj = d_x_proj = d_dt_proj = d_out_proj = None
    with torch.autocast(rows.device.type, enabled=False):
        dy = dout.flatten(0, 1)
        if out_proj is not None:
            d_out_proj = torch.mm(dy.t(), y) if wanted.out_proj else None
            dy = torch.mm(dy, out_proj)
        xz = rows if xz is None else xz
        x, z = s.halves(xz)
        u = s.convolution("forward", x, taps, conv_bias, None, cu_seqlens)
        t, B, C = s.parts(low)
        delta = torch.mm(t, dt_proj.t())
        dxz = torch.empty_like(xz)
        dx, dz = s.halves(dxz)
        du, ddelta, dA, dB, dC, dD, _, dbias, _ = s.scan(
            *("backward", dy, None, u, delta, A, B, C, D, z, dt_bias, None, cu_seqlens, s.batch, saved, True),
            *(s.reverse, dz),
        )
        du, ddelta = du.to(s.dtype), ddelta.to(s.dtype)
        dlow = torch.cat((torch.mm(ddelta, dt_proj), dB[:, 0].to(s.dtype), dC[:, 0].to(s.dtype)), 1)
        d_dt_proj = torch.mm(ddelta.t(), t) if wanted.dt_proj else None
        d_x_proj = torch.mm(dlow.t(), u) if wanted.x_proj else None
        du.addmm_(dlow, x_proj)
        _, dconv, dconv_bias, _ = s.convolution("backward", du, x, taps, conv_bias, None, cu_seqlens, dx=dx)
        dhidden = dxz
        if in_proj is not None:
            d_in_proj = torch.mm(dxz.t(), rows) if wanted.in_proj else None
            dhidden = torch.mm(dxz, in_proj) if ctx.needs_input_grad[2] else None
        dhidden = None if dhidden is None else dhidden.view(ctx.hidden_shape)
    # What is in another dtype than its input the engine converts.
    biases = dconv_bias if conv_bias is not None else None, dbias if dt_bias is not None else None
    return (
        *(None, None, dhidden, d_in_proj, dconv[:, None], biases[0], d_x_proj, d_dt_proj, biases[1]),
        *(dA * A, dD, d_out_proj),
    )
