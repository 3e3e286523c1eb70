"""Official checkpoints through polymamba.convert against what the official code computed (tests/golden)."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import polymamba
from polymamba.core import InputError, aux_loss

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = {"mamba1_lm": "mamba-ssm", "mamba_hf": "hf-mamba"}
OUR_NAME = {"backbone.embedding.weight": "embedding.weight", "backbone.embeddings.weight": "embedding.weight"}


def load(case: str):
    config = json.loads((GOLDEN / case / "config.json").read_text())
    return config, load_file(GOLDEN / case / "weights.safetensors"), load_file(GOLDEN / case / "io.safetensors")


@pytest.fixture(params=KINDS)
def case(request):
    config, weights, io = load(request.param)
    return request.param, polymamba.convert(KINDS[request.param], weights, config), io


def assert_close(name: str, ours: torch.Tensor, golden: torch.Tensor, tolerance: float):
    error = (ours.double() - golden.double()).abs()
    scale = golden.double().abs().max()
    assert error.max() <= tolerance * scale, f"{name}: {error.max() / scale:.2e} at {error.argmax().item()}"


@pytest.mark.parametrize(
    ("dtype", "prefix", "tolerance"), [(torch.float32, "out", 2e-5), (torch.float64, "out64", 1e-9)]
)
def test_logits(case, dtype, prefix, tolerance):
    _, model, io = case
    with torch.no_grad():
        assert_close("logits", model.to(dtype)(io["input_ids"]), io[f"{prefix}.logits"], tolerance)


@pytest.mark.parametrize(
    ("dtype", "prefix", "tolerance"), [(torch.float32, "grad", 2e-5), (torch.float64, "grad64", 1e-9)]
)
def test_gradients(case, dtype, prefix, tolerance):
    _, model, io = case
    model = model.to(dtype)
    model(io["input_ids"]).pow(2).mean().backward()
    parameters = dict(model.named_parameters())
    golden = {k.removeprefix(f"{prefix}."): v for k, v in io.items() if k.startswith(f"{prefix}.")}
    assert golden
    for name, gradient in golden.items():
        assert_close(name, parameters[OUR_NAME.get(name, name)].grad, gradient, tolerance)


@torch.no_grad()
def decode(model, tokens, n_prefill):
    """Prefill, then one token a step: (logits of the prefill, state after it, logits of the steps, final state)."""
    logits, state = model(tokens[:, :n_prefill], return_state=True)
    after_prefill = [type(layer)(*(x.clone() for x in layer)) for layer in state]
    steps = [model.step(tokens[:, t], state) for t in range(n_prefill, tokens.shape[1])]
    return logits, after_prefill, torch.stack(steps, 1), state


def assert_states(state, golden: dict, conv_key: str, ssm_key: str, tolerance: float):
    for i, layer in enumerate(state):
        # The official caches hold one input more than the convolution needs.
        assert_close(f"conv {i}", layer.conv, golden[f"{conv_key}.{i}"][..., 1:], tolerance)
        assert_close(f"ssm {i}", layer.ssm, golden[f"{ssm_key}.{i}"], tolerance)


def test_decode_mamba_ssm():
    config, weights, io = load("mamba1_lm")
    model = polymamba.convert("mamba-ssm", weights, config)
    prefill, after, steps, final = decode(model, io["input_ids"], 5)
    assert_close("prefill", prefill, io["out.decode_p5.prefill_logits"], 2e-5)
    assert_close("steps", steps, io["out.decode_p5.step_logits"], 2e-5)
    prefix = "out.decode_p5"
    assert_states(after, io, f"{prefix}.conv_state_after_prefill", f"{prefix}.ssm_state_after_prefill", 2e-5)
    assert_states(final, io, f"{prefix}.conv_state_final", f"{prefix}.ssm_state_final", 2e-5)
    _, _, steps, final = decode(model, io["input_ids"], 2)  # a prompt shorter than the convolution
    assert_close("steps", steps, io["out.decode_p2.step_logits"], 2e-5)
    assert_states(final, io, "out.decode_p2.conv_state_final", "out.decode_p2.ssm_state_final", 2e-5)
    _, _, steps, final = decode(model.double(), io["input_ids"], 5)
    assert_close("steps", steps, io["out64.decode_p5.step_logits"], 1e-9)
    assert_states(final, io, "out64.decode_p5.conv_state_final", "out64.decode_p5.ssm_state_final", 1e-9)


def test_decode_hf():
    config, weights, io = load("mamba_hf")
    model = polymamba.convert("hf-mamba", weights, config)
    prefill, after, steps, final = decode(model, io["input_ids"], 6)
    assert_close("prefill", prefill, io["out.prefill_logits"], 2e-5)
    assert_close("steps", steps, io["out.step_logits"], 2e-5)
    assert_states(after, io, "out.cache_prefill.conv_state", "out.cache_prefill.ssm_state", 2e-5)
    assert_states(final, io, "out.cache_final.conv_state", "out.cache_final.ssm_state", 2e-5)
    with torch.no_grad():
        masked = model(io["input_ids"], padding_mask=io["attention_mask"].bool())
    real = io["attention_mask"].bool()
    assert_close("padded", masked[real], io["out.logits_masked"][real], 2e-5)


@pytest.mark.parametrize(("name", "key"), [("mamba1_lm", "gen.greedy_sequences"), ("mamba_hf", "gen.sequences")])
def test_greedy_tokens(name, key):
    config, weights, io = load(name)
    model = polymamba.convert(KINDS[name], weights, config)
    golden = io[key]
    tokens = golden[:, :6]
    with torch.no_grad():
        logits, state = model(tokens, return_state=True)
        logits = logits[:, -1]
        while tokens.shape[1] < golden.shape[1]:
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
            logits = model.step(tokens[:, -1], state)
    assert torch.equal(tokens, golden)


def test_saves_and_loads(case, tmp_path):
    _, model, io = case
    model.save_pretrained(tmp_path)
    again = polymamba.core.LanguageModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(io["input_ids"]), model(io["input_ids"]))


def test_report_of_what_does_not_fit():
    config, weights, _ = load("mamba1_lm")
    weights["backbone.layers.0.mixer.extra"] = torch.zeros(1)
    weights["backbone.layers.1.norm.weight"] = torch.zeros(3)
    del weights["backbone.norm_f.weight"]
    with pytest.raises(InputError, match=r"no place for backbone.layers.0.mixer.extra") as error:
        polymamba.convert("mamba-ssm", weights, config)
    assert "no tensor for backbone.norm_f.weight" in str(error.value)
    assert "backbone.layers.1.norm.weight is (3,), not (48,)" in str(error.value)
    with pytest.raises(ValueError, match="not one of mamba-ssm, hf-mamba"):
        polymamba.convert("gpt", weights, config)
    with pytest.raises(InputError, match="Mamba2"):
        polymamba.convert("mamba-ssm", weights, {**config, "ssm_cfg": {"layer": "Mamba2"}})


# MoE-Mamba: its golden's loss is the training loss, auxiliary losses included

OF_BLOCK = {"residual_mamba": 0, "residual_feedforward": 1}
OF_PART = {
    "pre_norm.weight": "norm.weight",
    "mamba.": "mixer.",
    "feedforward.gating.gate": "mixer.router.weight",
    "feedforward.expert_inner_function.lin1_weight": "mixer.in_proj.weight",
}


def moe_mamba():
    config, weights, io = load("moe_mamba")
    return polymamba.convert("moe-mamba", weights, config), io


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "prefix", "tolerance"), [(torch.float32, "out", 2e-5), (torch.float64, "out64", 1e-9)]
)
def test_moe_mamba_logits(dtype, prefix, tolerance):
    model, io = moe_mamba()
    model = model.to(dtype)
    logits, state = model(io["input_ids"], return_state=True)
    assert_close("logits", logits, io[f"{prefix}.logits"], tolerance)
    state = model.init_state(2)
    steps = [model.step(io["input_ids"][:, t], state) for t in range(24)]
    assert_close("steps", torch.stack(steps, 1), io[f"{prefix}.logits"], tolerance)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
def test_moe_mamba_gradients(dtype, tolerance, gradient_checkpointing):
    model, io = moe_mamba()
    model = model.to(dtype).train()
    model.backbone.gradient_checkpointing = gradient_checkpointing
    loss = F.cross_entropy(model(io["input_ids"]).flatten(0, 1), io["target_ids"].flatten())
    assert_close("cross-entropy", loss, io["ce64"][0], tolerance)
    assert_close("balance", aux_loss(model), io["out64.lb_loss"][0], 1e-6)  # the official sums are in float32
    loss = loss + aux_loss(model)
    assert_close("loss", loss, io["loss64"][0], max(tolerance, 1e-8))
    loss.backward()
    names = [key for key in io if key.startswith("grad64.")]
    assert len(names) == 6
    for key in names:
        name = key.removeprefix("grad64.")
        if name == "embedding_layer.layers.0.weight":
            gradient = model.embedding.weight.grad
        else:
            block, half, part = re.fullmatch(r"encoder\.blocks\.block_(\d)\.block\.(\w+)\.layer\.(.+)", name).groups()
            for theirs, ours in OF_PART.items():
                part = part.replace(theirs, ours)
            gradient = model.backbone.layers[2 * int(block) + OF_BLOCK[half]].get_parameter(part).grad
            gradient = gradient.T if "router" in part else gradient
        assert_close(name, gradient, io[key], tolerance)


def test_moe_mamba_with_gated_experts():
    """llm-random's ff_gated: activation(x gate) (x lin1), whose two matrices are one of ours."""
    config, weights, _ = load("moe_mamba")
    args = {**config["args"], "moe_inner_expert": "ff_gated", "activation_type": "silu"}
    prefix = "encoder.blocks.block_{}.block.residual_feedforward.layer.feedforward.expert_inner_function."
    gates = {f"{prefix.format(i)}gate_weight": torch.randn(4, 32, 40) for i in range(2)}
    model = polymamba.convert("moe-mamba", {**weights, **gates}, {**config, "args": args})
    for i, (key, gate) in enumerate(gates.items()):
        in_proj = model.backbone.layers[2 * i + 1].mixer.in_proj.weight
        assert torch.equal(in_proj[..., :40], gate)
        assert torch.equal(in_proj[..., 40:], weights[key.replace("gate_weight", "lin1_weight")])
    with pytest.raises(InputError, match=r"lin1_weight is \(4, 32, 80\), not \(4, 32, 40\)"):
        polymamba.convert("moe-mamba", {**weights, **gates}, config)


def test_moe_mamba_that_is_not_supported():
    config, weights, _ = load("moe_mamba")
    for change, message in (
        ({"norm_class": "rms_norm"}, "norm_class is 'rms_norm', not 'layer_norm'"),
        ({"ff_mode": "expert_choice"}, "ff_mode is 'expert_choice', not 'token_choice'"),
        ({"block_modules": ["mamba", "attention"]}, "supported are mamba, feedforward"),
        ({"block_modules": ["mamba", "mamba"]}, "supported are mamba, feedforward"),
        ({"mamba_expansion": 1.5}, "mamba_expansion is 1.5"),
        ({"activation_type": "silu"}, "are ff silu; supported are ff relu"),
        ({"n_blocks": 3}, "no tensor for backbone.layers.4.mixer.A_log"),
    ):
        with pytest.raises(InputError, match=message):
            polymamba.convert("moe-mamba", weights, {**config, "args": {**config["args"], **change}})
    with pytest.raises(InputError, match="the moe-mamba config has no 'args'"):
        polymamba.convert("moe-mamba", weights, {"vocab_size": 67})
