"""Models on a GPU: official numbers, one compiled graph, decoding, bf16 training."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import polymamba
from polymamba.core import Backbone, BackboneConfig

pytestmark = pytest.mark.gpu
GOLDEN = Path(__file__).parents[1] / "golden"


def close(ours: torch.Tensor, truth: torch.Tensor, tolerance: float = 2e-5):
    error = (ours.double().cpu() - truth.double().cpu()).abs().max() / truth.double().abs().max().cpu()
    assert error <= tolerance, f"{error:.2e}"


@pytest.fixture
def golden():
    folder = GOLDEN / "mamba1_lm"
    model = polymamba.convert(
        "mamba-ssm", load_file(folder / "weights.safetensors"), json.loads((folder / "config.json").read_text())
    )
    return model.cuda(), {name: x.cuda() for name, x in load_file(folder / "io.safetensors").items()}


def test_golden_logits_and_gradients(golden):
    model, io = golden
    logits = model(io["input_ids"])
    close(logits, io["out.logits"])
    logits.square().mean().backward()
    parameters = dict(model.named_parameters())
    for key in (k for k in io if k.startswith("grad.") and "embedding" not in k):
        close(parameters[key.removeprefix("grad.")].grad, io[key])


@torch.no_grad()
def test_golden_decode(golden):
    model, io = golden
    logits, state = model(io["input_ids"][:, :5], return_state=True)
    close(logits, io["out.decode_p5.prefill_logits"])
    steps = torch.stack([model.step(io["input_ids"][:, t], state) for t in range(5, 23)], dim=1)
    close(steps, io["out.decode_p5.step_logits"])
    close(state[2].ssm, io["out.decode_p5.ssm_state_final.2"])


HYBRID, OTHERS = ("mamba", "attention", "mlp"), ("mamba", "moe", "lru")


@pytest.mark.parametrize("pattern", [("mamba",), ("bimamba",), HYBRID, OTHERS])
def test_compiles_in_one_graph(pattern):
    torch.compiler.reset()  # it compiles the same code for so many models only
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(d_model=72, n_layer=len(pattern) + 1, n_heads=3, pattern=pattern)).cuda()
    x = torch.randn(3, 131, 72, device="cuda")
    mask = (torch.arange(131) < torch.tensor([131, 64, 1])[:, None]).cuda()
    compiled = torch.compile(model, fullgraph=True)
    close(compiled(x, padding_mask=mask), model(x, padding_mask=mask))
    gradients, target = [], torch.randn_like(x)
    for run in (compiled, model):
        model.zero_grad()
        (run(x) * target).sum().backward()  # not a norm of y: norm_f fixes that, and its gradient is rounding
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, truth in zip(*gradients, strict=True):
        close(ours, truth, 1e-4)


@pytest.mark.parametrize("pattern", [("mamba",), HYBRID, ("lru",)])
def test_padding_and_bf16(pattern):
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(d_model=64, n_layer=3, n_heads=2, pattern=pattern)).cuda()
    x = torch.randn(3, 70, 64, device="cuda")
    mask = (torch.arange(70) >= torch.tensor([0, 30, 69])[:, None]).cuda()
    y = model(x, padding_mask=mask)
    for row in range(3):
        close(y[row, mask[row]], model(x[row : row + 1, mask[row]])[0])
    with torch.autocast("cuda", torch.bfloat16):
        half = model(x, padding_mask=mask)
    close(half, y, 5e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pattern", "bf16"),
    [(HYBRID, False), (HYBRID, True), (OTHERS, False), (("mamba+moe",), False)],  # in bf16 a token may go elsewhere
)
def test_hybrid_in_pieces_and_steps(pattern, bf16):
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(d_model=64, n_layer=3, n_heads=2, pattern=pattern)).cuda()
    x = torch.randn(3, 90, 64, device="cuda")
    whole, tolerance = model(x), 5e-2 if bf16 else 2e-5
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        first, state = model(x[:, :33], return_state=True)
        second, state = model(x[:, 33:70], state, return_state=True)
        steps = torch.stack([model.step(x[:, t], state) for t in range(70, 90)], 1)
        close(torch.cat((first, second, steps), 1), whole, tolerance)
        ends = torch.tensor([0, 40, 41, 90], dtype=torch.int32, device="cuda")
        packed = model(x[:1], cu_seqlens=ends)
        alone = [model(x[:1, a:b]) for a, b in ((0, 40), (40, 41), (41, 90))]
        close(packed, torch.cat(alone, 1), tolerance)


def test_two_backwards_are_bitwise_equal():
    torch.manual_seed(0)
    model = Backbone(BackboneConfig(d_model=64, n_layer=2, pattern=("bimamba",))).cuda()
    x = torch.randn(5, 300, 64, device="cuda")
    gradients = []
    for _ in range(2):
        model.zero_grad()
        F.mse_loss(model(x), x).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
