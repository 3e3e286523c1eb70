"""Checkpoints with anything in them are read, and nothing in them runs."""

import argparse
import collections
import io
import os
import pickle  # noqa: TID251 - to write files that are to be read safely
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from polymamba.core import InputError
from polymamba.core.unpickle import read_pickled, tensors_of


class CfgNode(dict):
    """As yacs': a dict with attributes beside its items."""

    def __init__(self, items):
        super().__init__(items)
        self.__dict__["frozen"] = True


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def weights():
    return {"a.weight": torch.randn(2, 3), "half": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)}


@pytest.mark.parametrize("new_format", [True, False])
def test_scripts_settings_are_read(tmp_path, new_format):
    path, model = tmp_path / "c.pth", weights()
    saved = {
        "model": model,
        "model_ema": collections.OrderedDict((k, v + 1) for k, v in model.items()),
        "args": argparse.Namespace(model="vim_tiny", lr=1e-3, output_dir=Path("/out")),
        "config": CfgNode({"MODEL": CfgNode({"DIMS": [96, 192]})}),
        "max_accuracy": np.float64(82.6),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(saved, path, _use_new_zipfile_serialization=new_format)
    content = read_pickled(path)
    assert (content["args"]["model"], content["args"]["lr"]) == ("vim_tiny", 1e-3)
    assert content["config"]["MODEL"]["DIMS"] == [96, 192]
    for choice, offset in (("model", 0), ("model_ema", 1)):
        found, name = tensors_of(content, choice, path)
        assert name == choice
        assert found.keys() == model.keys()
        assert all(torch.equal(found[k], model[k] + offset) for k in model)
    with pytest.raises(InputError, match="holds weights model, model_ema; say which"):
        tensors_of(content, None, path)
    with pytest.raises(InputError, match="no weights 'ema'; there are model, model_ema"):
        tensors_of(content, "ema", path)


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_runs(tmp_path, new_format):
    path, trap = tmp_path / "c.pth", tmp_path / "made"
    torch.save({"model": weights(), "x": Malicious(str(trap))}, path, _use_new_zipfile_serialization=new_format)
    torch.load(path, weights_only=False)  # what it would do
    assert trap.is_dir()
    trap.rmdir()
    assert tensors_of(read_pickled(path), None, path)[1] == "model"
    assert not trap.exists()


@pytest.mark.parametrize("name", ["builtins eval", "torch._utils _import_dotted_name", "torch load", "torch.hub load"])
def test_names_of_functions_are_stand_ins(tmp_path, name):
    module, function = name.split()
    stream = b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"X\x04\x00\x00\x001+11\x85R."
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("c/data.pkl", stream)
        archive.writestr("c/version", "3")
        archive.writestr("c/byteorder", "little")
    content = read_pickled(path)
    assert type(content).name == f"{module}.{function}"
    assert content == {}


def test_plain_state_dicts_and_what_is_none(tmp_path):
    path = tmp_path / "c.pth"
    torch.save(weights(), path)
    assert tensors_of(read_pickled(path), None, path)[1] == ""
    with pytest.raises(InputError, match="leave --weights out"):
        tensors_of(read_pickled(path), "model", path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(InputError, match="no state dict"):
        tensors_of(read_pickled(path), None, path)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1})[:-3], bytes(1000)])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"c\.pth: not a checkpoint"):
        read_pickled(path)
    buffer = io.BytesIO()
    torch.save({"model": weights()}, buffer)
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(InputError, match=r"c\.pth: not a checkpoint"):
        read_pickled(path)
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    with pytest.raises(InputError, match="TorchScript"):
        read_pickled(path)
    with pytest.raises(InputError, match="no such file"):
        read_pickled(tmp_path / "d.pth")
