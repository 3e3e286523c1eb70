"""Context parallelism: a sequence in pieces on 2 and 4 processes is the sequence on one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from polymamba.core import Backbone, BackboneConfig
from polymamba.core.parallel import all_pieces, context_parallel, own_piece

LENGTH = 60
PACK = (0, 7, 7, 30, 31, 47, LENGTH)  # of 4 pieces of 15 (2 of 30): ends at a border, empty, spans two, of one token


def case(pattern, layout, dtype=torch.float32):
    """A backbone and inputs of the whole length: x (B, L, D), keyword arguments, targets."""
    torch.manual_seed(3)
    backbone = Backbone(BackboneConfig(d_model=16, n_layer=2, d_state=3, pattern=pattern)).to(dtype)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no bias is left zero
    batch = 1 if layout == "packed" else 3
    x = torch.randn(batch, LENGTH, 16, dtype=dtype)
    options = {}
    if layout == "packed":
        options["cu_seqlens"] = torch.tensor(PACK, dtype=torch.int32)
    if layout == "padded":
        places = torch.arange(LENGTH)
        first, last = torch.tensor([[0], [16], [44]]), torch.tensor([[31], [60], [46]])
        options["padding_mask"] = (places >= first) & (places < last)
    return backbone, x, options, torch.randn(batch, LENGTH, 16, dtype=dtype)


def gradients(backbone, x, dx):
    named = {name: p.grad for name, p in backbone.named_parameters()}
    return {**named, "x": dx}


def whole(backbone, x, options, target):
    x = x.clone().requires_grad_()
    y = backbone(x, **options)
    F.mse_loss(y, target).backward()
    return y.detach(), gradients(backbone, x, x.grad)


def in_pieces(backbone, x, options, target):
    x = x.clone().requires_grad_()
    with context_parallel(dist.group.WORLD) as context:
        if "padding_mask" in options:
            options = {"padding_mask": own_piece(options["padding_mask"])}
        y = backbone(own_piece(x), **options)
        F.mse_loss(y, own_piece(target)).backward()
        y = all_pieces(y.detach())
    found = gradients(backbone, x, x.grad)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= context.size
    return y, found


CASES = [
    (("mamba",), "rows"),
    (("mamba",), "packed"),
    (("mamba",), "padded"),
    (("bimamba",), "rows"),
    (("bimamba",), "packed"),
    (("bimamba",), "padded"),
    (("mamba", "mlp", "bimamba"), "rows"),
]


def all_cases():
    """{case: {tensor: largest error, over the largest number of its truth}}, and of float64."""
    errors = {}
    for pattern, layout in CASES:
        for dtype in (torch.float32, torch.float64):
            y, truth = whole(*case(pattern, layout, dtype))
            found_y, found = in_pieces(*case(pattern, layout, dtype))
            pairs = {"y": (y, found_y)} | {name: (truth[name], found[name]) for name in truth}
            for name, (a, b) in pairs.items():
                errors[pattern, layout, str(dtype), name] = float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
    return errors


@pytest.mark.parametrize("n", [2, 4])
def test_pieces_are_the_whole(n, in_processes):
    for errors in in_processes(n, all_cases):
        for (pattern, layout, dtype, name), error in errors.items():
            assert error < (1e-5 if dtype == "torch.float32" else 1e-12), (pattern, layout, dtype, name, error)
