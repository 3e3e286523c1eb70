"""Features, explanations and exports: what they compute, and the verbs that write them."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from polymamba.cli import main
from polymamba.vision import Vim, VimConfig, VMamba, VMambaConfig, load_image_model
from polymamba.vision.explain import grad_cam, receptive_field, scan_order

COLOURS = ("blue", "green", "red")


def vim(**changes) -> Vim:
    fields = {"img_size": (24, 32), "patch_size": 4, "embed_dim": 16, "depth": 3, "d_state": 3, "num_classes": 3}
    return Vim(VimConfig(**{**fields, **changes})).eval()


def vmamba() -> VMamba:
    return VMamba(VMambaConfig(depths=(1, 1), embed_dim=16, num_classes=3)).eval()


@pytest.fixture(params=[vim, vmamba])
def model(request):
    return request.param()


@pytest.fixture(params=["test_vim", "test_vmamba"], scope="module")
def run(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    config = {"num_classes": 3, "depth": 2} if request.param == "test_vim" else {"num_classes": 3, "depths": (1, 1)}
    import timm

    model = timm.create_model(request.param, **config)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list(COLOURS), "input_size": (3, 32, 32)}
    model.pretrained_cfg["crop_pct"] = 1.0
    model.save_pretrained(folder)
    return folder


def test_grad_cam_of_the_likeliest_class_or_of_any(model):
    x = torch.randn(2, 3, 24, 32)
    cam, classes = grad_cam(model, x)
    assert cam.shape == (2, 24, 32)
    assert torch.equal(classes, model(x).argmax(1))
    assert cam.min() >= 0
    assert cam.max() <= 1
    other, chosen = grad_cam(model, x, torch.tensor([2, 0]))
    assert chosen.tolist() == [2, 0]
    assert not torch.equal(other, cam)
    assert all(p.grad is None for p in model.parameters())


def test_grad_cam_finds_what_decides():
    """A head that reads one channel, which is made to be high in one corner."""
    model = vmamba()
    with torch.no_grad():
        model.head.fc.weight.zero_()
        model.head.fc.weight[1, 5] = 1.0
    features = torch.zeros(1, 3, 4, 32)
    features[0, 0, 3, 5] = 2.0
    model.norm.register_forward_hook(lambda *_: features.clone().requires_grad_())
    cam, _ = grad_cam(model, torch.randn(1, 3, 24, 32), torch.tensor([1]))
    assert cam[0, 0, -1] == cam.max() == 1
    assert cam[0, 12:, :16].abs().max() == 0


@pytest.mark.parametrize("token", ["middle", "head", "double", "none"])
def test_patches_reach_the_class_token_in_the_map(token):
    """Whatever the token's place, every patch has its cell: none is the token's."""
    model = vim(class_token=token, global_pool="avg" if token == "none" else "token")
    x = torch.randn(1, 3, 24, 32)
    cam, _ = grad_cam(model, x)
    assert cam.shape == (1, 24, 32)
    assert cam.max() > 0


def test_receptive_field_covers_the_image(model):
    """A scan sees all; influence is largest near the middle."""
    field = receptive_field(model, torch.randn(4, 3, 24, 32))
    assert field.shape == (24, 32)
    assert (field > 0).all()
    middle = field[8:20, 10:24].mean()
    assert middle > field[:4].mean()
    assert middle > field[-4:].mean()


def test_scan_orders():
    (_, ahead), (_, back) = scan_order(vim(), 8, 12)
    assert np.array_equal(ahead[:3], [[0, 0], [0, 1], [0, 2]])
    assert np.isnan(ahead[3]).all()  # 6 patches, the token after 3
    assert np.array_equal(back, ahead[::-1], equal_nan=True)
    orders = dict(scan_order(vmamba(), 16, 24))
    assert np.array_equal(orders["by columns"][:3], [[0, 0], [1, 0], [0, 1]])
    assert np.array_equal(orders["by rows, backwards"][0], [1, 2])


def test_explain_draws(run, pictures, tmp_path, capsys, in_full):
    words = ["vision", "explain", str(run), str(pictures / "red"), "--most", "5", "--device", "cpu"]
    assert main([*words, "-o", str(tmp_path / "e"), "--class-name", "red"]) == 0
    assert "the first 5 of 12" in capsys.readouterr().err
    for name in ("gradcam.png", "receptive_field.png", "scan_order.png"):
        assert Image.open(tmp_path / "e" / name).size[0] > 200
    assert main([*words, "-o", str(tmp_path / "f"), "--class-name", "pink"]) == 1
    assert "none of the model's classes: blue" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_features(run, pictures, tmp_path, capsys):
    words = ["vision", "features", str(run), "--device", "cpu"]
    red = pictures / "red"
    assert main([*words, str(red), "-o", str(tmp_path / "a.npy"), "--batch-size", "5"]) == 0
    assert main([*words, str(red), "-o", str(tmp_path / "a.parquet")]) == 0
    found, table = np.load(tmp_path / "a.npy"), pq.read_table(tmp_path / "a.parquet").to_pydict()
    model = load_image_model(run)
    assert found.shape == (12, model.head_hidden_size)
    assert np.allclose(found, table["embedding"], atol=1e-5)
    with (tmp_path / "a.names.tsv").open() as file:
        names = [row["image"] for row in csv.DictReader(file, delimiter="\t")]
    assert names == table["image"] == [str(red / f"{i}.png") for i in range(12)]

    table = tmp_path / "t.csv"
    rows = [f"{pictures}/{c}/{i}.png,{c},{'test' if i % 4 == 0 else 'train'}" for c in COLOURS for i in range(12)]
    table.write_text("image,label,part\n" + "\n".join(rows))
    assert main([*words, str(table), "-o", str(tmp_path / "b.npy"), "--probe"]) == 0
    said = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(said["10-NN"]) > 0.8  # colours are told apart even by random weights
    assert float(said["linear probe"]) > 0.8
    assert main([*words, str(pictures), "-o", str(tmp_path / "c.npy"), "--probe"]) == 1
    assert "divided into train and test" in capsys.readouterr().err
    assert main([*words, str(red), "-o", str(tmp_path / "a.txt")]) == 1
    (tmp_path / "cut.png").write_bytes((red / "0.png").read_bytes()[:300])
    capsys.readouterr()
    assert main([*words, str(red), str(tmp_path / "cut.png"), "-o", str(tmp_path / "d.npy")]) == 1
    assert "cut.png: a damaged image" in capsys.readouterr().err
    assert not (tmp_path / "d.npy").exists()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_export(run, tmp_path, suffix, capsys):
    path = tmp_path / f"m.{suffix}"
    assert main(["vision", "export", str(run), "-o", str(path), "--size", "24"]) == 0
    assert "100% of the same class" in capsys.readouterr().out
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["classes"], about["input_size"]) == (list(COLOURS), [3, 24, 24])
    assert about["parity"]["largest_difference"] < 1e-4
    if suffix == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes())
        x = torch.randn(5, 3, 24, 24)
        with torch.no_grad():
            expected = load_image_model(run)(x).numpy()
        assert np.allclose(session.run(None, {"image": x.numpy()})[0], expected, atol=1e-4)


def test_export_refuses(run, tmp_path, capsys):
    assert main(["vision", "export", str(run), "-o", str(tmp_path / "m.pb")]) == 1
    assert "name it .onnx or .pt2" in capsys.readouterr().err
