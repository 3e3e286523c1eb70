"""Patches with their positions by one kernel, at odd sizes."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from polymamba.kernels.patches import embed_patches


@pytest.mark.parametrize("gap", [None, 0, 4])
@pytest.mark.parametrize(("shape", "size", "columns"), [((2, 3, 13, 19), 4, 70), ((3, 1, 6, 9), 3, 5)])
def test_embed_patches(shape, size, columns, gap, device_of, assert_close):
    torch.manual_seed(1)
    device, dtype = device_of("triton"), torch.bfloat16
    x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(columns, shape[1], size, size, device=device)
    n_patches = shape[2] // size * (shape[3] // size)
    weight, bias = (weight / weight[0].numel() ** 0.5).to(dtype), torch.randn(columns, device=device).to(dtype)
    positions = torch.randn(n_patches + (gap is not None), columns, device=device).to(dtype)
    actual = embed_patches(x, weight, bias, positions, gap or 0)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), size).flatten(2).transpose(1, 2)
    patches = [i for i in range(len(positions)) if i != gap]
    assert_close({"y": actual[:, patches]}, {"y": exact + positions[patches].double()}, torch.finfo(dtype).eps)
