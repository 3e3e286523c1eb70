"""Caduceus against what the official code computed (tests/golden), through official keys; and what it promises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import polymamba
from polymamba.core import InputError
from polymamba.core.config import BackboneConfig
from polymamba.genomics.alphabet import COMPLEMENT
from polymamba.genomics.caduceus import Caduceus, CaduceusClassifier
from polymamba.genomics.config import (
    CaduceusClassifierConfig,
    CaduceusConfig,
    DNAClassifierConfig,
    language_model_config,
)
from polymamba.genomics.model import DNAClassifier
from polymamba.genomics.official import caduceus_config, to_caduceus

GOLDEN = Path(__file__).parents[1] / "golden"
MASKED, CLASSIFIERS = ["ph_mlm", "ps_mlm", "ps_mlm_nonfused"], ["ph_cls", "ps_cls"]
PRECISIONS = [(torch.float32, "", 2e-5), (torch.float64, "64", 1e-9)]
COMPLEMENTS = torch.tensor(COMPLEMENT)


def load(case: str):
    folder = GOLDEN / f"caduceus_{case}"
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "weights.safetensors"), load_file(folder / "io.safetensors")


def converted(case: str):
    config, weights, io = load(case)
    return polymamba.convert("caduceus", weights, config), io


def assert_close(name: str, ours: torch.Tensor, golden: torch.Tensor, tolerance: float):
    error = (ours.double() - golden.double()).abs()
    scale = golden.double().abs().max()
    assert error.max() <= tolerance * scale, f"{name}: {error.max() / scale:.2e} at {error.argmax().item()}"


def official_gradients(model, *, fused_add_norm: bool):
    """By official keys: gradients move between the two forms of a model as its weights do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return to_caduceus(model, fused_add_norm=fused_add_norm)[0]


def assert_gradients(case: str, model, io, suffix: str, tolerance: float):
    ours = official_gradients(model, fused_add_norm="nonfused" not in case)
    golden = {k.removeprefix(f"grad{suffix}."): v for k, v in io.items() if k.startswith(f"grad{suffix}.")}
    assert len(golden) >= 6
    for name, gradient in golden.items():
        assert_close(name, ours[name], gradient, tolerance)


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", MASKED)
def test_masked_language_model(case, dtype, suffix, tolerance):
    model, io = converted(case)
    model = model.to(dtype)
    model.backbone.gradient_checkpointing = dtype == torch.float64
    logits = model(io["input_ids"])
    assert_close("logits", logits, io[f"out{suffix}.logits"], tolerance)
    if "ps" in case:
        assert_close("other strand", model(io["input_ids_rc"]), io[f"out{suffix}.logits_rc_input"], tolerance)
    loss = F.cross_entropy(logits.transpose(1, 2), io["labels"], ignore_index=-100)
    assert_close("loss", loss, io[f"out{suffix}.mlm_loss"][0], max(tolerance, 1e-8))
    logits.pow(2).mean().backward()
    assert_gradients(case, model, io, suffix, tolerance)


