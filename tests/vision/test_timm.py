"""Our models as timm's: what timm's own tests of its models ask (tests/test_models.py there), and what users do.

TorchScript does not apply: the scan is an operator of ours. Where timm wants square feature maps, that is for VMamba;
Vim gives tokens, as timm's vision transformers do.
"""

import json
import subprocess
import sys

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2
from torch import fx

import polymamba.vision
from polymamba.vision.config import PRESETS

TESTED = ["test_vim", "test_vmamba"]
MICRO = ["vim_micro_patch4_32", "vmamba_micro_patch2_32"]


def make(name, **kwargs):
    return timm.create_model(name, **kwargs).eval()


def images_for(model, batch=2):
    return torch.randn(batch, *model.default_cfg["input_size"])


@pytest.mark.parametrize(
    "order",
    [
        "import timm, polymamba.vision",
        "import polymamba.vision, importlib.util; importlib.util.find_spec('timm'); import timm",
    ],
)
def test_importing_registers_in_either_order(order):
    code = f"{order}; assert timm.is_model('test_vim'), 0; print(timm.create_model('test_vim').num_classes)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1000"), done.stderr


def test_flags_need_neither_timm_nor_torch():
    code = "import sys, polymamba.vision.config; print('timm' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_names():
    ours = timm.list_models(module="registry")
    assert set(ours) == set(PRESETS)
    assert polymamba.vision.preset_config("test_vim") == make("test_vim").config


@torch.no_grad()
@pytest.mark.parametrize("name", TESTED + MICRO)
def test_forward(name):
    model = make(name)
    outputs = model(images_for(model, 1))
    assert outputs.shape == (1, model.num_classes)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("name", TESTED)
def test_backward(name):
    model = timm.create_model(name, num_classes=42).train()
    outputs = model(torch.randn(2, 3, 64, 64))
    outputs.mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert outputs.shape[-1] == 42


@torch.no_grad()
@pytest.mark.parametrize("name", TESTED)
def test_default_cfg(name):
    model = make(name)
    cfg, keys = model.default_cfg, model.state_dict().keys()
    assert f"{cfg['classifier']}.weight" in keys
    assert f"{cfg['first_conv']}.weight" in keys
    images = images_for(model, 1)
    features = model.forward_features(images)
    if name == "test_vmamba":
        assert features.shape[1:3] == cfg["pool_size"]
        assert features.shape[-1] == model.num_features
    else:
        assert features.shape == (1, model.num_prefix_tokens + 64, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    # In inference Vim's last block makes what its class token needs, and no features: the same, but not to the bit.
    tolerance = 1e-6 if name == "test_vim" else 0.0
    assert torch.allclose(model.forward_head(features), model(images), atol=tolerance, rtol=0)

    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.allclose(model(images), model.forward_head(features, pre_logits=True), atol=tolerance, rtol=0)
    model.reset_classifier(0, "")
    assert model(images).shape == features.shape
    model.reset_classifier(7, "avg")
    assert model(images).shape == (1, 7)
    assert (model.get_classifier().out_features, model.num_classes) == (7, 7)

    for kwargs in ({"num_classes": 0}, {"num_classes": 0, "global_pool": ""}):
        assert make(name, **kwargs)(images).shape[-1] == model.num_features


@torch.no_grad()
@pytest.mark.parametrize("name", TESTED)
def test_features_only(name):
    model = make(name, features_only=True)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) >= 4
    features = model(torch.randn(1, 3, 96, 96))
    assert len(features) == len(channels)
    for c, r, x in zip(channels, reductions, features, strict=True):
        assert x.shape == (1, c, 96 // r, 96 // r)
    fewer = make(name, features_only=True, out_indices=(0, 2))
    assert [x.shape for x in fewer(torch.randn(1, 3, 96, 96))] == [features[0].shape, features[2].shape]
    assert len(fewer.model.layers) == 3  # what comes after is gone


@torch.no_grad()
@pytest.mark.parametrize("name", TESTED)
def test_intermediates(name):
    model = make(name)
    images = torch.randn(2, 3, 72, 40)
    final, found = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert len(found) == len(model.feature_info)
    last = model.forward_intermediates(images, indices=[-1], norm=True, intermediates_only=True, output_fmt="NHWC")[0]
    expected = final if name == "test_vmamba" else final[:, 1:].unflatten(1, (9, 5))
    assert torch.allclose(last, expected, atol=1e-6)
    some, taken = model.forward_intermediates(images, indices=[0, 1], stop_early=True)
    assert [x.shape for x in taken] == [x.shape for x in found[:2]]
    assert all(torch.equal(a, b) for a, b in zip(taken, found, strict=False))
    assert some.shape != final.shape or name == "test_vim"
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(images, output_fmt="NCWH")
    kept = model.prune_intermediate_layers([0, 1], prune_norm=True)
    assert (kept, len(model.layers)) == ([0, 1], 2)
    pruned = model.forward_intermediates(images, indices=kept, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, found, strict=False))


