"""When a block of VMamba runs as one operation, and that this is then the same."""

import pytest
import torch

from polymamba.kernels.vss_block import vss_block_reference
from polymamba.vision import VMamba, vss_at_once
from polymamba.vision.config import VMambaConfig


@pytest.fixture
def runs(monkeypatch):
    """Calls of the operation, whose definition runs in its place, as on a GPU."""
    found = []

    def counted(x, weights, **options):
        found.append(options)
        return vss_block_reference(x, weights, **options)

    monkeypatch.setattr(vss_at_once, "serves", lambda x, weights, dtype: True)
    monkeypatch.setattr(vss_at_once, "vss_block", counted)
    return found


def block(**changes):
    config = VMambaConfig(**{"embed_dim": 6, "depths": (1, 2), "num_classes": 3, "ssm_ratio": 2.0, **changes})
    last = VMamba(config).double().layers[1].blocks[1].eval()
    with torch.no_grad():
        for parameter in last.parameters():
            parameter += torch.randn_like(parameter) / 4
    return last


@pytest.mark.parametrize("conv_bias", [False, True])
def test_the_same_as_by_parts(conv_bias, runs):
    ours, x = block(conv_bias=conv_bias), torch.randn(2, 3, 4, 12, dtype=torch.float64)
    results = []
    for run in (ours, ours.by_parts):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        inputs = leaf, *ours.parameters()
        results.append((y, *torch.autograd.grad((y * x.flip(0)).sum(), inputs)))
    assert len(runs) == 1
    for at_once, by_parts in zip(*results, strict=True):
        torch.testing.assert_close(at_once, by_parts, rtol=1e-10, atol=1e-10)


def test_drop_path_draws_a_factor_for_each_image_and_half(runs):
    ours, x = block(drop_path_rate=0.5), torch.randn(400, 1, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        ours.train()(x)
        ours.eval()(x)
    factors = runs[0]["factors"]
    assert factors.shape == (2, 400)
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    assert (factors[0] != factors[1]).any()
    assert abs(factors.mean().item() - 1) < 0.15
    assert runs[1]["factors"] is None


class Doubled(torch.nn.Linear):
    """An adapter."""

    def forward(self, x):
        return 2 * super().forward(x)


def replaced(ours, name: str):
    old = ours.get_submodule(name)
    new = Doubled(old.in_features, old.out_features, bias=old.bias is not None).double()
    new.load_state_dict(old.state_dict())
    ours.set_submodule(name, new)


SPECIAL = {
    "an adapter": lambda ours: replaced(ours, "op.in_proj"),
    "an adapter of the MLP": lambda ours: replaced(ours, "mlp.fc2"),
    "a hook of the scan": lambda ours: ours.op.register_forward_hook(lambda *_: None),
    "a hook of a norm": lambda ours: ours.op.out_norm.register_forward_pre_hook(lambda *_: None),
    "a hook of the MLP": lambda ours: ours.mlp.register_full_backward_hook(lambda *_: None),
    "another forward": lambda ours: setattr(ours.norm2, "forward", ours.norm2.forward),
    "another eps": lambda ours: setattr(ours.norm2, "eps", 1e-3),
    "no drop path of timm's": lambda ours: setattr(ours, "drop_path", torch.nn.Tanh()),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_parts_are_called(name, runs):
    ours, x = block(), torch.randn(1, 2, 3, 12, dtype=torch.float64)
    ours(x)
    assert len(runs) == 1
    SPECIAL[name](ours)
    torch.testing.assert_close(ours(x), ours.by_parts(x))
    assert len(runs) == 1


@pytest.mark.parametrize("changes", [{"d_state": 2}, {"gate": True}, {"mlp_ratio": 0.0}])
def test_other_blocks_run_by_parts(changes, runs):
    block(**changes)(torch.randn(1, 2, 3, 12, dtype=torch.float64))
    assert not runs


def test_a_hook_of_all_modules_sees_the_parts(runs):
    ours, seen = block(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        ours(torch.randn(1, 2, 3, 12, dtype=torch.float64))
    finally:
        handle.remove()
    assert ours.op.in_proj in seen
    assert not runs


@pytest.mark.gpu
def test_a_model_on_a_gpu(monkeypatch):
    """Float32: results and gradients within 2e-5 of those by parts, and the same bits again."""
    torch.manual_seed(0)
    model = VMamba(VMambaConfig(embed_dim=32, depths=(1, 2), num_classes=10)).cuda()
    images = torch.randn(3, 3, 61, 84, device="cuda")

    def run():
        model.zero_grad()
        y = model(images)
        (y * torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape)).sum().backward()
        with torch.no_grad():
            return [y, model(images), *(p.grad.clone() for p in model.parameters())]

    results = [run(), run()]
    monkeypatch.setattr("polymamba.vision.vmamba.at_once", lambda *_: None)
    monkeypatch.setattr("polymamba.vision.vmamba.ConvStem.at_once", lambda *_: False)
    for at_once, again, by_parts in zip(*results, run(), strict=True):
        assert torch.equal(at_once, again)
        assert (at_once - by_parts).abs().max() <= 2e-5 * by_parts.abs().max()


@pytest.mark.gpu
def test_a_compiler_sees_one_operator_a_block():
    model = VMamba(VMambaConfig(embed_dim=32, depths=(1, 2), num_classes=10)).cuda().eval()
    images, seen = torch.randn(2, 3, 64, 64, device="cuda"), []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)(images)
        assert (compiled - model(images)).abs().max() <= 1e-5 * compiled.abs().max()
    assert seen.count("polymamba.vss_block.default") == 3
    assert "polymamba.conv_norm_gelu.default" in seen
    assert "polymamba.channels_last_conv.default" in seen
