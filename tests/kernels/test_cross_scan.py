"""The 2-D scan against its definition in float64: forward and every gradient, at odd sizes, in every backend."""

import pytest
import torch

from polymamba.kernels import cross_scan, plain_operations
from polymamba.kernels.cross_scan.reference import scan_orders

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_weight", "dt_bias")


def inputs(batch=2, height=5, width=7, channels=6, states=1, rank=2):
    place = (batch, height, width)
    shapes = [
        (*place, channels),
        (*place, 4, rank),
        (4, channels, states),
        *((*place, 4, states),) * 2,
        (4, channels),
        (4, channels, rank),
        (4, channels),
    ]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors[2] = -tensors[2].exp()
    return tensors


def run(tensors, dtype, backend=None):
    device = "cuda" if backend == "cuda" else "cpu"
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in tensors]
    y = cross_scan(*leaves, backend=backend)
    loss = (y * torch.linspace(-1, 1, y.shape[-1], dtype=dtype, device=device)).sum()
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)  # of one pixel, A does nothing
    return [m.detach().cpu() for m in (y, *grads)]


def assert_all_close(ours, truth, tolerance):
    for name, o, t in zip(("y", *NAMES), ours, truth, strict=True):
        error = (o.double() - t).abs()
        assert error.max() <= tolerance * t.abs().max(), f"{name}: {error.max():.2e} at {error.argmax().item()}"


def test_orders_by_hand():
    """Of an image of 2 x 3 pixels:   0 1 2
    3 4 5"""
    assert scan_orders(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


@pytest.mark.parametrize("shape", [(5, 7), (1, 9), (8, 1), (1, 1), (16, 3)])
@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("backend", ["torch", "plain", None, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_against_the_definition(shape, states, backend):
    tensors = inputs(height=shape[0], width=shape[1], states=states)
    truth = run(tensors, torch.float64, "reference")
    if backend != "cuda":  # which takes no float64
        assert_all_close(run(tensors, torch.float64, backend), truth, 1e-12)
    assert_all_close(run(tensors, torch.float32, backend), truth, 2e-5)


def test_triton():
    tensors = inputs(batch=1, height=3, width=4)
    assert_all_close(run(tensors, torch.float32, "triton"), run(tensors, torch.float64, "reference"), 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "channels", "rank"), [((56, 56), 96, 6), ((23, 31), 100, 12), ((7, 7), 768, 48)])
def test_at_size_in_cuda(size, channels, rank):
    """Several rounds of several warps and blocks, in float32 and bf16; and the same bits again."""
    tensors = inputs(2, *size, channels, 1, rank)
    tensors[6] /= rank  # weights of dt
    truth = run(tensors, torch.float64, "torch")
    first = run(tensors, torch.float32, "cuda")
    assert_all_close(first, truth, 2e-5)
    assert all(torch.equal(x, y) for x, y in zip(first, run(tensors, torch.float32, "cuda"), strict=True))
    rounded = [x.bfloat16() for x in tensors]
    truth = run([x.double() for x in rounded], torch.float64, "torch")
    assert_all_close([x.double() for x in run(rounded, torch.bfloat16, "cuda")], truth, 2**-6)


@pytest.mark.gpu
def test_an_image_does_not_feel_its_batch():
    """A batch that fills a GPU, and an image by itself, whose directions have a block each."""
    tensors = [x.cuda().bfloat16() for x in inputs(40, 14, 14, 384, 1, 24)]
    alone = [x[7:8] if i in (0, 1, 3, 4) else x for i, x in enumerate(tensors)]
    assert torch.equal(cross_scan(*tensors)[7:8], cross_scan(*alone))


def test_bf16_sums_in_float32():
    tensors = [x.to(torch.bfloat16) for x in inputs()]
    tensors[2], tensors[5], tensors[7] = (tensors[i].float() for i in (2, 5, 7))
    y = cross_scan(*tensors)
    assert y.dtype == torch.float32
    truth = cross_scan(*(x.double() for x in tensors), backend="reference")
    assert (y.double() - truth).abs().max() <= 0.02 * truth.abs().max()


def test_wrong_shapes_are_named():
    tensors = inputs()
    tensors[4] = tensors[4][..., :3, :]
    with pytest.raises(ValueError, match=r"C has shape \(2, 5, 7, 3, 1\); expected \(2, 5, 7, 4, 1\)"):
        cross_scan(*tensors)


def test_plain_operations_hold_no_operator_of_ours():
    tensors = [x.float() for x in inputs(batch=1, height=3, width=4)]

    class Scan(torch.nn.Module):
        def forward(self, *tensors):
            return cross_scan(*tensors)

    with plain_operations():
        program = torch.export.export(Scan(), tuple(tensors))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators
    assert not [name for name in operators if "polymamba" in name]
    assert torch.allclose(program.module()(*tensors), cross_scan(*tensors), atol=1e-5)