@torch.no_grad()
def test_vim_gives_what_vision_transformers_give():
    model = make("test_vim")
    images = torch.randn(2, 3, 64, 64)
    maps = model.get_intermediate_layers(images, n=2, reshape=True, norm=True)
    assert [m.shape for m in maps] == [(2, 32, 8, 8)] * 2
    tokens = model.get_intermediate_layers(images, n=[1], return_prefix_tokens=True)
    assert [x.shape for x in tokens[0]] == [(2, 64, 32), (2, 1, 32)]
    assert torch.allclose(maps[1].flatten(2).mT, model.forward_features(images)[:, 1:], atol=1e-6)


@pytest.mark.parametrize("name", TESTED)
def test_gradient_checkpointing_changes_nothing(name):
    model = make(name)
    images = images_for(model)
    expected = model(images)
    model.set_grad_checkpointing()
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", TESTED)
def test_fx(name):
    """A traced graph computes the same, forwards and backwards, and gives features by name."""
    model = make(name)
    images = images_for(model, 1)
    leaves = {"head": "logits"}
    traced = create_feature_extractor(model, return_nodes=leaves)
    assert isinstance(traced, fx.GraphModule)
    ours, theirs = model(images), traced(images)["logits"]
    assert torch.equal(ours, theirs)
    theirs.mean().backward()
    assert [n for n, p in traced.named_parameters() if p.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize("name", TESTED)
def test_torch_export(name):
    """With our operators in it; any batch."""
    model = make(name)
    images = images_for(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
    for n in (1, 2, 5):
        images = images_for(model, n)
        assert torch.allclose(program.module()(images), model(images), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", TESTED)
def test_compiles_without_a_break(name):
    model = make(name)
    images = images_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images), model(images), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", TESTED)
def test_weights_from_a_file_and_a_folder(name, tmp_path):
    """With other channels and classes; and a folder of ours is one of timm's, whatever it was made from."""
    model = make(name, num_classes=11)
    images = images_for(model)
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    again = make(name, pretrained=True, num_classes=11, pretrained_cfg_overlay={"file": str(file), "num_classes": 11})
    assert torch.equal(again(images), model(images))
    grey = make(
        name, pretrained=True, num_classes=3, in_chans=1, pretrained_cfg_overlay={"file": str(file), "num_classes": 11}
    )
    assert grey(images[:, :1]).shape == (2, 3)
    kept = next(n for n in model.state_dict() if n.startswith("layers.0"))
    assert torch.equal(grey.state_dict()[kept], model.state_dict()[kept])

    model.save_pretrained(tmp_path / "folder")
    local = make(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert torch.equal(local(images), model(images))
    other = make(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=2)
    assert other(images).shape == (2, 2)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architecture"] == name


@torch.no_grad()
def test_official_weights_through_timm_at_another_size(tmp_path):
    """By official keys, the positions resized."""
    from polymamba.vision.official import _vim_name

    model = make("test_vim")
    official = {}
    for key, value in model.state_dict().items():
        name = key.replace(".backwards.A_log", ".A_b_log").replace(".backwards.D", ".D_b").replace(".forwards.", ".")
        for part in ("conv1d", "x_proj", "dt_proj"):
            name = name.replace(f".backwards.{part}.", f".{part}_b.")
        official[name] = value
        assert _vim_name(name) == key
    torch.save({"model": official}, tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth")}
    assert torch.equal(make("test_vim", pretrained=True, pretrained_cfg_overlay=overlay).head.weight, model.head.weight)
    larger = make("test_vim", img_size=(96, 40), pretrained=True, pretrained_cfg_overlay=overlay)
    images = torch.randn(1, 3, 96, 40)
    assert torch.allclose(larger(images), model(images), atol=1e-5)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="if_devide_out"):
        make("test_vim", if_devide_out=True)


@pytest.mark.parametrize("name", TESTED)
def test_optimizer_groups(name):
    """A_log, D and positions are not decayed; layer decay finds a place for every parameter."""
    model = make(name)
    skipped = model.no_weight_decay()
    assert any("A_log" in n for n in skipped)
    assert ("pos_embed" in skipped) == (name == "test_vim")
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.1, layer_decay=0.7)
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(parameters) == len(list(model.parameters()))
    by_id = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    decays = {n: by_id[id(p)] for n, p in model.named_parameters()}
    assert all(decays[n] == 0 for n in skipped)
    scales = {g["lr_scale"] for g in optimizer.param_groups}
    assert max(scales) == 1
    assert len(scales) >= len(model.feature_info)