@pytest.mark.parametrize(("dtype", "suffix", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifier(case, dtype, suffix, tolerance):
    config, weights, io = load(case)
    for pooling in ("mean", "max"):
        for conjoin in (False, True) if case == "ph_cls" else (False,):
            given = {**config, "pooling_strategy": pooling, "conjoin_eval": conjoin}
            model = polymamba.convert("caduceus", weights, given).to(dtype)
            assert isinstance(model, CaduceusClassifier)
            name = f"logits_{pooling}{'_conjoin' if conjoin else ''}"
            logits = model(io["input_ids"])
            assert_close(name, logits, io[f"out{suffix}.{name}"], tolerance)
            if case == "ps_cls" or conjoin:
                assert_close("other strand", model(io["input_ids_rc"]), logits, tolerance / 20)
    model = polymamba.convert("caduceus", weights, config).to(dtype)
    model(io["input_ids"]).pow(2).mean().backward()
    assert_gradients(case, model, io, suffix, tolerance)


def test_inside_official_order():
    """The residual stream after all layers, put back into the official frame: strand 2 reversed in places, channels."""
    for case in ("ps_mlm", "ps_mlm_nonfused"):
        model, io = converted(case)
        with torch.no_grad():
            one, other = model.hidden(io["input_ids"])
        official = torch.cat((one, other.flip(1, 2)), -1)
        assert_close(case, official, io["out.hidden_last"], 2e-5)


@pytest.mark.parametrize("case", MASKED + CLASSIFIERS)
def test_back_to_official_keys(case, tmp_path):
    """The very tensors, and through a folder of ours the very logits."""
    config, weights, io = load(case)
    model = polymamba.convert("caduceus", weights, config)
    tensors, told = to_caduceus(model, fused_add_norm=config["fused_add_norm"])
    assert tensors.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensors[key], tensor), key
    assert caduceus_config(told) == caduceus_config(config)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(io["input_ids"])
        assert torch.equal(again(io["input_ids"]), logits)
        assert torch.equal(polymamba.convert("caduceus", tensors, told)(io["input_ids"]), logits)


def test_an_even_number_of_layers_runs_either_way():
    """A PS model that was never official: exported fused and not, both are it."""
    torch.manual_seed(0)
    model = Caduceus(small(rcps=True, n_layer=2)).double()
    tokens = torch.randint(7, 12, (2, 9))
    for fused in (True, False):
        tensors, config = to_caduceus(model, fused_add_norm=fused)
        assert ("caduceus.backbone.layers.0.norm.weight" in tensors) == fused
        again = polymamba.convert("caduceus", tensors, config).double()
        assert torch.equal(again(tokens), model(tokens))
    odd = Caduceus(small(rcps=True, n_layer=3))
    assert to_caduceus(odd)[1]["fused_add_norm"] is False
    with pytest.raises(ValueError, match="3 layers, an odd number"):
        to_caduceus(odd, fused_add_norm=True)


def small(*, n_layer: int = 2, rcps: bool, norm: str = "rms") -> CaduceusConfig:
    backbone = BackboneConfig(d_model=20, n_layer=n_layer, d_state=5, pattern=("bimamba",), norm=norm)
    return CaduceusConfig(backbone=backbone, rcps=rcps)


@torch.no_grad()
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_exact_equivariance(norm, mirrored):
    torch.manual_seed(1)
    model = Caduceus(replace(small(rcps=True, n_layer=3, norm=norm), mirrored=mirrored)).double().eval()
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    tokens = torch.randint(0, 12, (3, 37))
    logits, of_other = model(tokens), model(COMPLEMENTS[tokens.flip(1)])
    complement = torch.cat((COMPLEMENTS, torch.arange(12, 16)))
    error = (of_other - logits.flip(1)[..., complement]).abs().max()
    assert error < 1e-12 * logits.abs().max()
    assert not torch.allclose(of_other, logits, atol=0.1)  # a constant would be equivariant, too


@pytest.mark.parametrize("read", ["masked", "conjoined", "classified"])
def test_strands_in_turn_under_checkpointing(read):
    """So that one strand's activations are there at a time; the same numbers and gradients as of both at once."""
    torch.manual_seed(2)
    config = small(rcps=read == "masked", n_layer=3)
    if read == "masked":
        model, backbone = (m := Caduceus(config)), m.backbone
    elif read == "conjoined":
        head = CaduceusClassifierConfig(trunk=config, n_classes=3, conjoin=True)
        model, backbone = (m := CaduceusClassifier(head)), m.trunk.backbone
    else:
        whole = DNAClassifierConfig(backbone=config.backbone, classes=("a", "b"), both_strands=True, head_dropout=0.0)
        model, backbone = (m := DNAClassifier(whole)), m.backbone
    model.double()
    tokens, mask = torch.randint(7, 12, (3, 19)), torch.ones(3, 19, dtype=torch.bool)
    mask[1, 11:] = False
    rows, found = [], []
    backbone.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for backbone.gradient_checkpointing in (False, True):
        model.zero_grad()
        logits = model(tokens, padding_mask=mask) if read == "masked" else model(tokens, mask)
        logits.pow(2).sum().backward()
        found.append({"logits": logits} | {name: p.grad for name, p in model.named_parameters()})
    assert rows == [6, 3, 3]
    for name, value in found[0].items():
        assert_close(name, found[1][name], value, 1e-12)
    with torch.no_grad():
        model(tokens)
    assert rows[3:] == [6], "without gradients nothing is kept"


@torch.no_grad()
@pytest.mark.parametrize("case", ["ph_mlm", "ps_mlm"])
def test_padding_changes_nothing(case):
    model, io = converted(case)
    model, tokens = model.double(), io["input_ids"]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 20:] = False
    logits = model(tokens.masked_fill(~mask, 4), padding_mask=mask)
    assert_close("shorter", logits[0, :20], model(tokens[:1, :20])[0], 1e-12)
    assert_close("whole", logits[1], model(tokens)[1], 1e-12)
    config, weights, _ = load(case.replace("mlm", "cls"))
    classifier = polymamba.convert("caduceus", weights, config).double()
    for pooling in ("mean", "max"):
        classifier.config = replace(classifier.config, pooling=pooling)
        found = classifier(tokens.masked_fill(~mask, 4), mask)
        assert_close(pooling, found[:1], classifier(tokens[:1, :20]), 1e-12)


@pytest.mark.parametrize(("preset", "n_parameters"), [("470k", 470_702), ("1.9m", 1_934_592), ("7m", 7_725_312)])
@pytest.mark.parametrize("rcps", [False, True])
def test_published_sizes(preset, n_parameters, rcps):
    backbone = language_model_config(preset, "masked", 1024).backbone
    with torch.device("meta"):
        model = Caduceus(CaduceusConfig(backbone=backbone, rcps=rcps))
    assert sum(p.numel() for p in model.parameters()) == n_parameters


