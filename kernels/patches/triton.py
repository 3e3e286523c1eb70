"""An image's patches, side by side, times a matrix, with a bias and positions, in Triton: read once, written once.

A program has some patches and some columns of the result, and gathers what the patches see as it multiplies. Letters: B
batch, C channels of the image, P side of a patch, M patches of an image, L = M + 1 or M tokens, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import ceil_div, launch, load_float, multiply_add

PATCHES, COLUMNS, INPUTS = 128, 64, 64  # of a program, and what it multiplies at once
WARPS, STAGES = 4, 3


@triton.jit(do_not_specialize=["n_patches"])
def _patches(
    x, weight, bias, positions, y, n_patches, across, of_image, image_stride, channel_stride, row_stride, length, gap,
    n_inputs, n_columns,
    P: tl.constexpr, PATCHES: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_columns, COLUMNS)
    number = tl.program_id(0) // n_blocks * PATCHES + tl.arange(0, PATCHES)
    d = tl.program_id(0) % n_blocks * COLUMNS + tl.arange(0, COLUMNS)
    there, in_d = number < n_patches, d < n_columns
    image, patch = (number // of_image).to(tl.int64), number % of_image
    first = image * image_stride + patch // across * P * row_stride + patch % across * P
    total = tl.zeros((PATCHES, COLUMNS), tl.float32)
    for begin in range(0, n_inputs, INPUTS):
        k = begin + tl.arange(0, INPUTS)
        in_k = k < n_inputs
        seen = k // (P * P) * channel_stride + k // P % P * row_stride + k % P
        pixels = tl.load(x + (first[:, None] + seen[None, :]), mask=there[:, None] & in_k[None, :], other=0.0)
        of_k = tl.load(weight + d[None, :] * n_inputs + k[:, None], mask=in_k[:, None] & in_d[None, :], other=0.0)
        total = multiply_add(pixels, of_k, total)
    token = patch + (patch >= gap)
    inside = there[:, None] & in_d[None, :]
    total += load_float(bias, d[None, :], in_d[None, :])
    total += load_float(positions, token[:, None] * n_columns + d[None, :], inside)
    tl.store(y + (image * length + token)[:, None] * n_columns + d[None, :], total, mask=inside)


def embed_patches(x: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, gap: int) -> Tensor:
    """As of interface.py."""
    (n_images, _, height, width), size, x = x.shape, weight.shape[3], x.contiguous()
    (length, n_columns), across = positions.shape, width // size
    of_image = height // size * across
    y = torch.empty(n_images, length, n_columns, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        launch(
            _patches, ceil_div(n_images * of_image, PATCHES) * ceil_div(n_columns, COLUMNS), x, weight.contiguous(),
            bias, positions.contiguous(), y, n_images * of_image, across, of_image, *x.stride()[:3], length,
            gap if length > of_image else of_image, weight[0].numel(), n_columns, P=size, PATCHES=PATCHES,
            COLUMNS=COLUMNS, INPUTS=INPUTS, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return y
