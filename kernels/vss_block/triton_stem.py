"""gelu(norm(conv(x))) in Triton, of an image with a few channels: 3 x 3 with stride 2, to some tens of channels.

A program gathers what a tile of pixels sees, (pixel, channel and tap), and multiplies that by the weights; all channels
of a pixel are in it, so that the norm is there, too. The image may lie in memory in any order.
Letters: B batch, C channels of the image, D channels of the result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..norm.triton import _statistics
from ..triton_runtime import ceil_div, launch, load_float, multiply_add

PIXELS = 64  # of a program


@triton.jit
def _normal_share(x):
    """The share of a normal distribution below x, off by up to 1e-7: Abramowitz and Stegun 7.1.26 for erfc."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    half = 0.5 * series * tl.exp2(z * z * -1.4426950408889634)
    return tl.where(x < 0.0, half, 1.0 - half)


@triton.jit(do_not_specialize=["n_pixels"])
def _stem(
    x, weight, bias, norm, norm_bias, y, eps, n_pixels, height, width, out_height, out_width, image_stride,
    channel_stride, row_stride, column_stride, n_inputs, n_channels,
    PIXELS: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    k, d = tl.arange(0, INPUTS), tl.arange(0, BLOCK)
    row = (pixel // out_width % out_height * 2 - 1)[:, None] + (k // 3 % 3)[None, :]
    column = (pixel % out_width * 2 - 1)[:, None] + (k % 3)[None, :]
    there = (pixel < n_pixels)[:, None] & (k < n_inputs)[None, :]
    there = there & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    image = (pixel // (out_width * out_height)).to(tl.int64)[:, None] * image_stride
    at = image + row * row_stride + column * column_stride + (k // 9)[None, :] * channel_stride
    seen = tl.load(x + at, mask=there, other=0.0)
    in_d = (d < n_channels)[None, :]
    weights = tl.load(weight + d[None, :] * n_inputs + k[:, None], mask=in_d & (k < n_inputs)[:, None], other=0.0)
    dtype = y.dtype.element_ty
    total = multiply_add(seen.to(dtype), weights.to(dtype), tl.zeros((PIXELS, BLOCK), tl.float32))
    total += load_float(bias, d[None, :], in_d)
    inside = (pixel < n_pixels)[:, None] & in_d
    normed, _ = _statistics(tl.where(inside, total, 0.0), inside, n_channels, eps, True)
    out = normed * load_float(norm, d[None, :], in_d) + load_float(norm_bias, d[None, :], in_d)
    tl.store(y + pixel.to(tl.int64)[:, None] * n_channels + d[None, :], out * _normal_share(out), mask=inside)


def run(
    x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor, norm_bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    n_images, _, height, width = x.shape
    out_height, out_width, n_channels = (height + 1) // 2, (width + 1) // 2, len(weight)
    y = torch.empty(n_images, out_height, out_width, n_channels, dtype=dtype, device=x.device)
    n_pixels, n_inputs = n_images * out_height * out_width, weight[0].numel()
    with torch.cuda.device_of(x):
        launch(
            _stem, ceil_div(n_pixels, PIXELS), x, weight.contiguous(), bias, norm, norm_bias, y, eps, n_pixels, height,
            width, out_height, out_width, *x.stride(), n_inputs, n_channels, PIXELS=PIXELS,
            INPUTS=max(triton.next_power_of_2(n_inputs), 16), BLOCK=max(triton.next_power_of_2(n_channels), 16),
            num_warps=4,
        )  # fmt: skip
    return y
