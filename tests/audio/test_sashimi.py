"""The U-Net and `convert("sashimi")` against what the official code computed (tests/golden)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import polymamba
from polymamba.audio import AudioModel, UNet, UNetConfig
from polymamba.audio.sashimi import _OF_MLP, official_places
from polymamba.core import S4, InputError

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = [(torch.float32, "out", 2e-5), (torch.float64, "out64", 1e-9)]


def load(case: str):
    config = json.loads((GOLDEN / case / "config.json").read_text())
    return config, load_file(GOLDEN / case / "weights.safetensors"), load_file(GOLDEN / case / "io.safetensors")


def assert_close(name: str, ours: torch.Tensor, golden: torch.Tensor, tolerance: float):
    error = (ours.double() - golden.double()).abs()
    scale = golden.double().abs().max()
    assert error.max() <= tolerance * scale, f"{name}: {error.max() / scale:.2e} at {error.argmax().item()}"


class Mix(nn.Linear):
    """What stands in the S4's place in the structure cases: a linear map of each step."""

    projects_input = True

    def forward(self, x, **options):
        y = super().forward(x)
        return (y, []) if options.get("return_state") else y

    step = lambda self, x, state: super().forward(x)  # noqa: E731
    init_state = lambda self, batch, max_length=None: []  # noqa: E731


def structure(case: str, dtype) -> tuple[UNet, dict]:
    config, weights, io = load(case)
    unet = UNet(
        UNetConfig(
            d_model=config["d_model"],
            n_blocks=config["n_layers"],
            pool=config["pool"],
            layout="unet" if config["unet"] else "sashimi",
            stages=("s4+mlp",),
            norm="layer",
        )
    )
    for block in unet.all_blocks():
        if isinstance(block.mixer, S4):
            block.mixer = Mix(len(block.norm.weight), len(block.norm.weight))
    for prefix, module in official_places(unet):
        names = {name: f"linear.{name}" if isinstance(module, nn.Linear) else name for name in ("weight", "bias")}
        if hasattr(module, "mixer"):
            of_mixer = {n: f"layer.mix.{n}" for n in names} if isinstance(module.mixer, Mix) else _OF_MLP
            names = {f"mixer.{ours}": theirs for ours, theirs in of_mixer.items()}
            names |= {f"norm.{n}": f"norm.{n}" for n in ("weight", "bias")}
        for ours, theirs in names.items():
            parameter = module.get_parameter(ours)
            parameter.data.copy_(weights.pop(prefix + theirs).reshape(parameter.shape))
    assert not weights
    return unet.to(dtype), io


@pytest.mark.parametrize(("dtype", "prefix", "tolerance"), DTYPES)
@pytest.mark.parametrize("case", ["sashimi_structure", "sashimi_structure_unet"])
def test_structure(case, dtype, prefix, tolerance):
    """Every layer's output, the last one, and the steps."""
    unet, io = structure(case, dtype)
    seen = {}
    for official, module in official_places(unet):

        def keep(module, args, out, name=official):
            if isinstance(out, tuple):  # a block, and what it adds to
                seen[name] = out[0] + out[1]
            else:
                seen[name] = out

        module.register_forward_hook(keep)
    x = io["input"].to(dtype)
    y, _ = unet(x, return_state=True)
    assert_close("y", y, io[f"{prefix}.y"], tolerance)
    n_compared = 0
    for official, out in seen.items():
        if official == "norm.":
            continue
        kind, *numbers = official.strip(".").split(".")
        golden = io[f"{prefix}.{kind[0]}{'_'.join(numbers)}"].mT
        if official.startswith("u_") and official.endswith(".0."):  # an up-pool: ours before its delay
            p = unet.config.pool[-1 - int(numbers[0])]
            out = F.pad(out, (0, 0, p, 0))[:, : golden.shape[1]]
        assert_close(official, out, golden, tolerance)
        n_compared += 1
    assert n_compared == sum(1 for name in io if name.startswith(f"{prefix}.")) - (1 if prefix == "out" else 2)
    state = unet.init_state(len(x))
    steps = torch.stack([unet.step(x[:, t], state) for t in range(x.shape[1])], 1)
    assert_close("steps", steps, io["out64.y_step"], max(tolerance, 1e-9))


