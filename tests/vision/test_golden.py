"""Official checkpoints through polymamba.convert against what the official code computed (tests/golden)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import polymamba
from polymamba.core import InputError
from polymamba.vision.official import (
    _vim_name,
    _vmamba_name,
    vim_config,
    vim_config_of,
    vmamba_config,
    vmamba_config_of,
)

GOLDEN = Path(__file__).parents[1] / "golden"
OUR_NAME = {"vim": _vim_name, "vmamba": _vmamba_name}


def load(kind: str):
    folder = GOLDEN / kind
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")


@pytest.fixture(params=OUR_NAME)
def case(request):
    config, weights, io = load(request.param)
    return request.param, polymamba.convert(request.param, weights, config), io


def assert_close(name: str, ours: torch.Tensor, golden: torch.Tensor, tolerance: float):
    error = (ours.double() - golden.double()).abs()
    scale = golden.double().abs().max()
    assert error.max() <= tolerance * scale, f"{name}: {error.max() / scale:.2e} at {error.argmax().item()}"


PRECISIONS = [(torch.float32, "", 2e-5), (torch.float64, "64", 1e-9)]


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), PRECISIONS)
def test_logits_and_gradients(case, dtype, suffix, tolerance):
    kind, model, io = case
    model = model.to(dtype)
    logits = model(io["input"].to(dtype))
    assert_close("logits", logits, io[f"out{suffix}.logits"], tolerance)
    logits.pow(2).mean().backward()
    parameters = dict(model.named_parameters())
    golden = {k.removeprefix(f"grad{suffix}."): v for k, v in io.items() if k.startswith(f"grad{suffix}.")}
    assert len(golden) >= 8
    for name, gradient in golden.items():
        assert_close(name, parameters[OUR_NAME[kind](name)].grad, gradient, tolerance)


def test_inside_vim():
    config, weights, io = load("vim")
    model = polymamba.convert("vim", weights, config)
    with torch.no_grad():
        x, stream = model.embed(io["input"]), None
        for i, block in enumerate(model.layers):
            x, stream = block(x, stream)
            name = {0: "layer0", len(model.layers) - 1: "layer_last"}.get(i)
            if name:
                assert_close(name, x, io[f"out.{name}.hidden"], 2e-5)
                assert_close(name, stream, io[f"out.{name}.residual"], 2e-5)
        features = model.forward_features(io["input"])
    assert_close("class token", features[:, 0], io["out.features_cls"], 2e-5)


def test_inside_vmamba():
    config, weights, io = load("vmamba")
    model = polymamba.convert("vmamba", weights, config)
    with torch.no_grad():
        maps = model.forward_intermediates(io["input"], intermediates_only=True)
        scanned = model.layers[0].blocks[0].op(io["out.stage0.block0.op_in"].permute(0, 2, 3, 1))
    assert_close("op", scanned.permute(0, 3, 1, 2), io["out.stage0.block0.op_out"], 2e-5)
    for i, y in enumerate(maps):
        assert_close(f"stage {i}", y, io[f"out.stage{i}.blocks"], 2e-5)


@pytest.mark.parametrize(
    ("kind", "of_config", "of_tensors"),
    [("vim", vim_config, vim_config_of), ("vmamba", vmamba_config, vmamba_config_of)],
)
def test_tensors_alone_tell_the_configuration(kind, of_config, of_tensors):
    config, weights, _ = load(kind)
    told = of_config({**config, "drop_path_rate": 0.0})
    if kind == "vim":  # of the published size or else of whole patches: 4 x 4 of them here
        assert (told.img_size, told.grid(64, 64)) == ((64, 64), (4, 4))
    assert of_tensors(weights) == told


@pytest.mark.parametrize("kind", OUR_NAME)
def test_what_does_not_fit_is_reported_whole(kind):
    config, weights, _ = load(kind)
    first, second, third = list(weights)[:3]
    weights["strange.weight"] = weights.pop(first)
    weights[second] = torch.zeros(3, 5)
    with pytest.raises(InputError) as error:
        polymamba.convert(kind, weights, config)
    for words in ("no place for strange.weight", f"no tensor for {OUR_NAME[kind](first)}", f"{second} is (3, 5), not"):
        assert words in str(error.value)
    assert third not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("vim", "if_rope", True),
        ("vim", "bimamba_type", "v1"),
        ("vim", "if_bidirectional", True),
        ("vmamba", "forward_type", "v052d"),
        ("vmamba", "downsample_version", "v2"),
        ("vmamba", "gmlp", True),
    ],
)
def test_what_is_not_supported_is_named(kind, option, value):
    config, weights, _ = load(kind)
    with pytest.raises(InputError, match=option):
        polymamba.convert(kind, weights, {**config, option: value})


def test_older_names_and_shapes_of_vmamba():
    config, weights, io = load("vmamba")
    old = {}
    for key, tensor in weights.items():
        key = key.replace(".norm.", ".ln_1.") if ".blocks." in key else key
        key = key.replace(".op.", ".self_attention.").replace("classifier.", "")
        linear = key.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))
        old[key] = tensor[:, :, None, None] if linear else tensor
    assert "layers.0.blocks.0.self_attention.in_proj.weight" in old
    model = polymamba.convert("vmamba", old, config)
    with torch.no_grad():
        assert_close("logits", model(io["input"]), io["out.logits"], 2e-5)