# Files


@pytest.mark.parametrize("case", ["ph_mlm", "ps_mlm"])
def test_tied_tensors_once_twice_and_torn(case):
    config, weights, io = load(case)
    # What safetensors files of tied models hold, and under the names of a Lightning checkpoint.
    again = ("mamba_rev.in_proj", "mamba_rev.out_proj", "lm_head")
    once = {f"model.{k}": v for k, v in weights.items() if not any(word in k for word in again)}
    assert len(once) < len(weights)
    model = polymamba.convert("caduceus", once, config)
    assert model.lm_head.weight is model.embedding.weight
    n_stored = sum(tensor.numel() for key, tensor in once.items() if not key.endswith("complement_map"))
    assert sum(p.numel() for p in model.parameters()) == n_stored
    with torch.no_grad():
        assert_close("logits", model(io["input_ids"]), io["out.logits"], 2e-5)
    torn = {k: v + 1 if "mamba_rev.in_proj" in k else v for k, v in weights.items()}
    with pytest.raises(InputError, match=r"mamba_rev.in_proj.weight differ, but they are tied"):
        polymamba.convert("caduceus", torn, config)


@pytest.mark.parametrize("case", MASKED + CLASSIFIERS)
def test_what_does_not_fit_is_reported_whole(case):
    config, weights, _ = load(case)
    norm = next(k for k in weights if "layers.1.norm" in k)
    final = next(k for k in weights if "norm_f" in k)
    weights["caduceus.backbone.layers.0.mixer.extra"] = torch.zeros(1)
    n, weights[norm] = len(weights[norm]), torch.zeros(3)
    del weights[final]
    with pytest.raises(InputError, match=r"no place for caduceus.backbone.layers.0.mixer.extra") as error:
        polymamba.convert("caduceus", weights, config)
    assert f"{norm} is (3,), not ({n},)" in str(error.value)
    assert "backbone.norm_f.weight" in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bidirectional", False),
        ("bidirectional_strategy", "ew_multiply"),
        ("bidirectional_weight_tie", False),
        ("complement_map", {"7": 8, "8": 7}),
    ],
)
def test_what_is_not_supported_is_named(option, value):
    config, weights, _ = load("ps_mlm")
    with pytest.raises(InputError, match=option):
        polymamba.convert("caduceus", weights, {**config, option: value})


def test_a_config_in_the_wild():
    config, weights, _ = load("ps_mlm")
    model = polymamba.convert("caduceus", weights, {**config, "bidirectional": "true,", "vocab_size": 16})
    tokens = torch.randint(7, 12, (2, 21))
    assert torch.equal(model(tokens), polymamba.convert("caduceus", weights, config)(tokens))


# PlantCaduceus: ids [PAD] [MASK] [UNK] a c g t


PLANT = [2, 2, 2, 1, 0, 2, 2, 3, 4, 5, 6, 2]  # of each token of the alphabet


@torch.no_grad()
def test_plantcaduceus():
    config, weights, _ = load("ps_mlm")
    complement = [0, 1, 2, 6, 5, 4, 3, 7]
    config = {**config, "vocab_size": 7, "complement_map": {str(i): k for i, k in enumerate(complement)}}
    weights = {k: v[:8] if v.shape[0] == 16 else v for k, v in weights.items()}
    model = polymamba.convert("caduceus", weights, config).double()
    tokens = torch.randint(7, 12, (2, 21))
    tokens[:, 3] = 3  # [MASK]
    logits = model(tokens)
    assert torch.equal(model.ids, torch.tensor(PLANT))
    known = torch.tensor([3, 4, 6, 7, 8, 9, 10])
    rest = torch.tensor([0, 1, 2, 5, 11])
    assert (logits.softmax(-1)[..., rest] == 0).all()
    # Beside an official vocabulary with the same rows, elsewhere.
    twin = Caduceus(replace(model.config, vocab_size=16, vocabulary=CaduceusConfig.vocabulary)).double().eval()
    place = torch.tensor([*PLANT, 7, 7, 7, 7])
    rows = {"embedding.weight", "lm_head.weight"}
    twin.load_state_dict({k: v[place] if k in rows else v for k, v in model.state_dict().items()})
    assert_close("logits", logits[..., known], twin(tokens)[..., known], 1e-12)
    other = model(COMPLEMENTS[tokens.flip(1)])
    assert_close("equivariance", other[..., 7:11], logits.flip(1)[..., [10, 9, 8, 7]], 1e-12)
    tensors, told = to_caduceus(model.float())
    assert all(torch.equal(tensors[k], v) for k, v in weights.items() if "complement_map" not in k)
    assert caduceus_config(told) == model.config
