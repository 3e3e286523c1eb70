"""The feed-forward mixer against its formula."""

import math

import pytest
import torch

from polymamba.core import MLP, BackboneConfig


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_is_its_formula(activation):
    torch.manual_seed(0)
    mlp, x = MLP(7, 11, activation).double(), torch.randn(2, 5, 7, dtype=torch.float64)
    inner = x @ mlp.in_proj.weight.T
    if activation == "swiglu":
        gate, up = inner[..., :11], inner[..., 11:]
        inner = gate / (1 + torch.exp(-gate)) * up
    else:
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    expected = inner @ mlp.out_proj.weight.T
    y, state = mlp(x, return_state=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(mlp.step(x[:, 3], state), expected[:, 3], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("d_model", "swiglu", "gelu"), [(96, 256, 384), (100, 320, 400), (1024, 2752, 4096)])
def test_default_widths(d_model, swiglu, gelu):
    widths = [BackboneConfig(d_model=d_model, n_layer=1, mlp=name).ff_width for name in ("swiglu", "gelu")]
    assert widths == [swiglu, gelu]
    assert BackboneConfig(d_model=d_model, n_layer=1, d_ff=7).ff_width == 7
