"""ByteLM: its ids, its sizes, its folder, and that generation can only ever write bytes."""

import re

import pytest
import torch

import polymamba
from polymamba.bytes import ByteLM, preset_config
from polymamba.bytes.config import DOCUMENT, N_IDS, VOCAB_SIZE
from polymamba.cli import main
from polymamba.core import BackboneConfig, InputError, LanguageModel, LanguageModelConfig, parameter_counts
from polymamba.core.config import SamplingConfig
from polymamba.core.generation import collect, generate


@pytest.mark.parametrize(("preset", "millions"), [("mambabyte-353m", 353.4), ("mambabyte-972m", 973.0)])
def test_published_sizes(preset, millions):
    """Parameters outside embedding and head, as arXiv 2401.13660 counts."""
    with torch.device("meta"):
        backbone = ByteLM(preset_config(preset)).backbone
    n_parameters = sum(p.numel() for p in backbone.parameters())
    assert n_parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [("mamba-25m", 27, 27), ("mamba-100m", 121, 121), ("moe-mamba-25m", 542, 26), ("moe-mamba-100m", 2439, 117)],
)
def test_published_sizes_of_moe_mamba(preset, total, active):
    """Parameters outside embedding and head in whole millions, as arXiv 2401.04081, table 9, counts."""
    with torch.device("meta"):
        counts = parameter_counts(ByteLM(preset_config(preset)).backbone)
    assert [round(n / 1e6) for n in counts] == [total, active]


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
    with pytest.raises(ValueError, match="next_byte_loss"):
        model(tokens, targets=tokens)


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


@pytest.fixture
def official() -> tuple[dict[str, torch.Tensor], dict]:
    """A checkpoint as MambaByte's code writes it, and its config: LayerNorm, 256 ids, a head of its own."""
    torch.manual_seed(3)
    backbone = BackboneConfig(d_model=16, n_layer=2, norm="layer")
    lm = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=256, tie_embeddings=False))
    for name, parameter in lm.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    weights = {re.sub("^embedding", "backbone.embedding", name): w for name, w in lm.state_dict().items()}
    return weights, {"d_model": 16, "n_layer": 2, "vocab_size": 256, "ssm_cfg": {}, "rms_norm": False}


def test_a_checkpoint_of_bytes_alone(official, tmp_path):
    model, plain = polymamba.convert("mambabyte", *official), polymamba.convert("mamba-ssm", *official)
    assert (type(model), type(plain)) == (ByteLM, LanguageModel)
    tokens = torch.randint(256, (2, 15))
    with torch.no_grad():
        expected = plain(tokens)
        assert torch.equal(model(tokens)[..., :256], expected)
        assert (model(tokens)[..., DOCUMENT] == -torch.inf).all()
        assert torch.equal(model(torch.tensor([[DOCUMENT, 65]])), model(torch.tensor([[10, 65]])))
        state = model.init_state(2)
        steps = torch.stack([model.step(tokens[:, t], state) for t in range(15)], 1)
    assert torch.allclose(steps[..., :256], expected, atol=1e-5)
    written = collect(generate(model, [torch.tensor([DOCUMENT])], 40, seeds=[0]))
    assert len(written[0]) == 40
    (tmp_path / "a.txt").write_bytes(b"Two documents.")
    (tmp_path / "b.txt").write_bytes(bytes(range(256)))
    model.save_pretrained(tmp_path / "m")
    assert main(["bytes", "eval", str(tmp_path / "m"), *map(str, tmp_path.glob("*.txt")), "--chunk", "7"]) == 0
    with pytest.raises(InputError, match="vocab_size is 320; a MambaByte model has 256"):
        polymamba.convert("mambabyte", official[0], {**official[1], "vocab_size": 320})


def test_configurations_that_make_no_sense():
    with pytest.raises(ValueError, match="vocab_size is 255"):
        ByteLM(LanguageModelConfig(backbone=BackboneConfig(d_model=8, n_layer=1), vocab_size=255))
    both_ways = BackboneConfig(d_model=8, n_layer=2, pattern=("mamba", "bimamba"))
    with pytest.raises(ValueError, match="causal"):
        ByteLM(LanguageModelConfig(backbone=both_ways, vocab_size=320))
