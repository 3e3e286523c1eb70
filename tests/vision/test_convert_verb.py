"""`polymamba convert vim|vmamba FILE OUT`: official files as they were released."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymamba.cli import main
from polymamba.vision import load_image_model

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["vim", "vmamba"])
def released(request, tmp_path):
    """(kind, a file as training scripts leave it: weights, their average, settings; its inputs and outputs)."""
    folder = GOLDEN / request.param
    weights = load_file(folder / "weights.safetensors")
    content = {
        "model": {k: torch.zeros_like(v) for k, v in weights.items()},
        "model_ema": weights,
        "args": argparse.Namespace(model=request.param, epochs=300),
        "epoch": 299,
    }
    torch.save(content, tmp_path / "released.pth")
    return request.param, tmp_path / "released.pth", load_file(folder / "io.safetensors")


def test_a_released_file(released, tmp_path, capsys):
    kind, path, io = released
    out = tmp_path / "out"
    assert main(["convert", kind, str(path), str(out)]) == 1
    assert "holds weights model, model_ema; say which with --weights" in capsys.readouterr().err
    assert not out.exists()
    assert main(["convert", kind, str(path), str(out), "--weights", "model_ema"]) == 0
    assert "taking the weights 'model_ema'" in capsys.readouterr().err
    with torch.no_grad():
        logits = load_image_model(out)(io["input"])
    assert torch.allclose(logits, io["out.logits"], atol=2e-5 * io["out.logits"].abs().max())
    assert json.loads((out / "config.json").read_text())["num_classes"] == 10


def test_folders_and_safetensors(released, tmp_path):
    kind, _, io = released
    weights = load_file(GOLDEN / kind / "weights.safetensors")
    save_file(weights, tmp_path / "w.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((GOLDEN / kind / "config.json").read_text())
    for i, source in enumerate((tmp_path / "w.safetensors", folder)):
        assert main(["convert", kind, str(source), str(tmp_path / f"{i}")]) == 0
        with torch.no_grad():
            logits = load_image_model(tmp_path / f"{i}")(io["input"])
        assert torch.allclose(logits, io["out.logits"], atol=2e-5 * io["out.logits"].abs().max())


def test_wrong_kind_and_leftovers_are_reported(released, tmp_path, capsys):
    kind, path, _ = released
    other = {"vim": "vmamba", "vmamba": "vim"}[kind]
    assert main(["convert", other, str(path), str(tmp_path / "o"), "--weights", "model"]) == 1
    assert "no VMamba checkpoint" in (said := capsys.readouterr().err) or "no Vim checkpoint" in said
    content = torch.load(path, weights_only=False)
    content["model"]["teacher.weight"] = torch.zeros(1)
    torch.save(content, path)
    assert main(["convert", kind, str(path), str(tmp_path / "o"), "--weights", "model"]) == 1
    assert "no place for teacher.weight" in capsys.readouterr().err
    assert main(["convert", "mamba-ssm", str(path), str(tmp_path / "o")]) == 1
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
