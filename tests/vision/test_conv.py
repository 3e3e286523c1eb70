"""The convolution of channels-last images: what a compiler sees of it on a GPU is PyTorch's own."""

import pytest
import torch

from polymamba.vision.conv import Conv, channels_last_conv

CASES = [(3, 8, 3, 2, 1, 1), (6, 6, 3, 1, 1, 6), (3, 5, 4, 4, 0, 1)]  # inputs, outputs, size, stride, padding, groups


@pytest.mark.parametrize("case", CASES)
def test_operator_is_the_convolution(case):
    n_in, n_out, size, stride, padding, groups = case
    conv = Conv(n_in, n_out, size, stride, padding, groups=groups, bias=False).double()
    x = torch.randn(2, 9, 12, n_in, dtype=torch.float64, requires_grad=True)
    truth = conv(x)
    assert torch.equal(truth, torch.nn.functional.conv2d(
        x.movedim(-1, 1), conv.weight, None, stride, padding, 1, groups).movedim(1, -1))  # fmt: skip
    dy = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, (x, conv.weight), dy)
    compiled = torch.compile(channels_last_conv, fullgraph=True, backend="aot_eager", dynamic=True)
    for run in (channels_last_conv, compiled):
        y = run(x, conv.weight, stride, padding, groups)
        assert y.is_contiguous()
        assert torch.allclose(y, truth, rtol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(y, (x, conv.weight), dy), expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12)
        (of_weight,) = torch.autograd.grad(run(x.detach(), conv.weight, stride, padding, groups), conv.weight, dy)
        assert torch.allclose(of_weight, expected[1], rtol=1e-12)


@pytest.mark.gpu
def test_compiled_under_autocast():
    conv = Conv(8, 16, 3, 2, 1).cuda()
    x = torch.randn(2, 9, 12, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y, compiled = conv(x), torch.compile(conv, fullgraph=True)(x)
    assert compiled.dtype == y.dtype == torch.bfloat16
    assert (compiled - y).abs().max() <= 2**-7 * y.abs().max()
