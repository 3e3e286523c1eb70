"""VMamba's block as one operation: few tensors to save, and little for the host to do.

Forward, with T tokens of all images, C channels, E inner width, K = 4 directions, R rank of dt, F width of the MLP:

    n_1   = norm(x)                                 (T, C)
    a     = n_1 W_in'                               (T, E)
    u     = silu(conv(a))                           (T, E); 3 x 3, depthwise
    low   = u W_x'                                  (T, K (R + 2)): dt, B and C of each direction
    y     = cross_scan(u, low)                      (T, E), float32
    n_2   = norm(y)                                 (T, E)
    x_1   = x + f_1 n_2 W_out'                      (T, C); f_1, f_2 a factor for each image, of drop path
    n_3   = norm(x_1)                               (T, C)
    h     = n_3 W_1' + b_1                          (T, F)
    out   = x_1 + f_2 (gelu(h) W_2' + b_2)          (T, C)

Saved are x, n_1, a, u, low, y, n_2, x_1, n_3, h, and the scan's states; gelu(h), the widest tensor, is made again. The
products and what lies between them are in the dtype that is asked for; x and x_1 have the dtype of x.

In bfloat16, where nothing is saved, gelu is cuBLAS's, inside the product: tanh's form of it, off by up to 5e-4. The
logits of a model are as near to float64 as with erf's (benchmarks/results/vision_speed.md).
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import choose, traced
from ..casting import cast_all, without_autocast
from ..operators import Operator, module, of_first_order


class VSSWeights(NamedTuple):
    norm: Tensor  # (C,)
    norm_bias: Tensor
    in_proj: Tensor  # (E, C)
    conv: Tensor  # (E, 1, 3, 3)
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (K, R + 2, E)
    dt_proj: Tensor  # (K, E, R)
    dt_bias: Tensor  # (K, E)
    A_log: Tensor  # (K E, 1)
    D: Tensor  # (K E,)
    norm_2: Tensor  # (E,)
    norm_2_bias: Tensor
    out_proj: Tensor  # (C, E)
    norm_3: Tensor  # (C,)
    norm_3_bias: Tensor
    fc1: Tensor  # (F, C)
    fc1_bias: Tensor  # (F,)
    fc2: Tensor  # (C, F)
    fc2_bias: Tensor  # (C,)


def serves(x: Tensor, weights: VSSWeights, dtype: torch.dtype) -> bool:
    """Whether `vss_block` does what the block's single operations would do.

    That is: on a GPU; all in one dtype, not float64; no tracer but torch.compile looks on, and that not on gradients.
    """
    tensors = [x, *(w for w in weights if w is not None)]
    if not x.is_cuda or not x.numel() or any(w.dtype != x.dtype for w in tensors):
        return False
    if choose(None, x.device, dtype, in_cuda=True) != "cuda" or x.shape[1] ** 2 * x.shape[2] >= 2**32:
        return False
    if torch.compiler.is_dynamo_compiling():
        return not torch.is_grad_enabled()
    return not traced(*tensors) and _parts()[2].usable(x.get_device())


def vss_block(
    x: Tensor, weights: VSSWeights, *, dtype: torch.dtype, eps: float, factors: Tensor | None = None
) -> Tensor:
    """x (B, H, W, C) -> the same shape and dtype.

    dtype: of the matrix products and of what lies between them. eps: of the norms. factors: (2, B) float32, by which
    what is added to x is multiplied. The gradients are deterministic; there are none of second order. Ask `serves`
    first: no tracer may see this but a compiler, without gradients, and it runs on Triton and CUDA alone.
    """
    if torch.compiler.is_dynamo_compiling():
        return _block_operator(x, list(weights), dtype, eps)
    if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in (x, *weights)):
        return _Block.apply(dtype, eps, factors, x, *weights)
    return _forward(x, weights, dtype, eps, factors, save=False)[0]


@cache
def _parts() -> tuple[Any, Any, Any, Any]:
    """The kernels, which import Triton: of the norm, the convolution, the scan and GELU."""
    from ..cross_scan import cuda
    from ..norm import triton
    from . import triton_conv, triton_mlp

    return triton, triton_conv, cuda, triton_mlp


def _run(x: Tensor, weights: list[Tensor | None], dtype: torch.dtype, eps: float) -> Tensor:
    w: Any = weights
    return _forward(x, VSSWeights(*w), dtype, eps, None, save=False)[0]


def _fake(x, weights, dtype, eps):
    return x.new_empty(x.shape)


_block_operator = Operator("vss_block", _run, _fake)


def conv_norm_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, norm_bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """gelu(norm(conv(x))) of images on a GPU, without gradients: x (B, C, H, W), weight (D, C, 3, 3) with stride 2 and
    zeros around, all others (D,) -> (B, H / 2, W / 2, D), sides rounded up, in this dtype. 9 C and D are at most 128.
    """
    return _stem_operator(x, weight, bias, norm, norm_bias, eps, dtype)


def _run_stem(
    x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, norm_bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return module(__package__ or "", "triton_stem").run(x, weight, bias, norm, norm_bias, eps, dtype)


def _fake_stem(x, weight, bias, norm, norm_bias, eps, dtype):
    return x.new_empty(len(x), (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2, len(weight), dtype=dtype)


_stem_operator = Operator("conv_norm_gelu", _run_stem, _fake_stem)


def _forward(
    x: Tensor, w: VSSWeights, dtype: torch.dtype, eps: float, factors: Tensor | None, save: bool
) -> tuple[Tensor, tuple[Any, ...]]:
    """(the result, what a backward needs)."""
    norm, conv, scan, _ = _parts()
    _, height, width, _ = x.shape
    with without_autocast(x.device.type), torch.cuda.device_of(x):
        in_proj, x_proj, out_proj, fc1, fc1_bias, fc2, fc2_bias = cast_all(
            dtype, w.in_proj, w.x_proj, w.out_proj, w.fc1, w.fc1_bias, w.fc2, w.fc2_bias
        )
        x_proj = x_proj.flatten(0, 1)
        rows = x.reshape(-1, x.shape[3])
        n_1, _ = norm.forward(rows, None, w.norm, w.norm_bias, eps, True, dtype)
        a = torch.mm(n_1, in_proj.t())
        u = conv.forward(a, w.conv, w.conv_bias, height, width)
        if not save:  # then what has been read gives way to what follows
            n_1 = a = None
        low = torch.mm(u, x_proj.t())
        y, states = scan.forward_projected(
            u.view(-1, height, width, u.shape[1]), low, w.A_log, w.D, w.dt_proj, w.dt_bias, save
        )
        y = y.view(u.shape)
        if not save:
            u = low = None
        n_2, _ = norm.forward(y, None, w.norm_2, w.norm_2_bias, eps, True, dtype)
        z = torch.mm(n_2, out_proj.t())
        if not save:
            y = n_2 = None
        # Where only the last product's result is to be added, it is added there, and its bias beforehand.
        at_once = factors is None and not save and x.dtype == dtype
        shift = fc2_bias if at_once else None
        n_3, x_1 = norm.forward(
            z, rows, w.norm_3, w.norm_3_bias, eps, True, dtype, None if factors is None else factors[0], shift
        )
        del z
        if not save and dtype == torch.bfloat16:
            h = g = torch._addmm_activation(fc1_bias, n_3, fc1.t(), use_gelu=True)
        else:
            h = torch.addmm(fc1_bias, n_3, fc1.t())
            g = F.gelu(h)
        if at_once:
            out = x_1.addmm_(g, fc2.t())
        elif factors is None:
            out = torch.add(x_1, torch.addmm(fc2_bias, g, fc2.t()))
        else:
            z = torch.addmm(fc2_bias, g, fc2.t()).view(len(x), -1)
            out = torch.addcmul(x_1.view(z.shape), z, factors[1][:, None])
    matrices = in_proj, x_proj, out_proj, fc1, fc2
    return out.view(x.shape), (n_1, a, u, low, y, states, n_2, x_1, n_3, h, factors, *matrices)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype, eps, factors, x, *weights):  # pyright: ignore[reportIncompatibleMethodOverride]
        out, kept = _forward(x, VSSWeights(*weights), dtype, eps, factors, save=True)
        ctx.eps = eps
        ctx.save_for_backward(x, *kept, *weights)
        return out

    @staticmethod
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, dout)


@of_first_order
def _gradients(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, n_1, a, u, low, y, states, n_2, x_1, n_3, h, factors, *rest = ctx.saved_tensors
    in_proj, x_proj, out_proj, fc1, fc2 = rest[:5]
    w, eps, of, dtype = VSSWeights(*rest[5:]), ctx.eps, x.dtype, n_1.dtype
    norm, conv, scan, mlp = _parts()
    _, height, width, _ = x.shape
    f_1, f_2 = (None, None) if factors is None else factors
    with without_autocast(x.device.type), torch.cuda.device_of(x):
        rows = x.reshape(x_1.shape)
        dout = dout.reshape(rows.shape)
        # Of the norms' weights, all in one: (weight, bias) of the first, of the third, of the second.
        n, inner = 2 * rows.shape[1], 2 * y.shape[1]
        shares = norm.new_shares(rows, 2 * n + inner)
        # The same of the convolution's weights and bias, and of the MLP's first bias.
        of_conv = w.conv.numel(), 0 if w.conv_bias is None else len(w.conv_bias), h.shape[1]
        n_pieces, piece = conv.pieces_of(len(rows))
        other_shares = torch.empty(n_pieces, sum(of_conv), device=x.device)
        dz = dout.to(dtype) if f_2 is None else _scaled(dout, f_2, dtype)
        g, dh = mlp.gelu_backward(torch.mm(dz, fc2), h, other_shares[:, of_conv[0] + of_conv[1] :], piece)
        d_fc2, d_fc2_bias = _product(dz.t(), g, of), dz.sum(0, dtype=of)
        del g
        d_fc1 = _product(dh.t(), n_3, of)
        dn = torch.mm(dh, fc1)
        of_norm, of_norm_3, of_norm_2 = shares.split((n, n, inner), 1)
        dx_1, dz = norm.backward_with_shares(dn, dout, x_1, w.norm_3, w.norm_3_bias, eps, True, dtype, of_norm_3, f_1)
        dz = dx_1 if dz is None else dz
        d_out_proj, dn = _product(dz.t(), n_2, of), torch.mm(dz, out_proj)
        dy, _ = norm.backward_with_shares(dn, None, y, w.norm_2, w.norm_2_bias, eps, True, torch.float32, of_norm_2)
        du, dlow, dA_log, dD, d_dt_proj, d_dt_bias = scan.backward_projected(
            dy, u.view(-1, height, width, u.shape[1]), low, w.A_log, w.D, w.dt_proj, w.dt_bias, states, of
        )
        du = du.view(u.shape).addmm_(dlow, x_proj)
        d_x_proj = _product(dlow.t(), u, of).view(w.x_proj.shape)
        da = conv.backward_with_shares(du, a, w.conv, w.conv_bias, height, width, other_shares)
        d_conv, d_conv_bias, d_fc1_bias = norm.sum_first_axis(other_shares).split(of_conv)
        d_conv, d_conv_bias = d_conv.view(w.conv.shape), None if w.conv_bias is None else d_conv_bias
        d_in_proj, dn = _product(da.t(), n_1, of), torch.mm(da, in_proj)
        dx, in_its_dtype = norm.backward_with_shares(dn, dx_1, rows, w.norm, w.norm_bias, eps, True, of, of_norm)
        sums = norm.sum_first_axis(shares).split((*[n // 2] * 4, inner // 2, inner // 2))
        d_norm, d_norm_bias, d_norm_3, d_norm_3_bias, d_norm_2, d_norm_2_bias = sums
    dx = (dx if in_its_dtype is None else in_its_dtype).view(x.shape)
    # What is still in another dtype than its input the engine converts.
    return (
        *(None, None, None, dx, d_norm, d_norm_bias, d_in_proj, d_conv, d_conv_bias, d_x_proj, d_dt_proj, d_dt_bias),
        *(dA_log, dD, d_norm_2, d_norm_2_bias, d_out_proj, d_norm_3, d_norm_3_bias),
        *(d_fc1, d_fc1_bias, d_fc2, d_fc2_bias),
    )


def _scaled(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of each image times its factor."""
    of_images = x.view(len(factors), -1)
    out = torch.empty(of_images.shape, dtype=dtype, device=x.device)
    return torch.mul(of_images, factors[:, None], out=out).view(x.shape)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in a dtype that may be wider than theirs, then without a rounding to theirs."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b).to(dtype)
