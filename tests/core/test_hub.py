import json
import pickle  # noqa: TID251 - to show that it is not read

import pytest
import torch

from polymamba.core import BackboneConfig, InputError, LanguageModel, LanguageModelConfig


@pytest.fixture
def saved(tmp_path):
    config = LanguageModelConfig(backbone=BackboneConfig(d_model=8, n_layer=1, d_state=2), vocab_size=5)
    model = LanguageModel(config)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_round_trip(saved):
    model, folder = saved
    again = LanguageModel.from_pretrained(folder)
    assert again.config == model.config
    assert not again.training
    assert again.lm_head.weight is again.embedding.weight
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("pattern", [("attention", "mlp"), ("mamba", "lru")])
def test_reading_a_model_draws_no_random_numbers(pattern, tmp_path):
    backbone = BackboneConfig(d_model=8, n_layer=2, pattern=pattern)
    LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=5)).save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    LanguageModel.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


def test_refuses_what_is_no_such_model(saved, tmp_path):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str):
        return pytest.raises(InputError, match=match)

    with refused("neither a folder here nor a model on the hub"):
        LanguageModel.from_pretrained(tmp_path / "nowhere", local_files_only=True)
    (tmp_path / "empty").mkdir()
    with refused(r"no config\.json"):
        LanguageModel.from_pretrained(tmp_path / "empty")
    with refused("a file"):
        LanguageModel.from_pretrained(folder / "config.json")
    for content, match in (
        ("{", "not JSON"),
        ("[]", "no polymamba model"),
        (json.dumps({"model_type": "bert"}), "no polymamba model"),
        (json.dumps({**config, "model": "DNAClassifier"}), "holds DNAClassifier, but a LanguageModel"),
        (json.dumps({**config, "colour": "red"}), "colour"),
        (json.dumps({**config, "vocab_size": 6}), "not the weights of this model"),
    ):
        (folder / "config.json").write_text(content)
        with refused(match):
            LanguageModel.from_pretrained(folder)


def test_never_runs_a_pickle(saved, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    _, folder = saved
    (folder / "model.safetensors").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(InputError, match="not the weights"):
        LanguageModel.from_pretrained(folder)
    assert not (tmp_path / "owned").exists()
