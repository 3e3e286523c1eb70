"""The backbone against its plain twins: each row alone, each sequence alone, one shot, step by step."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from polymamba.core import Backbone, BackboneConfig, KVCache, Mamba, MoEConfig, aux_loss
from polymamba.core.config import MIXERS
from polymamba.core.norm import AddRMSNorm

LENGTHS = (19, 7, 1, 0)
# Every mixer, then mixtures: a mixer that is added to MIXERS is tested here without more ado.
PATTERNS = [
    *((name,) for name in MIXERS),
    *(("attention", "mlp"), ("mamba", "attention", "mlp"), ("mamba", "moe"), ("mamba+moe",), ("lru+attention", "mlp")),
    ("bimamba", "mlp"),
]
CAUSAL = [pattern for pattern in PATTERNS if "bimamba" not in pattern]
WIDTH = 24  # moe takes multiples of 8 only


def backbone(**options) -> Backbone:
    torch.manual_seed(0)
    moe = MoEConfig(n_experts=5, top_k=2, d_expert=16)
    shape = {"d_model": WIDTH, "n_layer": 3, "d_state": 5, "n_heads": 2, "moe": moe}
    return Backbone(BackboneConfig(**{**shape, **options}))


def inputs(batch: int = 4, length: int = 19, d_model: int = WIDTH) -> torch.Tensor:
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(1))


def mask_of(lengths, side: str, length: int = 19) -> torch.Tensor:
    steps = torch.arange(length)
    rows = torch.tensor(lengths)[:, None]
    return {"right": steps < rows, "left": steps >= length - rows, "both": (steps >= 2) & (steps < 2 + rows)}[side]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-6):
    assert a.shape == b.shape
    if a.numel():
        assert (a - b).abs().max() <= tolerance * b.detach().abs().max().clamp(min=1.0)


def remembered(state) -> list[torch.Tensor]:
    """A state of one row by what it stands for: of a cache what is in it, not the room."""
    parts = pytree.tree_leaves(state, is_leaf=lambda part: isinstance(part, KVCache))
    held = [(x.keys[:, : x.length], x.values[:, : x.length]) if isinstance(x, KVCache) else x for x in parts]
    return pytree.tree_leaves(held)


def row_of(state, row: int):
    return pytree.tree_map(lambda s: s[row : row + 1], state)


def close_states(ours, expected):
    for a, b in zip(remembered(ours), remembered(expected), strict=True):
        close(a, b)


def test_layer_norm_backbone_is_the_stack_of_its_parts():
    model, x = backbone(norm="layer", norm_eps=1e-3).double(), inputs().double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    stream = x
    for block in model.layers:
        norm = block.norm
        stream = stream + block.mixer(F.layer_norm(stream, (WIDTH,), norm.weight, norm.bias, 1e-3))
    norm = model.norm_f
    close(model(x), F.layer_norm(stream, (WIDTH,), norm.weight, norm.bias, 1e-3), 1e-12)
    state = model.init_state(len(x))
    with torch.no_grad():
        steps = [model.step(x[:, t], state) for t in range(x.shape[1])]
    close(torch.stack(steps, 1), model(x), 1e-12)
    with pytest.raises(ValueError, match="norm is 'batch'; it must be one of rms, layer"):
        BackboneConfig(d_model=12, n_layer=3, norm="batch")


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing(side, pattern):
    model, x = backbone(pattern=pattern), inputs()
    lengths = [min(n, 17) for n in LENGTHS] if side == "both" else LENGTHS
    mask = mask_of(lengths, side)
    causal = "bimamba" not in pattern
    out = model(x.masked_fill(~mask[..., None], 1e4), padding_mask=mask, return_state=causal)
    y, state = out if causal else (out, None)
    assert torch.all(y[~mask] == 0)
    for row in range(len(lengths)):
        alone = model(x[row : row + 1, mask[row]], return_state=causal)
        y_alone, state_alone = alone if causal else (alone, None)
        close(y[row, mask[row]], y_alone[0])
        if causal:
            close_states(row_of(state, row), state_alone)
    if causal:
        token = x[:, 0]
        unwatched = pytree.tree_map(torch.clone, state)
        stepped = model.step(token, state)
        with torch.no_grad():  # where a block's step may be one kernel
            close(model.step(token, unwatched), stepped)
        for row in range(len(lengths)):
            again = torch.cat((x[row, mask[row]], token[row : row + 1]))
            close(stepped[row], model(again[None])[0, -1])


@pytest.mark.parametrize("pattern", CAUSAL)
def test_padding_changes_no_gradient(pattern):
    model, x = backbone(pattern=pattern), inputs()
    mask = mask_of(LENGTHS, "left")

    weights = torch.randn_like(x[mask])  # a norm of y would not do: norm_f fixes it, whatever the parameters

    def gradients(run) -> list[torch.Tensor]:
        twin = copy.deepcopy(model)
        (run(twin) * weights).sum().backward()
        return [p.grad for p in twin.parameters()]

    padded = gradients(lambda m: m(x, padding_mask=mask)[mask])
    alone = gradients(lambda m: torch.cat([m(x[i : i + 1, mask[i]])[0] for i in range(4)]))
    for a, b in zip(padded, alone, strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("pattern", CAUSAL)
def test_padding_with_a_state_given(pattern):
    model, x = backbone(pattern=pattern), inputs()
    _, state = model(x[:, :5], padding_mask=mask_of((5, 2, 0, 3), "right", 5), return_state=True)
    mask = mask_of((14, 3, 0, 9), "left", 14)
    y, after = model(x[:, 5:], state, padding_mask=mask, return_state=True)
    for row in range(4):
        y_alone, after_alone = model(x[row : row + 1, 5:][:, mask[row]], row_of(state, row), return_state=True)
        close(y[row, mask[row]], y_alone[0])
        close_states(row_of(after, row), after_alone)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_equals_each_alone(pattern):
    model, x = backbone(pattern=pattern), inputs(1, 30)
    ends = [0, 11, 11, 12, 30]
    y = model(x, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    for start, end in itertools.pairwise(ends):
        close(y[:, start:end], model(x[:, start:end]))


@pytest.mark.parametrize("pattern", CAUSAL)
def test_pieces_and_steps_equal_one_shot(pattern):
    model, x = backbone(pattern=pattern), inputs()
    whole, final = model(x, return_state=True)
    first, state = model(x[:, :2], return_state=True)  # shorter than the convolution
    kept = pytree.tree_map(torch.clone, state)
    second, state2 = model(x[:, 2:9], state, return_state=True)
    for given, before in zip(pytree.tree_leaves(state), pytree.tree_leaves(kept), strict=True):
        assert torch.equal(given, before), "forward changed the state it was given"
    steps = torch.stack([model.step(x[:, t], state2) for t in range(9, 19)], dim=1)
    close(torch.cat((first, second, steps), dim=1), whole)
    for row in range(4):
        close_states(row_of(state2, row), row_of(final, row))


@pytest.mark.parametrize("watched", [True, False])  # by autograd: else a block's step may be one kernel
@pytest.mark.parametrize("max_length", [None, 19])
@pytest.mark.parametrize("pattern", CAUSAL)
def test_steps_from_the_initial_state(pattern, max_length, watched):
    model, x = backbone(pattern=pattern), inputs()
    state = model.init_state(4, max_length)
    with torch.set_grad_enabled(watched):
        steps = torch.stack([model.step(x[:, t], state) for t in range(19)], dim=1)
    close(steps, model(x))


@pytest.mark.parametrize("pattern", CAUSAL)
def test_checkpointing_changes_neither_keys_nor_gradients(pattern):
    model, x = backbone(dropout=0.2, pattern=pattern), inputs()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing = True
    assert twin.state_dict().keys() == model.state_dict().keys()
    for m in (model, twin):
        torch.manual_seed(3)
        m(x)[:, :, :5].sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("pattern", CAUSAL)
def test_causal(pattern):
    model, x = backbone(pattern=pattern), inputs()
    changed = x.clone()
    changed[:, 12:] += 1
    # The last bits of a matrix product change with how many tokens an expert gets, those of an FFT with any input.
    tolerance = 1e-6 if {"moe", "s4", "s4d"} & set(model.config.mixers) else 0.0
    close(model(x)[:, :12], model(changed)[:, :12], tolerance)


@pytest.mark.parametrize(
    "pattern",
    [
        ("mamba",),
        ("bimamba",),
        pytest.param(("mamba", "attention", "mlp"), marks=pytest.mark.slow),
        ("mamba", "moe", "lru"),
        pytest.param(("mamba+moe",), marks=pytest.mark.slow),
    ],
)
def test_compiles_in_one_graph(pattern):
    torch.compiler.reset()  # it compiles the same code for so many models only
    model, x = backbone(pattern=pattern, n_layer=len(pattern)), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = mask_of(LENGTHS, "right")
    close(compiled(x, padding_mask=mask), model(x, padding_mask=mask))
    weights = torch.randn_like(x)
    (compiled(x) * weights).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(x) * weights).sum().backward()
    for a, p in zip(gradients, model.parameters(), strict=True):
        close(a, p.grad, 2e-5)


def test_initialisation_is_mamba_ssms():
    torch.manual_seed(0)
    block = Mamba(64)
    assert block.state_dict().keys() == {
        *("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight"),
        *("dt_proj.weight", "dt_proj.bias", "out_proj.weight"),
    }
    assert torch.allclose(block.A, -torch.arange(1.0, 17.0).expand(128, 16))
    assert torch.all(block.D == 1)
    dt = nn.functional.softplus(block.dt_proj.bias)
    assert dt.min() >= 1e-3 - 1e-6
    assert dt.max() <= 1e-1 + 1e-6
    assert 0.01 * 0.6 < dt.log().mean().exp() < 0.01 * 1.6  # log-uniform: the middle is the geometric mean
    assert block.dt_proj.weight.abs().max() <= 4**-0.5
    undecayed = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert undecayed == {"A_log", "D", "dt_proj.bias"}
    deep, shallow = backbone(n_layer=16), backbone(n_layer=1)
    ratio = shallow.layers[0].mixer.out_proj.weight.std() / deep.layers[0].mixer.out_proj.weight.std()
    assert 3.6 < ratio < 4.4


def test_initialisation_of_attention_and_mlp():
    mixers = [block.mixer for block in backbone(d_model=128, n_layer=16, pattern=("attention", "mlp")).layers[:2]]
    for mixer in mixers:
        assert 0.019 < mixer.in_proj.weight.std() < 0.021
        assert 0.019 / 4 < mixer.out_proj.weight.std() < 0.021 / 4


def test_residual_stream_stays_float32():
    model = backbone().to(torch.bfloat16)
    seen = []
    model.layers[1].register_forward_hook(lambda _, args, out: seen.append((args[1].dtype, out[1].dtype)))
    y, state = model(inputs().to(torch.bfloat16), return_state=True)
    assert seen == [(torch.float32, torch.float32)]
    assert y.dtype == torch.bfloat16
    assert state[0].ssm.dtype == torch.float32


@pytest.mark.parametrize("pattern", PATTERNS)
def test_under_autocast_the_norm_rounds_what_autocast_would(pattern, monkeypatch):
    """To the bit, gradients too; and only for mixers that do nothing with it but project it."""
    model, x, seen, forward = backbone(pattern=pattern), inputs(2, 7), [], AddRMSNorm.forward
    for block in model.layers:
        block.mixer.register_forward_pre_hook(lambda mixer, args: seen.append((mixer.projects_input, args[0].dtype)))
    results = []
    for plainly in (False, True):
        if plainly:  # as if every mixer had other uses for its input
            monkeypatch.setattr(AddRMSNorm, "forward", lambda self, x, stream, **_: forward(self, x, stream))
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(leaf)
            y.float().square().sum().backward()
        results.append((y, leaf.grad, *(p.grad for p in model.parameters())))
        model.zero_grad()
        dtypes = {dtype for projects, dtype in seen if projects}
        assert dtypes <= ({torch.float32} if plainly else {torch.bfloat16})
        assert {dtype for projects, dtype in seen if not projects} <= {torch.float32}
        seen.clear()
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


def test_says_what_is_wrong():
    model, x = backbone(), inputs()
    holes = torch.ones(4, 19, dtype=torch.bool)
    holes[2, 5] = False
    with pytest.raises(ValueError, match="one run"):
        model(x, padding_mask=holes)
    cu_seqlens = torch.tensor([0, 19], dtype=torch.int32)
    with pytest.raises(ValueError, match="batch of 1"):
        model(x, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="no padding_mask"):
        model(x[:1], cu_seqlens=cu_seqlens, padding_mask=holes[:1])
    for pattern in (("mamba", "bimamba"), ("attention+bimamba",)):
        refuses_a_state(backbone(pattern=pattern), x)


def refuses_a_state(both_ways: Backbone, x: torch.Tensor):
    for call in (
        lambda: both_ways(x, return_state=True),
        lambda: both_ways.init_state(4),
        lambda: both_ways.step(x[:, 0], []),
    ):
        with pytest.raises(ValueError, match="bidirectional"):
            call()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("transformer.*mamba, bimamba, s4d, s4, lru, attention, mlp, moe, or several", {"pattern": ("transformer",)}),
        (r"names \['moo'\]; its entries are", {"pattern": ("mamba+moo",)}),
        (r"names \[''\]; its entries are", {"pattern": ("mamba+",)}),
        ("n_heads is 3; it must divide d_model, which is 20", {"n_heads": 3}),
        ("n_heads is 3; it must divide d_model, which is 200", {"d_model": 200}),
        ("n_heads is 4: of d_model 20 each head has 5 channels, and RoPE needs an even number", {"n_heads": 4}),
        ("n_heads is 0; it must be at least 1", {"n_heads": 0}),
        ("d_ff is -1; it must be at least 1", {"d_ff": -1}),
        ("mlp is 'relu'; it must be one of swiglu, gelu", {"mlp": "relu"}),
        ("rope_theta is 0; it must be above 0 and finite, or None", {"rope_theta": 0}),
    ],
)
def test_says_what_is_wrong_with_a_config(message, options):
    with pytest.raises(ValueError, match=message):
        BackboneConfig(**{"d_model": 20, "n_layer": 1, "pattern": ("attention", "mlp"), **options})


def test_attentions_settings_bind_attention_alone():
    BackboneConfig(d_model=20, n_layer=1, n_heads=3)  # does not divide 20: of no matter without attention
    BackboneConfig(d_model=20, n_layer=1, n_heads=4, pattern=("attention",), rope_theta=None)  # RoPE wants even heads
    with pytest.raises(ValueError, match="n_heads"):
        BackboneConfig(d_model=20, n_layer=1, n_heads=3, pattern=("attention",))


def test_aux_loss_counts_each_module_once():
    class WithLoss(nn.Module):
        def forward(self, x):
            self.aux_loss = x.mean()
            return x

    model = nn.Sequential(WithLoss(), WithLoss())
    assert aux_loss(model) == 0.0
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    for module in model:
        torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
    assert aux_loss(model).item() == 4.0
