"""Vim and VMamba: sizes, what inference leaves out, pooling, training, files. What they compute: test_loops.py."""

import dataclasses
import math
import re
from importlib import import_module

import pytest
import torch

from polymamba.core import InputError
from polymamba.core.mamba import SelectiveSSM
from polymamba.kernels import plain_operations
from polymamba.vision import Vim, VimConfig, VMamba, VMambaConfig, load_image_model, preset_config
from polymamba.vision.config import PRESETS, V0, VIM_PRESETS
from polymamba.vision.vmamba import Norm

vim_module = import_module("polymamba.vision.vim")
vmamba_module = import_module("polymamba.vision.vmamba")

# Published parameter counts: hustvl/Vim's and MzeroMiko/VMamba's models, counted from their code.
PUBLISHED = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_small_patch16_224": 25_796_584,
    "vim_base_patch16_224": 97_598_440,
    "vim_tiny_patch16_stride8_224": 7_250_344,
    "vim_small_patch16_stride8_224": 26_001_256,
    "vmamba_tiny_v0": 22_893_448,
    "vmamba_small_v0": 44_417_416,
    "vmamba_base_v0": 76_254_056,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s2l15": 88_557_800,
    "vmamba_base_s1l20": 86_614_504,
}
TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "d_state": 3, "num_classes": 5}


def family(config):
    return Vim if isinstance(config, VimConfig) else VMamba


def vim(**changes) -> Vim:
    return Vim(VimConfig(**{**TINY, "img_size": (20, 28), **changes})).eval()


def vmamba(**changes) -> VMamba:
    return VMamba(VMambaConfig(**{"depths": (1, 2), "embed_dim": 16, "num_classes": 5, **changes})).eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    model = family(PRESETS[name])(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def on_a_gpu(monkeypatch):
    """VMamba's norms as on a GPU, by whatever kernel there is."""
    monkeypatch.setattr(vmamba_module, "has_kernel", lambda x: True)


@pytest.mark.parametrize("token", ["middle", "head", "none"])
def test_patches_and_positions_at_once(token, monkeypatch):
    """By the kernel that a GPU has for inference, at odd sizes, with pixels beyond the last patch."""
    pool = "avg" if token == "none" else "token"
    model = Vim(VimConfig(**TINY, img_size=(23, 14), class_token=token, global_pool=pool)).eval()
    torch.nn.init.normal_(model.patch_embed.proj.bias)
    x = torch.randn(2, 3, 23, 14)
    with torch.no_grad():
        expected = model.embed(x)
        monkeypatch.setattr(vim_module, "serves", lambda *tensors: True)
        monkeypatch.setattr(vim_module, "with_positions", None)  # not asked
        found = model.embed(x)
    assert torch.allclose(found, expected, atol=1e-6), (found - expected).abs().max()


@pytest.mark.parametrize("token", ["middle", "double"])
def test_where_the_head_sees_tokens_alone(token):
    """No other token is normed, unless somebody looks at the norm."""
    model = Vim(VimConfig(**TINY, img_size=(20, 12), class_token=token)).eval()
    x, seen = torch.randn(2, 3, 20, 12), []
    expected = model.forward_head(model.forward_features(x))
    assert torch.allclose(model(x), expected, atol=1e-6)
    model.norm_f.register_forward_hook(lambda module, given, made: seen.append(made[0].shape[1]))
    assert torch.equal(model(x), expected)
    assert seen == [15 + model.num_prefix_tokens]


@pytest.mark.parametrize("part", ["", "drop_path", "mixer", "mixer.in_proj", "mixer.backwards.x_proj"])
@pytest.mark.parametrize(("token", "lengths"), [("middle", [8, 9]), ("head", [1, 16])])
def test_in_inference_the_last_block_runs_up_to_the_token(token, lengths, part, monkeypatch):
    """Each direction; all of it with gradients, where paths are dropped, and where somebody looks at a part of it."""
    model = Vim(VimConfig(**TINY, img_size=(20, 12), class_token=token, drop_path_rate=0.5)).eval()
    x, seen, last = torch.randn(2, 3, 20, 12), [], model.layers[-1]
    scan = SelectiveSSM.forward

    def watched(self, xz, *args, **options):
        seen.append(xz.shape[1])
        return scan(self, xz, *args, **options)

    monkeypatch.setattr(SelectiveSSM, "forward", watched)
    expected = model(x)
    with torch.no_grad():
        found = model(x)
        assert [n for n in seen if n != 16] == [n for n in lengths if n != 16]
        seen.clear()
        last.drop_path.train()
        model(x)
        last.drop_path.eval()
        last.get_submodule(part).register_forward_hook(lambda module, given, made: None)
        model(x)
    assert torch.allclose(found, expected, atol=1e-6), (found - expected).abs().max()
    assert set(seen) <= {16}


@pytest.mark.gpu
def test_on_a_gpu_a_block_and_the_next_norm_are_one_operation(monkeypatch):
    """In inference in bfloat16, with and without autocast; in float32 they run one after the other."""
    model = Vim(VimConfig(**{**TINY, "embed_dim": 40, "depth": 3}, img_size=(20, 12))).eval().bfloat16().double()
    x, found = torch.randn(2, 3, 20, 12).bfloat16().double(), []
    at_once = vim_module.at_once_and_norm
    monkeypatch.setattr(
        vim_module, "at_once_and_norm", lambda *args, **options: found.append(at_once(*args, **options)) or found[-1]
    )
    with torch.no_grad():
        expected = model(x)
        model, x = model.float().cuda(), x.float().cuda()
        assert torch.allclose(model(x).cpu().double(), expected, atol=1e-5)
        with torch.autocast("cuda", torch.bfloat16):
            under_autocast = model(x)
        in_bfloat16 = model.bfloat16()(x.bfloat16())
    assert [y is None for y in found] == [True] * 2 + [True] * 2 + [False] * 4
    for y in (under_autocast, in_bfloat16):
        assert torch.allclose(y.cpu().double(), expected, atol=2e-2 * float(expected.abs().max()))


def test_norms_of_a_gpu_are_pytorchs(monkeypatch):
    model, images = vmamba(), torch.randn(2, 3, 33, 40)
    expected = model(images)
    on_a_gpu(monkeypatch)
    assert torch.allclose(model(images), expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, V0])