@pytest.mark.parametrize(("dtype", "prefix", "tolerance"), DTYPES)
def test_sashimi(dtype, prefix, tolerance):
    """A whole SaShiMi: another length than the checkpoint's, a longer one, gradients, steps."""
    config, weights, io = load("sashimi")
    unet = polymamba.convert("sashimi", weights, config).to(dtype)
    tolerance = max(tolerance, 2e-5)  # the checkpoint's C is what float32 left of it
    x = io["input"].to(dtype)
    y = unet(x)
    assert_close("y", y, io[f"{prefix}.y"], tolerance)
    assert_close("y_short", unet(x[:, :24]), io[f"{prefix}.y_short"], tolerance)
    assert_close("y_long", unet(io["input_long"].to(dtype)), io[f"{prefix}.y_long"], tolerance)
    state = unet.init_state(len(x))
    assert_close(
        "steps", torch.stack([unet.step(x[:, t], state) for t in range(48)], 1), io[f"{prefix}.y_step"], tolerance
    )
    y.pow(2).mean().backward()
    places = dict(official_places(unet))
    gradients = {
        "d_layers.0.linear.weight": places["d_layers.0."].weight,
        "u_layers.0.0.linear.weight": places["u_layers.0.0."].weight,
        "c_layers.0.layer.layer.D": places["c_layers.0."].mixer.D,
        "norm.weight": places["norm."].weight,
    }
    for name, parameter in gradients.items():
        golden = io[f"{prefix.replace('out', 'grad')}.{name}"]
        assert_close(name, parameter.grad, golden.reshape(parameter.shape), max(tolerance, 5e-5))


@pytest.mark.parametrize("which", ["weights_init", "weights_long"])
def test_sashimi_before_and_after_its_lengths(which):
    """The same model from checkpoints that hold C before its first forward, and after it doubled its length."""
    config, weights, io = load("sashimi")
    unet = polymamba.convert("sashimi", weights | load_file(GOLDEN / "sashimi" / f"{which}.safetensors"), config)
    with torch.no_grad():
        assert_close("y", unet(io["input"]), io["out.y"], 2e-5)


def test_a_whole_model():
    config, weights, _ = load("sashimi")
    whole = {f"model.{key}": value for key, value in weights.items()}
    whole["encoder.0.weight"] = torch.randn(256, 16)
    whole |= {
        "decoder.0.output_transform.weight": torch.randn(256, 16),
        "decoder.0.output_transform.bias": torch.zeros(256),
    }
    model = polymamba.convert("sashimi", whole, config | {"sample_rate": 22050})
    assert isinstance(model, AudioModel)
    assert model.config.sample_rate == 22050
    codes = torch.randint(256, (1, 9))
    backbone = polymamba.convert("sashimi", weights, config)
    with torch.no_grad():
        expected = backbone(whole["encoder.0.weight"][codes]) @ whole["decoder.0.output_transform.weight"].T
        torch.testing.assert_close(model(codes), expected, rtol=0, atol=1e-5)
        codes[0, 0] = 128
        begun = codes.clone()
        begun[0, 0] = 256
        assert torch.equal(model(codes), model(begun))
    old = {key.replace("decoder.0.", "decoder."): value for key, value in whole.items()}
    assert torch.equal(polymamba.convert("sashimi", old, config).head.weight, model.head.weight)


def test_what_does_not_fit_is_said():
    config, weights, _ = load("sashimi")
    bad = {k: v for k, v in weights.items() if k != "norm.weight"} | {"d_layers.7.linear.weight": torch.ones(2)}
    with pytest.raises(InputError, match=r"no place for d_layers\.7\.linear\.weight; no tensor for norm\.weight"):
        polymamba.convert("sashimi", bad, config)
    with pytest.raises(InputError, match=r"norm\.weight is \(3,\), not \(16,\)"):
        polymamba.convert("sashimi", weights | {"norm.weight": torch.ones(3)}, config)
    with pytest.raises(InputError, match="bidirectional is true"):
        polymamba.convert("sashimi", weights, config | {"bidirectional": True})
