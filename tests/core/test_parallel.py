"""Context parallelism: a sequence in pieces on 2 and 4 processes is the sequence on one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from polymamba.core import Backbone, BackboneConfig
from polymamba.core.parallel import context_parallel, gathered, own_piece

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


def gradients(backbone, dx):
    named = {name: p.grad for name, p in backbone.named_parameters()}
    return {**named, "x": dx}


def whole(backbone, x, options, target):
    x = x.clone().requires_grad_()
    y = backbone(x, **options)
    F.mse_loss(y, target).backward()
    return y.detach(), gradients(backbone, x.grad)


def in_pieces(backbone, x, options, target):
    x = x.clone().requires_grad_()
    with context_parallel(dist.group.WORLD) as context:
        if "padding_mask" in options:
            options = {"padding_mask": own_piece(options["padding_mask"])}
        y = backbone(own_piece(x), **options)
        F.mse_loss(y, own_piece(target)).backward()
        y = torch.cat(list(gathered(y.detach(), context.group)), 1)
    found = gradients(backbone, x.grad)
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


def all_cases(*dtypes):
    """{(case, tensor): largest error, over the largest number of its truth}."""
    errors = {}
    for pattern, layout in CASES:
        for dtype in dtypes:
            y, truth = whole(*case(pattern, layout, dtype))
            found_y, found = in_pieces(*case(pattern, layout, dtype))
            pairs = {"y": (y, found_y)} | {name: (truth[name], found[name]) for name in truth}
            for name, (a, b) in pairs.items():
                errors[pattern, layout, str(dtype), name] = float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
    return errors


@pytest.mark.parametrize(("n", "dtypes"), [(2, [torch.float32, torch.float64]), (4, [torch.float32])])
def test_pieces_are_the_whole(n, dtypes, in_processes):
    for errors in in_processes(n, all_cases, *dtypes):
        for (pattern, layout, dtype, name), error in errors.items():
            assert error < (1e-5 if dtype == "torch.float32" else 1e-12), (pattern, layout, dtype, name, error)


def stacked(n_steps=3):
    """FSDP2 over all 4 processes, 2 of which share each sequence; blocks recomputed; backward out of the context."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    backbone, x, _, target = case(("mamba", "bimamba"), "rows")
    x, target = torch.cat((x, x.flip(2)))[:4], torch.cat((target, target.flip(1)))[:4]
    alone, *_ = case(("mamba", "bimamba"), "rows")
    backbone.gradient_checkpointing = True
    for block in backbone.layers:
        fully_shard(block, mesh=mesh["data", "context"]._flatten())
    fully_shard(backbone, mesh=mesh["data", "context"]._flatten())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (backbone, alone)]
    losses = []
    row = mesh.get_local_rank("data")
    for _ in range(n_steps):
        with context_parallel(mesh["context"]):
            y = backbone(own_piece(x[2 * row : 2 * row + 2]))
            loss = F.mse_loss(y, own_piece(target[2 * row : 2 * row + 2]))
        loss.backward()
        dist.all_reduce(loss.detach())  # in place
        truth = F.mse_loss(alone(x), target)
        truth.backward()
        losses.append((loss.item() / 4, truth.item()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(backbone.parameters(), alone.parameters(), strict=True)
    return losses, max((p.full_tensor() - q).abs().max().item() for p, q in pairs)


def test_with_fsdp_and_recomputed_blocks(in_processes):
    for losses, worst_weight in in_processes(4, stacked):
        for found, truth in losses:
            assert found == pytest.approx(truth, abs=1e-5)
        assert losses[-1][1] < losses[0][1]
        assert worst_weight < 1e-5


def refusals():
    """What each misuse says; and whether what runs outside is the same to the bit after a context as before."""
    backbone, x, _, _ = case(("mamba",), "rows")
    before = backbone(x)
    said = {}

    def attempt(name, run):
        try:
            run()
        except ValueError as error:
            said[name] = str(error)

    with context_parallel(dist.group.WORLD):
        attempt("divide", lambda: own_piece(x[:, :-1]))
        attempt("state", lambda: backbone(x, return_state=True))
        attempt("padded state", lambda: backbone(x, return_state=True, padding_mask=x[..., 0] < 1e9))
        attempt("short", lambda: backbone(x[:, :2]))
        attempt("attention", lambda: case(("mamba", "attention"), "rows")[0](x))
    return said, torch.equal(backbone(x), before)


def test_refusals(in_processes):
    for said, same in in_processes(2, refusals):
        assert said["divide"].startswith("length 59 does not divide among 2 processes")
        assert "takes no state" in said["state"]
        assert "takes no state" in said["padded state"]
        assert said["short"].startswith("pieces of 2 tokens are shorter than the convolution's reach of 3")
        assert said["attention"].startswith("context_parallel: attention cannot be cut")
        assert same
