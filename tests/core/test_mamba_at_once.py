"""A Mamba block as one operation: the same as its parts, and its parts where one of them is special."""

from functools import partial

import pytest
import torch
from torch import nn

from polymamba.core import Backbone, BackboneConfig, Mamba, mamba_at_once
from polymamba.core.mamba import BiMamba

WIDTH = 12


@pytest.fixture
def calls(monkeypatch):
    """How often the block ran as one operation: a list that grows with each call."""
    pytest.importorskip("numba", exc_type=ImportError)
    found, run = [], mamba_at_once.mamba_block

    def counted(*args, **kwargs):
        found.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(mamba_at_once, "mamba_block", counted)
    return found


def results(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None, **options) -> dict[str, torch.Tensor]:
    """The output and all gradients; under autocast if a dtype is given."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = model(leaf, **options)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return {"y": y.detach(), "x": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}


def in_parts(model: nn.Module, *args, **options) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba_at_once, "serves", lambda *_: False)
        return results(model, *args, **options)


def assert_close(ours: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], tolerance: float):
    for name, x in plain.items():
        assert ours[name].dtype == x.dtype, name
        error = (ours[name] - x).abs().max() / x.abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


ENDS = torch.tensor([0, 5, 5, 19], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("mixer", [Mamba, BiMamba])
@pytest.mark.parametrize("options", [{}, {"cu_seqlens": ENDS}])
def test_equals_its_parts(mixer, options, dtype, calls):
    model, x = mixer(WIDTH, d_state=5), torch.randn(1 if options else 3, 19, WIDTH)
    ours = results(model, x, dtype, **options)
    assert len(calls) == 1
    assert_close(ours, in_parts(model, x, dtype, **options), 1e-5 if dtype is None else 2e-2)
    assert len(calls) == 1


def test_equals_its_parts_in_a_bfloat16_model(calls):
    model, x = Mamba(WIDTH, d_state=5).bfloat16(), torch.randn(3, 19, WIDTH).bfloat16()
    ours = results(model, x)
    assert len(calls) == 1
    assert_close(ours, in_parts(model, x), 2e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_backbone_with_padding(checkpointing, calls):
    model = Backbone(BackboneConfig(d_model=WIDTH, n_layer=2, d_state=5))
    model.gradient_checkpointing = checkpointing
    x, mask = torch.randn(3, 19, WIDTH), torch.arange(19) < torch.tensor([19, 7, 1])[:, None]
    ours = results(model, x, padding_mask=mask)
    assert len(calls) == (4 if checkpointing else 2)
    assert_close(ours, in_parts(model, x, padding_mask=mask), 1e-5)


class Adapted(nn.Linear):
    """A linear layer that adds 1."""

    def forward(self, x):
        return super().forward(x) + 1


def adapted(name: str, model: Mamba) -> None:
    part = getattr(model, name)
    other = Adapted(part.in_features, part.out_features, bias=part.bias is not None)
    other.load_state_dict(part.state_dict())
    setattr(model, name, other)


def hooked(name: str, kind: str, model: Mamba) -> None:
    getattr(getattr(model, name), kind)(lambda *_: None)


def biased(name: str, model: Mamba) -> None:
    part = getattr(model, name)
    part.bias = nn.Parameter(torch.randn(part.out_features))


def patched(model: Mamba) -> None:
    """As Accelerate's hooks do it."""
    forward = model.x_proj.forward
    model.x_proj.forward = lambda x: forward(x) + 1


