"""The mixture of experts against llm-random's layer (tests/golden/moe_layer): outputs, losses, gradients, drops."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from polymamba.core import MoE, MoEConfig, aux_loss

GOLDEN = Path(__file__).parents[1] / "golden" / "moe_layer"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
CASES = ["switch_nodrop", "switch_cap1.first", "top2_gated", "old_relu_nodrop"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def close(ours: Tensor, truth: Tensor, tolerance: float):
    assert ours.shape == truth.shape
    error, scale = (ours.double() - truth.double()).abs(), truth.double().abs().max()
    assert error.max() <= tolerance * scale, f"{error.max() / scale:.2e} at {error.argmax().item()}"


def official(case: str) -> tuple[MoE, dict[str, Tensor]]:
    """Our layer with the case's weights, in training mode, and the case's tensors."""
    name = case.removesuffix(".first")
    c, weights = CONFIG[name], load_file(GOLDEN / "weights.safetensors")
    io = {
        key.removeprefix(f"{case}."): tensor
        for key, tensor in load_file(GOLDEN / "io.safetensors").items()
        if key.startswith(f"{case}.") or key == "input"
    }
    gated = c["inner"] == "gated"
    config = MoEConfig(
        n_experts=c["n_experts"],
        top_k=c["routing_top_k"],
        d_expert=c["expert_size"],
        expert="swiglu" if gated else "relu",
        capacity_factor=c["capacity_factor"],
        balance_weight=c["lb"],
        z_weight=c["z"],
    )
    module = MoE(c["dmodel"], config)
    given = {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}
    router = next(tensor for key, tensor in given.items() if key.endswith("gate"))
    in_proj = given["expert_inner_function.lin1_weight"]
    if gated:
        in_proj = torch.cat((given["expert_inner_function.gate_weight"], in_proj), -1)
    module.load_state_dict(
        {
            "router.weight": router.T,
            "in_proj.weight": in_proj,
            "out_proj.weight": given["expert_inner_function.lin2_weight"],
        }
    )
    return module, io


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "prefix", "tolerance"), [(torch.float32, "out", 2e-5), (torch.float64, "out64", 1e-10)]
)
def test_golden_outputs_and_losses(case, dtype, prefix, tolerance):
    module, io = official(case)
    module, x = module.to(dtype), io["input"].to(dtype)
    close(module(x), io[f"{prefix}.y"], tolerance)
    close(aux_loss(module), io[f"{prefix}.lb_loss"][0] + io.get(f"{prefix}.z_loss", torch.zeros(1))[0], tolerance)
    routes = module.router(x.flatten(0, 1))
    close(routes.probabilities, io[f"{prefix}.router_probs"], tolerance)
    assert torch.equal(routes.experts, io["out.expert_index"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
def test_golden_gradients(case, dtype, tolerance, device):
    module, io = official(case)
    module, io = module.to(device, dtype), {key: tensor.to(device) for key, tensor in io.items()}
    x = io["input"].to(dtype).requires_grad_()
    close(module(x), io["out64.y"], tolerance)
    (module(x).square().mean() + aux_loss(module)).backward()
    close(x.grad, io["grad64.x"], tolerance)
    in_proj = io["grad64.expert_inner_function.lin1_weight"]
    if (gate := io.get("grad64.expert_inner_function.gate_weight")) is not None:
        in_proj = torch.cat((gate, in_proj), -1)
    close(module.in_proj.weight.grad, in_proj, tolerance)
    close(module.out_proj.weight.grad, io["grad64.expert_inner_function.lin2_weight"], tolerance)
    router = next(tensor for key, tensor in io.items() if key.startswith("grad64.") and key.endswith(".gate"))
    close(module.router.weight.grad.T, router, tolerance)


def test_golden_of_what_is_dropped():
    """Which tokens over capacity stay is the first ones; that of torch.topk's ties is unspecified, their number not."""
    module, io = official("switch_cap1.first")
    y = module(io["input"]).flatten(0, 1)
    kept = io["out.kept_token_expert"].sum(1)
    assert torch.equal((y != 0).any(1).long(), kept)
    assert 0 < kept.sum() < len(kept)
    module.eval()
    assert (module(io["input"]) != 0).any(-1).all(), "a token was dropped in evaluation"