def test_under_autocast_norms_round_what_the_next_projection_would(changes, monkeypatch):
    """To the bit, and so the gradients; what goes elsewhere, the residual stream first of all, stays in float32."""
    model, images, results, seen = vmamba(**changes), torch.randn(2, 3, 33, 40), [], []
    on_a_gpu(monkeypatch)
    rounding = Norm.result_dtype
    block = model.layers[0].blocks[0]
    block.op.in_proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0].dtype))
    block.register_forward_hook(lambda block, args, out: seen.append(out.dtype))
    for result_dtype in (rounding, lambda self, projected: rounding(self, False)):
        monkeypatch.setattr(Norm, "result_dtype", result_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(images)
        y.float().square().sum().backward()
        results.append((y, *(p.grad for p in model.parameters())))
        model.zero_grad()
    assert seen[:2] == [torch.bfloat16, torch.float32]
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(33, 47), (7, 90), (1, 64), (64, 1), (1, 1)])
@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}])
def test_vmamba_takes_any_size(height, width, changes):
    model = vmamba(**changes)
    maps = model.forward_intermediates(torch.randn(1, 3, height, width), intermediates_only=True)
    assert model(torch.randn(1, 3, height, width)).isfinite().all()
    for info, y in zip(model.feature_info, maps, strict=True):
        assert y.shape[1] == info["num_chs"]
        for side, whole in zip(y.shape[2:], (height, width), strict=True):
            assert side >= max(1, math.ceil(whole / info["reduction"]))
            assert side <= math.ceil(whole / info["reduction"]) + 1


# Pooling, other sizes, training