SPECIAL = {
    **{f"{name} is an adapter": (partial(adapted, name), {"x_proj": 0, "dt_proj": 0}.get(name, 1))
       for name in ("in_proj", "x_proj", "dt_proj", "out_proj")},
    **{f"{name} has a bias": (partial(biased, name), {"x_proj": 0}.get(name, 1))
       for name in ("in_proj", "x_proj", "out_proj")},
    "a hook before": (partial(hooked, "x_proj", "register_forward_pre_hook"), 0),
    "a hook": (partial(hooked, "out_proj", "register_forward_hook"), 1),
    "a hook on the gradient": (partial(hooked, "in_proj", "register_full_backward_hook"), 1),
    "a forward of its own": (patched, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_special_parts_are_called(name, calls):
    """n_calls: 1 where what lies between the projections is still one operation."""
    make_special, n_calls = SPECIAL[name]
    model, x = Mamba(WIDTH, d_state=5), torch.randn(2, 7, WIDTH)
    usual = results(model, x)
    calls.clear()
    make_special(model)
    ours = results(model, x)
    assert len(calls) == n_calls
    assert_close(ours, in_parts(model, x), 1e-5)
    assert all(gradient is not None for gradient in ours.values())
    assert torch.equal(ours["y"], usual["y"]) == ("hook" in name)


@torch.no_grad()
@pytest.mark.parametrize("mixer", [Mamba, BiMamba])
def test_without_gradients(mixer, calls):
    model, x = mixer(WIDTH, d_state=5), torch.randn(3, 19, WIDTH)
    ours = model(x)
    assert len(calls) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba_at_once, "serves", lambda *_: False)
        assert torch.equal(model(x), ours)


@pytest.mark.parametrize(("part", "n_calls"), [("backwards.x_proj", 1), ("out_proj", 2), ("forwards", 2)])
def test_special_parts_of_two_directions(part, n_calls, calls):
    """A direction whose parts are as they were made is still one operation."""
    model, x, seen = BiMamba(WIDTH, d_state=5), torch.randn(2, 7, WIDTH), []
    model.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    ours = results(model, x)
    assert seen
    assert len(calls) == n_calls
    assert_close(ours, in_parts(model, x), 1e-5)


def test_a_factor_of_two_directions_beside_an_adapter(calls):
    model, x = BiMamba(WIDTH, d_state=5), torch.randn(2, 7, WIDTH)
    usual = model(x, scale=0.5)
    calls.clear()
    adapted("out_proj", model)
    assert_close(results(model, x, scale=0.5), in_parts(model, x, scale=0.5), 1e-5)
    assert len(calls) == 2
    with torch.no_grad():
        assert not torch.allclose(model(x, scale=0.5), usual)


def test_a_factor_of_two_directions(calls):
    model, x = BiMamba(WIDTH, d_state=5), torch.randn(2, 7, WIDTH)
    ours = results(model, x, scale=0.25)
    assert len(calls) == 1
    assert_close(ours, in_parts(model, x, scale=0.25), 1e-5)
    assert_close({"y": 4 * ours["y"]}, {"y": results(model, x)["y"]}, 1e-5)


def test_hooks_on_all_modules(calls):
    model, x, seen = Mamba(WIDTH), torch.randn(2, 7, WIDTH), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        results(model, x)
    finally:
        handle.remove()
    assert model.x_proj in seen
    assert not calls


def test_states_have_gradients(calls):
    """In and out: then the parts run one after another."""
    model, x = Mamba(WIDTH, d_state=5), torch.randn(2, 19, WIDTH)
    whole = results(model, x)
    assert len(calls) == 1

    def in_pieces(x):
        first, state = model(x[:, :8], return_state=True)
        return torch.cat((first, model(x[:, 8:], state)), 1)

    in_pieces.zero_grad, in_pieces.named_parameters = model.zero_grad, model.named_parameters
    assert_close(results(in_pieces, x), whole, 1e-5)
    assert len(calls) == 1


class Faster(Mamba):
    """Its formulas are not the block's."""

    A = property(lambda self: 2 * super().A)


def test_where_it_is_left_to_the_parts(calls):
    model, x = Mamba(WIDTH), torch.randn(2, 7, WIDTH)
    results(Faster(WIDTH), x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba_at_once, "serves", lambda *_: False)
        plain = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    results(Mamba(WIDTH).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):  # whose convolution is not in the products' dtype
        ours, _ = super(Mamba, model).forward(torch.randn(2, 7, 4 * WIDTH))
    assert ours.dtype == torch.float32
    assert not calls
    torch.testing.assert_close(compiled, plain)


def test_repeats_to_the_bit(calls):
    model, x = Mamba(WIDTH), torch.randn(3, 150, WIDTH)
    first, again = results(model, x), results(model, x)
    assert len(calls) == 2
    assert all(torch.equal(gradient, again[name]) for name, gradient in first.items())


@pytest.mark.parametrize("first", [1, 2, 11])
@torch.no_grad()
def test_onwards_from_states_equals_its_parts(first, monkeypatch):
    """A piece shorter than the convolution's window and a longer one, then one that goes on from its states."""
    pytest.importorskip("numba", exc_type=ImportError)
    model, x = Mamba(WIDTH, d_state=5), torch.randn(3, 19, WIDTH)

    def pieces() -> dict[str, torch.Tensor]:
        begun, state = model(x[:, :first], return_state=True)
        kept = [s.clone() for s in state]
        rest, after = model(x[:, first:], state, return_state=True)
        assert all(map(torch.equal, state, kept))  # it is not changed
        assert all(s.is_contiguous() for s in (*state, *after))  # a step works in place
        states = {f"{name} {when}": s for when, x in (("1", state), ("2", after)) for name, s in x._asdict().items()}
        return {"begun": begun, "rest": rest, **states}

    calls, run = [], mamba_at_once.mamba_block_onwards
    monkeypatch.setattr(mamba_at_once, "mamba_block_onwards", lambda *a, **k: calls.append(a) or run(*a, **k))
    ours = pieces()
    assert len(calls) == 2
    monkeypatch.setattr(mamba_at_once, "serves", lambda *_: False)
    assert_close(ours, pieces(), 2e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("wrong", [(2, WIDTH * 2, 3), (3, WIDTH * 2, 4), (3, WIDTH, 3)])
@torch.no_grad()
def test_states_of_the_wrong_shape_are_refused(wrong):
    model, x = Mamba(WIDTH), torch.randn(3, 7, WIDTH)
    state = model.init_state(3)
    for bad in (state._replace(conv=torch.zeros(wrong)), state._replace(ssm=torch.zeros(wrong))):
        with pytest.raises(ValueError, match="initial_state has shape"):
            model(x, bad, return_state=True)


@pytest.fixture
def with_norms(monkeypatch, calls):
    """How often a block ran with the norm before it: by two processors, of a kind that this is for."""
    from polymamba.kernels.numba_lanes import AVX512

    if not AVX512:
        pytest.skip("for a CPU with AVX-512")
    run, found = mamba_at_once.norm_and_mamba_block, []

    def counted(*args, **options):
        out = run(*args, **options)
        found.extend([] if out is None else [out])
        return out

    monkeypatch.setattr(mamba_at_once, "norm_and_mamba_block", counted)
    monkeypatch.setattr("polymamba.kernels.mamba_block.cpu.SHORTEST", 1)
    monkeypatch.setattr("polymamba.kernels.mamba_block.cpu._processors", lambda: 2)
    return found


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_with_the_norm_before_it(norm, with_norms, calls):
    """With and without a state, a batch and parts of it."""
    model = Backbone(BackboneConfig(d_model=64, n_layer=2, d_state=5, norm=norm)).eval()
    x = torch.randn(4, 120, 64)
    y, state = model(x, return_state=True)
    assert len(with_norms) == 2
    first, at_cut = model(x[:, :50], return_state=True)
    second = model(x[:, 50:], at_cut)
    assert len(with_norms) == 6
    assert torch.equal(torch.cat((first, second), 1), y)
    alone = [model(row[None], return_state=True) for row in x]
    assert len(with_norms) == 6
    assert len(calls) == 0  # with a state it is `mamba_block_onwards`
    assert_close({"y": y}, {"y": torch.cat([y for y, _ in alone])}, 1e-5)
    for layer, blocks in enumerate(zip(*(s for _, s in alone), strict=True)):
        for ours, theirs in zip(state[layer], zip(*blocks, strict=True), strict=True):
            assert_close({"state": ours}, {"state": torch.cat(theirs)}, 1e-5)


@torch.no_grad()
def test_with_the_norm_before_it_hooks_and_dropout_work(with_norms):
    model, x = Backbone(BackboneConfig(d_model=64, n_layer=1, d_state=5, dropout=0.5)), torch.randn(2, 30, 64)
    assert (model.layers[0](x, None)[0] == 0).float().mean() > 0.3
    assert len(with_norms) == 1
    model.eval()
    expected, block = model(x), model.layers[0]
    for module in (block.norm, block.mixer, block.mixer.in_proj, block.mixer.out_proj):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with_norms.clear()
        y = model(x)
        assert (len(seen), len(with_norms)) == (1, 0), module
        assert_close({"y": y}, {"y": expected}, 1e-5)
        handle.remove()
    model(x)
    assert len(with_norms) == 1


@torch.no_grad()
def test_with_the_norm_before_it_is_not_for_autocast_or_what_wraps_a_mixer(with_norms):
    model, x = Backbone(BackboneConfig(d_model=64, n_layer=1, d_state=5)).eval(), torch.randn(2, 30, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out, _, _ = model.layers[0](x, None)
    assert out.dtype == torch.bfloat16
    model.layers[0].mixer = torch.compile(model.layers[0].mixer, backend="eager")
    model(x)
    assert not with_norms
    with pytest.raises(ValueError, match="residual is"):
        Backbone(BackboneConfig(d_model=64, n_layer=1)).layers[0](x, x[:1])
