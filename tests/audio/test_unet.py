"""The U-Net in pieces, in steps, in rows of unlike lengths: always as if each sequence had been read at once."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from polymamba.audio import PRESETS, AudioConfig, AudioModel, UNet, UNetConfig
from polymamba.core import select_state

POOLS = [(4, 4), (2, 2), (16, 16), (2, 4), (3,), ()]
SHAPES = [
    {"layout": "unet", "stages": ("mamba",)},
    {"layout": "sashimi", "stages": ("s4d+mlp", "mamba")},
    {"layout": "unet", "stages": ("s4", "mlp")},
]


def unet(pool=(2, 4), **options) -> UNet:
    torch.manual_seed(0)
    options = {"d_model": 6, "n_blocks": 2, "d_state": 3, "s4_state": 4, "norm": "layer", **options}
    model = UNet(UNetConfig(pool=pool, **{k: v[: len(pool) + 1] if k == "stages" else v for k, v in options.items()}))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name or "pools" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10):
    assert a.shape == b.shape
    if a.numel():
        error = (a - b).abs()
        assert error.max() <= tolerance * b.abs().max().clamp(min=1.0), f"{error.max():.2e} at {error.argmax()}"


def close_states(a, b):
    for ours, theirs in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        close(ours, theirs)


def sequences(batch: int, length: int) -> torch.Tensor:
    return torch.randn(batch, length, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_steps_are_the_whole(pool, shape):
    model = unet(pool, **shape)
    length = 2 * model.config.period + 3
    x = sequences(2, length)
    whole, after = model(x, return_state=True)
    state = model.init_state(2)
    close(torch.stack([model.step(x[:, t], state) for t in range(length)], 1), whole)
    close_states(state, after)
    close(model(x), whole)


@pytest.mark.parametrize("pool", [(2, 2), (2, 4), (4, 4), (16, 16)])
@torch.no_grad()
def test_a_prompt_of_any_length_then_steps_then_a_piece(pool):
    model = unet(pool)
    period = model.config.period
    length = 2 * period + 3
    x = sequences(1, length)
    whole, after = model(x, return_state=True)
    places = range(1, length - 1) if period < 32 else (1, 15, 16, 17, 100, 255, 256, 257, 300, 511, 513)
    for at in places:
        first, state = model(x[:, :at], return_state=True)
        kept = pytree.tree_map(torch.clone, state)
        rest, end = model(x[:, at:], state, return_state=True)
        close_states(state, kept)  # forward changed nothing
        close(torch.cat((first, rest), 1), whole)
        close_states(end, after)
        stepped = [model.step(x[:, t], state) for t in range(at, min(at + period + 1, length))]
        close(torch.stack(stepped, 1), whole[:, at : at + len(stepped)])


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_rows_of_unlike_lengths_and_phases(shape):
    """Padded rows, continued by padded rows, continued by steps: each as if it were alone."""
    model, lengths, more = unet((2, 4), **shape), (19, 7, 1, 8), (3, 13, 0, 21)
    x, y = sequences(4, 19), sequences(4, 21)
    mask = torch.arange(19) < torch.tensor(lengths)[:, None]
    first, state = model(x.masked_fill(~mask[..., None], torch.nan), return_state=True, padding_mask=mask)
    mask2 = torch.arange(21) >= 21 - torch.tensor(more)[:, None]  # on the left
    second, after = model(y, state, return_state=True, padding_mask=mask2)
    token = sequences(4, 1)[:, 0]
    third = model.step(token, after)
    for row in range(4):
        joined = torch.cat((x[row, : lengths[row]], y[row, 21 - more[row] :], token[row : row + 1]))
        alone = model(joined[None])[0]
        ours = torch.cat((first[row, : lengths[row]], second[row, 21 - more[row] :], third[row : row + 1]))
        close(ours, alone)
    assert (first[~mask] == 0).all()
    assert (second[~mask2] == 0).all()


@torch.no_grad()
def test_a_state_that_was_continued_stays_what_it_was():
    """Even where a piece was too short for the rates within to move, and steps then work in place."""
    model, x = unet(), sequences(2, 60)
    _, state = model(x[:, :13], return_state=True)
    kept = pytree.tree_map(torch.clone, state)
    _, after = model(x[:, 13:14], state, return_state=True)
    for t in range(14, 40):
        model.step(x[:, t], after)
    for now, before in zip(pytree.tree_leaves(state), pytree.tree_leaves(kept), strict=True):
        assert torch.equal(now, before)


@torch.no_grad()
def test_a_fork():
    model, x = unet(), sequences(2, 30)
    _, state = model(x[:, :13], return_state=True)
    forked = select_state(state, [1, 0, 1])
    steps = torch.stack([model.step(x[[1, 0, 0], t], forked) for t in range(13, 30)], 1)
    _, state = model(x[:, :13], return_state=True)
    close(steps[:2], model(x[[1, 0]])[:, 13:])
    mixed = torch.cat((x[1:, :13], x[:1, 13:]), 1)
    close(steps[2:], model(mixed)[:, 13:])


@pytest.mark.parametrize("pool", [(4, 4), (2, 4)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_causal(pool, shape):
    model, x = unet(pool, **shape), sequences(1, 40)
    whole = model(x)
    for t in range(40):
        changed = x.clone()
        changed[:, t:] += torch.arange(6)  # a constant would be lost on a LayerNorm
        close(model(changed)[:, :t], whole[:, :t])
        assert (model(changed)[:, t] - whole[:, t]).abs().max() > 1e-6


def test_every_input_is_seen_within_and_gradients_are_those_of_each_row():
    model, x = unet((2, 4)), sequences(1, 40).requires_grad_()
    model(x)[0, -1].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    mask = torch.arange(19) < torch.tensor([19, 6])[:, None]
    x, weights = sequences(2, 19), sequences(2, 19)

    def gradients(run):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        run(twin).backward()
        return [p.grad for p in twin.parameters()]

    padded = gradients(lambda m: (m(x, padding_mask=mask) * weights)[mask].sum())
    alone = gradients(lambda m: (m(x[:1]) * weights[:1]).sum() + (m(x[1:, :6]) * weights[1:, :6]).sum())
    for a, b in zip(padded, alone, strict=True):
        close(a, b)
    model.gradient_checkpointing = True
    for a, b in zip(gradients(lambda m: (m(x, padding_mask=mask) * weights)[mask].sum()), padded, strict=True):
        close(a, b)


@pytest.mark.parametrize(("preset", "published"), [("sc09-small", 6.1), ("sc09-large", 24.3), ("youtubemix", 3.5)])
def test_published_sizes(preset, published):
    """Millions of parameters in tables 4 and 9 of arXiv 2312.00752, which seem to leave A out."""
    with torch.device("meta"):
        model = AudioModel(AudioConfig(unet=PRESETS[preset], input="float"))
        n = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("A_log"))
    assert abs(n / 1e6 - published) < 0.12, n


def test_settings_that_cannot_be():
    for options, message in (
        ({"pool": (4, 1)}, r"pool is \(4, 1\); each must be at least 2"),
        ({"layout": "vnet"}, "layout is 'vnet'; it must be one of unet, sashimi"),
        ({"stages": ("mamba+bimamba",)}, "a mixer of stages is 'bimamba'; it must be one of mamba, s4d"),
        ({"stages": ("mamba",) * 4}, "give 1 to 3 for pool"),
        ({"n_blocks": 0}, "n_blocks is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            UNetConfig(**{"d_model": 8, "n_blocks": 1, **options})
