"""The LRU against minimal-LRU's (tests/golden/lru) and its recurrence in a loop."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from polymamba.core import LRU, Backbone, BackboneConfig, LRUConfig
from polymamba.core.lru import diagonal_scan

GOLDEN = Path(__file__).parents[1] / "golden" / "lru"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
WEIGHTS, IO = (load_file(GOLDEN / f"{name}.safetensors") for name in ("weights", "io"))


def close(ours: Tensor, truth: Tensor, tolerance: float):
    assert ours.shape == truth.shape
    error = (ours.to(truth.dtype) - truth).abs()
    assert error.max() <= tolerance * truth.abs().max(), f"{error.max():.2e} at {error.argmax().item()}"


def below(prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in WEIGHTS.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("dtype", "golden", "tolerance"), [(torch.float32, "out", 2e-5), (torch.float64, "out64", 1e-10)]
)
def test_golden_of_the_recurrence(dtype, golden, tolerance):
    """lru.*: the official LRU stands before the activation and the gate."""
    module = LRU(24, LRUConfig(n_states=32))
    module.load_state_dict(below("lru."), strict=False)
    module, x = module.to(dtype), IO["lru.input"].to(dtype)
    h, _ = diagonal_scan(module._driven(x), module.log_lambda)
    y = (h @ torch.complex(module.C_re, module.C_im).T).real + module.D * x
    close(y, IO[f"lru.{golden}"], tolerance)
    y.square().mean().backward()
    for name in below("lru."):
        close(module.get_parameter(name).grad, IO[f"lru.grad64.{name}"], tolerance)


class OfficialNet(torch.nn.Module):
    """minimal-LRU's classifier of a sequence, made of our parts."""

    def __init__(self):
        super().__init__()
        c = CONFIG["net"]
        n_states = CONFIG["lru"]["d_hidden"]
        config = BackboneConfig(
            d_model=c["d_model"],
            n_layer=c["n_layers"],
            pattern=("lru",),
            lru=LRUConfig(n_states=n_states),
            norm="layer",
            norm_eps=1e-6,
            final_norm=False,
        )
        self.encoder = torch.nn.Linear(CONFIG["d_input"], c["d_model"])
        self.backbone = Backbone(config)
        self.decoder = torch.nn.Linear(c["d_model"], c["d_output"])
        renamed = {"normalization.scale": "norm.weight", "normalization.bias": "norm.bias"}
        state = {}
        for key, tensor in below("net.").items():
            key = key.replace("encoder.encoder.", "encoder.").replace("encoder.layers_", "backbone.layers.")
            for old, new in {
                **renamed,
                "seq.": "mixer.",
                "out1.": "mixer.out_proj.",
                "out2.": "mixer.gate_proj.",
            }.items():
                key = key.replace(old, new)
            state[key.replace("kernel", "weight")] = tensor.T if key.endswith("kernel") else tensor
        self.load_state_dict(state)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.backbone(self.encoder(x))
        return hidden, F.log_softmax(self.decoder(hidden.mean(1)), -1)


def test_golden_of_a_whole_model():
    net, x = OfficialNet(), IO["net.input"]
    close(net(x)[1], IO["net.log_probs"], 2e-5)
    net = net.double()
    hidden, log_probs = net(x.double())
    close(hidden, IO["net.encoder_out64"], 1e-10)
    close(log_probs, IO["net.log_probs64"], 1e-10)
    log_probs.square().mean().backward()
    ours = {
        "decoder.kernel": net.decoder.weight.grad.T,
        "encoder.layers_1.normalization.scale": net.backbone.layers[1].norm.weight.grad,
        "encoder.layers_1.out1.kernel": net.backbone.layers[1].mixer.out_proj.weight.grad.T,
    }
    for name in ("gamma_log", "nu_log", "theta_log"):
        ours[f"encoder.layers_0.seq.{name}"] = net.backbone.layers[0].mixer.get_parameter(name).grad
    assert {f"net.grad64.{name}" for name in ours} == {key for key in IO if key.startswith("net.grad64.")}
    for name, gradient in ours.items():
        close(gradient, IO[f"net.grad64.{name}"], 1e-9)


# The scan