@pytest.mark.parametrize("token", ["middle", "head", "double", "none"])
@pytest.mark.parametrize("pool", ["token", "avg", "max", "last"])
def test_pooling(token, pool):
    if token == "none" and pool == "token":
        with pytest.raises(ValueError, match="class_token is 'none'"):
            vim(class_token=token, global_pool=pool)
        return
    model = vim(class_token=token, global_pool=pool)
    x = model.forward_features(torch.randn(2, 3, 20, 28))
    n = model.num_prefix_tokens
    assert x.shape == (2, n + 35, 16)
    expected = {
        "token": x[:, :n].mean(1) if n else None,
        "avg": x[:, n:].sum(1) / 35,
        "max": x[:, n:].max(1).values,
        "last": x[:, n + 34],
    }[pool]
    assert torch.allclose(model.forward_head(x, pre_logits=True), expected, atol=1e-6)
    assert torch.allclose(model.forward_head(x), model.head(expected), atol=1e-6)


@torch.no_grad()
def test_another_size_is_a_resized_model():
    """Positions resized on the way, and once for all, are the same."""
    model, images = vim(), torch.randn(2, 3, 17, 40)
    logits = model(images)
    model.set_input_size((17, 40))
    assert model.pos_embed.shape == (1, 41, 16)
    assert model.config.img_size == (17, 40)
    assert torch.equal(model(images), logits)


def test_a_picture_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match="img_size"):
        VimConfig(img_size=(8, 300))


@pytest.mark.parametrize("make", [vim, vmamba])
def test_training_mode(make):
    """Every parameter gets a gradient; checkpointing, which runs blocks again, changes none; one seed, one result."""
    results = []
    for checkpointing in (False, True, False):
        torch.manual_seed(3)
        model = make(drop_path_rate=0.3, drop_rate=0.1).train()
        model.set_grad_checkpointing(checkpointing)
        model(torch.randn(2, 3, 20, 28)).square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        for other in results[1:]:
            assert torch.equal(gradient, other[name]), name


@torch.no_grad()
@pytest.mark.parametrize("make", [vim, vmamba])
def test_bf16_stays_near_float32(make):
    model, images = make(), torch.randn(4, 3, 20, 28)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    whole = model.bfloat16()(images.bfloat16())
    assert whole.dtype == torch.bfloat16
    assert (whole.float() - exact).abs().max() < 0.1 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("make", [vim, vmamba])
def test_plain_operations_compute_the_same(make):
    model, images = make(), torch.randn(2, 3, 20, 28)
    expected = model(images)
    with plain_operations():
        assert torch.allclose(model(images), expected, atol=1e-5)


@pytest.mark.parametrize("make", [vim, vmamba])
def test_a_folder_and_back(make, tmp_path):
    model = make()
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "label_names": list("abcde"), "file": "/elsewhere"}
    model.save_pretrained(tmp_path / "m")
    loaded = load_image_model(tmp_path / "m")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert loaded.pretrained_cfg["label_names"] == list("abcde")
    assert "file" not in loaded.pretrained_cfg
    assert {f"{loaded.pretrained_cfg[k]}.weight" for k in ("first_conv", "classifier")} <= loaded.state_dict().keys()
    images = torch.randn(2, 3, 20, 28)
    assert torch.equal(loaded(images), model(images))


def test_folders_of_other_things(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        load_image_model(tmp_path)
    for text in ("[]", "{", '{"model": "ByteLM"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            load_image_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (VimConfig, {"class_token": "left"}, "'middle', 'head', 'double', 'none'"),
        (VimConfig, {"global_pool": "sum"}, "global_pool is 'sum'"),
        (VimConfig, {"depth": 0}, "depth is 0"),
        (VimConfig, {"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        (VMambaConfig, {"patch_size": 3}, "patch_size is 3"),
        (VMambaConfig, {"depths": ()}, "depths is ()"),
        (VMambaConfig, {"stem": "v2"}, "'conv', 'patch'"),
    ],
)
def test_wrong_configurations_say_what_is_allowed(config, fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        config(**fields)


def test_presets_change_by_name_only():
    assert preset_config("test_vim", num_classes=3).num_classes == 3
    with pytest.raises(TypeError, match="if_devide_out"):
        preset_config("test_vim", if_devide_out=True)
    with pytest.raises(ValueError, match="vim_tiny_patch16_224"):
        preset_config("vim_huge")
    for config in VIM_PRESETS.values():
        assert dataclasses.replace(config) == config
