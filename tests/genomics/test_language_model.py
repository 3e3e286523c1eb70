"""What sets the language models of DNA apart from core's: their heads."""

import pytest
import torch

from polymamba.genomics.alphabet import VOCAB_SIZE
from polymamba.genomics.caduceus import Caduceus
from polymamba.genomics.config import CaduceusConfig, DNALanguageModelConfig, language_model_config
from polymamba.genomics.language_model import DNALanguageModel


def causal(tie: bool) -> DNALanguageModel:
    backbone = language_model_config("tiny", "next", 32).backbone
    return DNALanguageModel(DNALanguageModelConfig(backbone=backbone, tie_embeddings=tie))


def masked(tie: bool) -> Caduceus:
    backbone = language_model_config("tiny", "masked", 32).backbone
    return Caduceus(CaduceusConfig(backbone=backbone, tie_embeddings=tie))


@pytest.mark.parametrize("make", [causal, masked])
@pytest.mark.parametrize("tie", [True, False])
def test_the_head_is_not_rounded(make, tie):
    torch.manual_seed(0)
    model = make(tie).eval()
    assert (model.lm_head.weight is model.embedding.weight) == tie
    assert sorted(name for name, _ in model.lm_head.named_parameters()) == ["weight"]
    torch.nn.init.normal_(model.lm_head.weight)
    hidden = torch.randn(2, 9, 64)
    truth, of_rounded = (h @ model.lm_head.weight.T for h in (hidden, hidden.bfloat16().float()))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.allclose(model.lm_head(hidden), truth, atol=1e-5)
        found = model.lm_head(hidden.bfloat16())
        assert found.dtype == torch.float32
        assert torch.allclose(found, of_rounded, atol=1e-5)
        assert model(torch.randint(7, VOCAB_SIZE, (1, 9))).dtype == torch.float32
    assert model.double().lm_head(hidden.double()).dtype == torch.float64


def test_each_way_of_sight_has_its_model():
    for objective, other in (("next", "masked"), ("masked", "next")):
        backbone = language_model_config("tiny", objective, 32).backbone
        with pytest.raises(ValueError, match=f"objective {other}: a masked model has a bidirectional backbone"):
            DNALanguageModelConfig(backbone=backbone, objective=other)
