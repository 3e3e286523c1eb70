"""Vim and VMamba against loops over tokens, in float64, from the papers' formulas: a second, naive way."""

import pytest
import torch
import torch.nn.functional as F

from polymamba.vision import Vim, VimConfig, VMamba, VMambaConfig
from polymamba.vision.config import V0


def vim(**changes) -> Vim:
    tiny = {"patch_size": 4, "embed_dim": 16, "depth": 2, "d_state": 3, "num_classes": 5, "img_size": (20, 28)}
    return Vim(VimConfig(**{**tiny, **changes})).eval()


def vmamba(**changes) -> VMamba:
    return VMamba(VMambaConfig(**{"depths": (1, 2), "embed_dim": 16, "num_classes": 5, **changes})).eval()


def naive_scan(x, dt, A, B, C, D):
    """x, dt (L, E), A (E, N), B, C (L, N), D (E,) -> (L, E)."""
    h, outputs = torch.zeros_like(A), []
    for t in range(len(x)):
        h = torch.exp(dt[t, :, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        outputs.append((h * C[t]).sum(1) + D * x[t])
    return torch.stack(outputs)


def naive_direction(ssm, x):
    """A direction of Vim's mixer, without the gate: x (L, E) in its order."""
    width = ssm.conv1d.weight.shape[-1]
    padded = torch.cat((x.new_zeros(width - 1, x.shape[1]), x))
    taps = [padded[k : k + len(x)] * ssm.conv1d.weight[:, 0, k] for k in range(width)]
    x = F.silu(sum(taps) + ssm.conv1d.bias)
    dt, B, C = (x @ ssm.x_proj.weight.T).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=1)
    dt = F.softplus(dt @ ssm.dt_proj.weight.T + ssm.dt_proj.bias)
    return naive_scan(x, dt, -ssm.A_log.exp(), B, C, ssm.D)


def naive_vim(model, image):
    """One image (C, H, W) -> logits (K,)."""
    c, rows = model.config, []
    n_down, n_across = ((side - c.patch_size) // c.step + 1 for side in image.shape[1:])
    for i in range(n_down):
        for j in range(n_across):
            y, x = i * c.step, j * c.step
            patch = image[:, y : y + c.patch_size, x : x + c.patch_size]
            weight = model.patch_embed.proj.weight
            rows.append((weight * patch).sum((1, 2, 3)) + model.patch_embed.proj.bias)
    at = len(rows) // 2
    rows.insert(at, model.cls_token[0, 0])
    stream = torch.stack(rows) + model.pos_embed[0]
    for block in model.layers:
        hidden = stream * stream.square().mean(1, keepdim=True).add(1e-5).rsqrt() * block.norm.weight
        x, z = (hidden @ block.mixer.in_proj.weight.T).chunk(2, dim=1)
        ahead = naive_direction(block.mixer.forwards, x)
        back = naive_direction(block.mixer.backwards, x.flip(0)).flip(0)
        stream = stream + ((ahead + back) / 2 * F.silu(z)) @ block.mixer.out_proj.weight.T
    token = stream[at]
    token = token * token.square().mean().add(1e-5).rsqrt() * model.norm_f.weight
    return model.head.weight @ token + model.head.bias


def roughened(model):
    """No parameter at a trivial value, in float64."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.double()


@pytest.mark.parametrize("changes", [{}, {"stride": 3}, {"img_size": (4, 16)}, {"img_size": (21, 9)}])
def test_vim_against_loops(changes):
    model = roughened(vim(**changes))
    images = torch.randn(2, 3, *model.config.img_size, dtype=torch.float64)
    logits = model(images)
    for image, row in zip(images, logits, strict=True):
        assert torch.allclose(row, naive_vim(model, image), rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_on_a_gpu(dtype):
    """There they are multiplied as a matrix; what is beyond the last whole patch is not seen."""
    model = roughened(vim(img_size=(21, 9)))
    images = torch.randn(3, 3, 21, 9, dtype=torch.float64)
    expected = model.patch_embed.proj(images)
    actual = model.patch_embed.to("cuda", dtype)(images.to("cuda", dtype))
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected).abs().max() / expected.abs().max()
    assert error < (1e-6 if dtype == torch.float32 else 1e-2)


def naive_block(block, x):
    """A block of VMamba on one image, (H, W, C)."""
    op, (height, width) = block.op, x.shape[:2]
    y = F.layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias, 1e-5) @ op.in_proj.weight.T
    z = None
    if op.gate:
        y, z = y.chunk(2, dim=-1)
    y = F.silu(F.conv2d(y.permute(2, 0, 1)[None], op.conv2d.weight, op.conv2d.bias, padding=1, groups=y.shape[-1]))
    y = y[0].permute(1, 2, 0)
    total, n_channels = torch.zeros_like(y), y.shape[-1]
    by_rows = [(i, j) for i in range(height) for j in range(width)]
    by_columns = [(i, j) for j in range(width) for i in range(height)]
    for k, order in enumerate((by_rows, by_columns, by_rows[::-1], by_columns[::-1])):
        sequence = torch.stack([y[place] for place in order])
        parts = sequence @ op.x_proj_weight[k].T
        dt, B, C = parts.split([op.dt_rank, op.d_state, op.d_state], dim=1)
        dt = F.softplus(dt @ op.dt_projs_weight[k].T + op.dt_projs_bias[k])
        mine = slice(k * n_channels, (k + 1) * n_channels)
        out = naive_scan(sequence, dt, -op.A_logs[mine].exp(), B, C, op.Ds[mine])
        for place, row in zip(order, out, strict=True):
            total[place] += row
    total = F.layer_norm(total, total.shape[-1:], op.out_norm.weight, op.out_norm.bias, 1e-5)
    x = x + (total if z is None else total * F.silu(z)) @ op.out_proj.weight.T
    if block.mlp is not None:
        y = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-5)
        y = F.gelu(y @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        x = x + y @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return x


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"d_state": 3, "ssm_ratio": 2.0}, V0])
@pytest.mark.parametrize("size", [(3, 5), (1, 6), (4, 1)])
def test_vmamba_block_against_loops(changes, size):
    block = roughened(vmamba(**changes)).layers[1].blocks[0]
    x = torch.randn(2, *size, 32, dtype=torch.float64)
    for image, row in zip(x, block(x), strict=True):
        assert torch.allclose(row, naive_block(block, image), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_patch_merging_order():
    """Of 2 x 2 pixels: down the first column, then down the second; odd sides padded below and to the right."""
    model = roughened(vmamba(**V0))
    merge, x = model.layers[0].downsample, torch.randn(1, 3, 5, 16, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    quarters = [padded[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert torch.allclose(merge(x), merge.reduction(merge.norm(torch.cat(quarters, dim=-1))))
