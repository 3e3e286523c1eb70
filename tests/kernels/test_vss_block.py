"""The Triton kernels of VMamba's block and stem, at odd sizes. The block itself: test_cross_scan_cuda_source.py."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from polymamba.kernels.vss_block import conv_norm_gelu, triton_conv, triton_mlp


def convolve(x, weight, bias=None, *, backend):
    height, width, channels = x.shape[1:]
    if backend == "torch":
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=channels)
        return F.silu(y).permute(0, 2, 3, 1)

    class Run(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, *bias):
            ctx.saved = x.flatten(0, 2), weight, *(bias or (None,))
            return triton_conv.forward(*ctx.saved, height, width).view(x.shape)

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias = ctx.saved
            sizes = [weight.numel()] if bias is None else [weight.numel(), len(bias)]
            shares = torch.empty(triton_conv.pieces_of(len(x))[0], sum(sizes), device=x.device)
            dx = triton_conv.backward_with_shares(dy.flatten(0, 2), x, weight, bias, height, width, shares)
            dweight, *dbias = shares.sum(0).split(sizes)
            return dx.view(dy.shape), dweight.view(weight.shape), *dbias

    return Run.apply(x, weight, *([] if bias is None else [bias]))


@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 35), (1, 1, 9, 3), (3, 4, 1, 64), pytest.param((1, 30, 41, 5), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("biased", [True, False])
def test_convolution(shape, biased, results_of, cast, assert_close):
    torch.manual_seed(1)
    tensors = {"x": torch.randn(shape, dtype=torch.float64), "weight": torch.randn(shape[3], 1, 3, 3).double()}
    if biased:
        tensors["bias"] = torch.randn(shape[3]).double()
    expected = results_of(convolve, tensors, "torch")
    assert_close(results_of(convolve, cast(tensors, torch.float32), "triton"), expected, 3e-6, shape)


@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 1, 1, 4), (1, 5, 8, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_stem(shape, last, device_of, assert_close):
    """Channels of the image first or last in memory."""
    torch.manual_seed(1)
    device = device_of("triton")
    x, weight = torch.randn(shape, device=device), torch.randn(12, shape[1], 3, 3, device=device)
    x = x.to(memory_format=torch.channels_last) if last else x
    bias, norm, norm_bias = torch.randn(3, 12, device=device)
    y = conv_norm_gelu(x, weight, bias, norm, norm_bias, 1e-5, torch.float32)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), 2, 1).permute(0, 2, 3, 1)
    truth = F.gelu(F.layer_norm(truth, (12,), norm.double(), norm_bias.double()))
    assert_close({"y": y.cpu()}, {"y": truth.cpu()}, 1e-5)


@pytest.mark.parametrize(("tokens", "channels", "piece"), [(5, 7, 128), (150, 130, 64), (33, 128, 32)])
def test_gelu_backward(tokens, channels, piece, device_of, assert_close):
    torch.manual_seed(1)
    device = device_of("triton")
    h = (3 * torch.randn(tokens, channels, device=device)).requires_grad_()
    dy = torch.randn(tokens, channels, device=device)
    shares = torch.full((-(-tokens // piece), channels + 3), torch.nan, device=device)
    y, dh = triton_mlp.gelu_backward(dy, h.detach(), shares[:, 3:], piece)
    exact = F.gelu(h.double())
    (expected,) = torch.autograd.grad(exact, h, dy.double())
    actual = {"y": y, "dh": dh, "sum": shares[:, 3:].sum(0)}
    assert_close(actual, {"y": exact, "dh": expected.double(), "sum": expected.double().sum(0)}, 3e-6)
