"""The MLP as one operation against timm's, and timm's where one of its parts is special."""

import pytest
import timm.layers
import torch

from polymamba.vision import mlp
from polymamba.vision.mlp import Mlp


def results(module, x, dtype, forward):
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = forward(leaf)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return {"y": y.detach(), "x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize(
    ("own", "autocast", "tolerance"),
    [(torch.float64, None, 1e-14), (torch.float32, torch.bfloat16, 2e-2), (torch.bfloat16, None, 2e-2)],
)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (0, 7)])
def test_equals_timms(own, autocast, tolerance, shape):
    module, x = Mlp(7, 13).to(own), torch.randn(shape, dtype=own)
    ours = results(module, x, autocast, module)
    for name, expected in results(module, x, autocast, lambda x: timm.layers.Mlp.forward(module, x)).items():
        assert ours[name].dtype == expected.dtype, name
        if expected.numel():
            error = (ours[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"{name}: {error:.1e}"


def test_keeps_one_wide_tensor():
    module, x, kept = Mlp(7, 130), torch.randn(11, 7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert sum(t.shape == (11, 130) for t in kept) == 1


class Doubled(torch.nn.Linear):
    """An adapter."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_special_parts_are_called(monkeypatch):
    module, x = Mlp(7, 13), torch.randn(4, 7)
    usual = module(x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), usual)
    seen = []
    handle = module.act.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(module(x), usual)
    assert seen
    handle.remove()
    other = Doubled(7, 13)
    other.load_state_dict(module.fc1.state_dict())
    module.fc1 = other
    torch.testing.assert_close(module(x), timm.layers.Mlp.forward(module, x))
    monkeypatch.setattr(mlp, "_Mlp", None)
    compiled = torch.compile(Mlp(7, 13), backend="aot_eager", fullgraph=True)
    assert compiled(x).shape == x.shape