def by_loop(x: Tensor, log_decay: Tensor, state: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    """Sequences end to end in x (L, N), state (S, N)."""
    out, last = [], []
    for (start, end), h in zip(itertools.pairwise(ends), state, strict=True):
        for t in range(start, end):
            h = log_decay.exp() * h + x[t]
            out.append(h)
        last.append(h)
    return torch.stack(out) if out else x, torch.stack(last)


@pytest.mark.parametrize("ends", [[0, 1], [0, 37], [0, 5, 5, 6, 7, 37], [0, 0, 3, 3], [0, 0]])
@pytest.mark.parametrize("with_state", [False, True])
def test_scan_and_its_gradients(ends, with_state):
    generator = torch.Generator().manual_seed(3)

    def complex_(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.complex128)

    n_seqs = len(ends) - 1
    x, log_decay, state = complex_(ends[-1], 5), complex_(5), complex_(n_seqs, 5)
    log_decay.real.abs_().neg_()
    weights, last_weights, results = complex_(ends[-1], 5), complex_(n_seqs, 5), []
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    for run in ("scan", "loop"):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, log_decay, state)]
        given = leaves[2] if with_state else torch.zeros_like(state)
        if run == "loop":
            h, last = by_loop(leaves[0], leaves[1], given, ends)
        elif n_seqs == 1:
            h, last = diagonal_scan(leaves[0][None], leaves[1], given if with_state else None)
            h = h[0]
        else:
            h, last = diagonal_scan(leaves[0][None], leaves[1], given if with_state else None, cu_seqlens)
            h = h[0]
        total = (h * weights).real.sum() + (last * last_weights).real.sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        results.append([h, last, *gradients])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-11)


def test_long_memory_stays_accurate():
    """A decay near 1 over many steps, in float32, against float64."""
    x = torch.randn(1, 5000, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(2))
    log_decay = torch.complex(-torch.tensor([1e-5, 1e-4, 1e-3]).double(), torch.tensor([0.1, 1.0, 3.0]).double())
    log_decay = log_decay.to(torch.complex64).to(torch.complex128)
    truth, _ = by_loop(x[0], log_decay, torch.zeros(1, 3, dtype=torch.complex128), [0, 5000])
    h, _ = diagonal_scan(x.to(torch.complex64), log_decay.to(torch.complex64))
    close(h[0], truth, 1e-6)


# Initialisation


def test_begins_in_its_ring():
    torch.manual_seed(0)
    module = LRU(400, LRUConfig(n_states=4000, r_min=0.5, r_max=0.9, max_phase=math.pi / 10))
    decay = module.log_lambda.exp()
    radius, angle = decay.abs(), module.log_lambda.imag
    assert radius.min() >= 0.5 - 1e-5
    assert radius.max() <= 0.9 + 1e-5
    assert abs(radius.square().mean() - (0.25 + 0.81) / 2) < 0.01  # uniform by area
    assert angle.min() > 0
    assert math.pi / 10 * 0.99 < angle.max() <= math.pi / 10 + 1e-6
    close(module.gamma_log.exp().square() + radius.square(), torch.ones(4000), 1e-5)
    for weight, variance in ((module.B_re, 1 / 800), (module.B_im, 1 / 800), (module.C_re, 1 / 4000)):
        assert abs(weight.var() / variance - 1) < 0.02
    x = torch.randn(1, 3000, 400)
    h, _ = diagonal_scan(module._driven(x), module.log_lambda)
    size = h[:, 500:].abs().square().mean((0, 1))
    assert 0.7 < size.median() < 1.3  # gamma: white noise of variance 1 makes states of that size, whatever lambda


def test_edges_of_the_plane_are_finite():
    module = LRU(16, LRUConfig(r_min=0.0, r_max=1.0))
    assert all(p.isfinite().all() for p in module.parameters())
    assert module.log_lambda.exp().abs().max() < 1
    assert module.init_state(3).h.shape == (3, 16, 2)


def test_bf16_keeps_the_recurrence_in_float32():
    torch.manual_seed(0)
    module, x = LRU(16), torch.randn(2, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = module(x, return_state=True)
    assert (y.dtype, state.h.dtype) == (torch.bfloat16, torch.float32)
    close(y.float(), module(x), 0.05)
    half = module.bfloat16()
    y, state = half(x.bfloat16(), return_state=True)
    assert (y.dtype, state.h.dtype, half.init_state(1).h.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert half.step(x[:, 0].bfloat16(), state).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("n_states is 0; it must be at least 1, or None", {"n_states": 0}),
        ("r_min is 0.9, r_max 0.5; it must be 0 <= r_min < r_max <= 1", {"r_min": 0.9, "r_max": 0.5}),
        ("r_max 1.5", {"r_max": 1.5}),
        ("max_phase is 0; it must be above 0 and at most 2 pi", {"max_phase": 0}),
    ],
)
def test_says_what_is_wrong(message, options):
    with pytest.raises(ValueError, match=message):
        LRUConfig(**options)
