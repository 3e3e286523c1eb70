"""ByteLM: its ids, its sizes, its folder, and that generation can only ever write bytes."""

import pytest
import torch

from polymamba.bytes import ByteLM, preset_config
from polymamba.bytes.config import DOCUMENT, N_IDS, PRESETS, VOCAB_SIZE
from polymamba.core import BackboneConfig, InputError, LanguageModel, LanguageModelConfig
from polymamba.core.config import SamplingConfig
from polymamba.core.generation import collect, generate


@pytest.mark.parametrize(("preset", "millions"), [("mambabyte-353m", 353.4), ("mambabyte-972m", 973.0)])
def test_published_sizes(preset, millions):
    """Parameters outside embedding and head, as arXiv 2401.13660 counts; its norms have biases, which ours have not."""
    with torch.device("meta"):
        backbone = ByteLM(preset_config(preset)).backbone
    config = PRESETS[preset]
    biases = (config.n_layer + 1) * config.d_model
    n_parameters = sum(p.numel() for p in backbone.parameters()) + biases
    assert n_parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 0.5), ("small", 5.6), ("base", 27)])
def test_sizes_that_the_help_gives(preset, millions):
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in ByteLM(preset_config(preset)).parameters())
    assert n_parameters / 1e6 == pytest.approx(millions, rel=0.1)


def test_only_bytes_and_the_mark_are_predicted(model):
    assert VOCAB_SIZE % 64 == 0
    assert DOCUMENT == N_IDS - 1 == 256
    tokens = torch.randint(N_IDS, (2, 7))
    logits, state = model(tokens, return_state=True)
    assert logits.shape == (2, 7, N_IDS)
    with torch.no_grad():
        model.lm_head.weight[N_IDS:] = 1e4  # what pads the head
        assert torch.equal(model(tokens), logits)
        assert model.step(tokens[:, 0], state).shape == (2, N_IDS)
    hot = SamplingConfig(temperature=5.0)
    written = collect(generate(model, [torch.tensor([DOCUMENT])] * 3, 50, hot, seeds=[1, 2, 3]))
    assert max(map(max, written)) < N_IDS


def test_step_equals_forward(model):
    tokens = torch.randint(N_IDS, (3, 19))
    whole, state = model(tokens), model.init_state(3)
    for i in range(19):
        assert torch.allclose(model.step(tokens[:, i], state), whole[:, i], atol=1e-5)


def test_a_folder_holds_it(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    again = ByteLM.from_pretrained(tmp_path / "m")
    tokens = torch.randint(N_IDS, (1, 9))
    assert torch.equal(again(tokens), model(tokens))
    with pytest.raises(InputError, match="holds ByteLM, but a LanguageModel is wanted"):
        LanguageModel.from_pretrained(tmp_path / "m")


def test_configurations_that_make_no_sense():
    with pytest.raises(ValueError, match="vocab_size is 256"):
        ByteLM(LanguageModelConfig(backbone=BackboneConfig(d_model=8, n_layer=1), vocab_size=256))
    both_ways = BackboneConfig(d_model=8, n_layer=2, pattern=("mamba", "bimamba"))
    with pytest.raises(ValueError, match="causal"):
        ByteLM(LanguageModelConfig(backbone=both_ways, vocab_size=320))
