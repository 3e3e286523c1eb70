"""Likelihood ratios against a scorer that writes every sequence out and asks the model base by base."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.core.config import BackboneConfig, LanguageModelConfig
from polymamba.core.language_model import LanguageModel
from polymamba.genomics.alphabet import BOS, MASK, TOKEN_NAMES, VOCAB_SIZE, tokenize
from polymamba.genomics.variant_effects import Site, flank, llrs

COMPLEMENT = str.maketrans("ACGTN", "TGCAN")
TOKEN = {name: i for i, name in enumerate(TOKEN_NAMES)}


def model_of(mixer: str) -> LanguageModel:
    torch.manual_seed(1)
    backbone = BackboneConfig(d_model=16, n_layer=2, d_state=4, pattern=(mixer,))
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=VOCAB_SIZE, tie_embeddings=False))
    for parameter in (model.embedding.weight, model.lm_head.weight):
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


@pytest.fixture(scope="module")
def causal():
    return model_of("mamba")


@pytest.fixture(scope="module")
def both_ways():
    return model_of("bimamba")


def log_p(model, inputs: list[int], place: int, token: int) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([inputs]))[0, place].log_softmax(-1)[token])


def causally(model, before: str, alleles: list[str], after: str, window: int) -> list[float]:
    prefix = before[max(0, len(before) - window // 2) :]
    rests = [(allele + after)[: window - window // 2] for allele in alleles]
    n = min(map(len, rests))
    found = []
    for rest in rests:
        read = [BOS, *(TOKEN[c] for c in prefix + rest)]
        places = range(len(prefix), len(prefix) + n)
        found.append(sum(log_p(model, read[: i + 1], i, read[i + 1]) for i in places if read[i + 1] != TOKEN["N"]))
    return [one - found[0] for one in found[1:]]


def masked(model, before: str, alleles: list[str], after: str, window: int) -> list[float]:
    prefix = before[max(0, len(before) - window // 2) :]

    def likelihood(allele: str, n: int) -> float:
        whole = (prefix + allele + after)[: len(prefix) + max(window - window // 2, n)]
        total = 0.0
        for place in range(len(prefix), len(prefix) + n):
            if whole[place] != "N":
                tokens = [TOKEN[c] for c in whole]
                tokens[place] = MASK
                total += log_p(model, tokens, place, TOKEN[whole[place]])
        return total

    found = []
    for allele in alleles[1:]:
        n = max(len(alleles[0]), len(allele))
        n = min(n, len(allele + after), len(alleles[0] + after))
        found.append(likelihood(allele, n) - likelihood(alleles[0], n))
    return found


def reversed_complement(text: str) -> str:
    return text.translate(COMPLEMENT)[::-1]


BASES = st.text("ACGT", min_size=1, max_size=4)
SITES = st.lists(
    st.tuples(
        st.text("ACGTN", max_size=7),
        st.lists(BASES | st.sampled_from("ACGT"), min_size=2, max_size=4, unique=True),
        st.text("ACGTN", max_size=7),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize(("objective", "truth"), [("next", causally), ("masked", masked)])
@settings(max_examples=12, deadline=None)
@given(SITES, st.integers(8, 16), st.sampled_from([1, 40, 10_000]), st.booleans())
def test_against_brute_force(objective, truth, causal, both_ways, sites, window, max_tokens, both_strands):
    model = causal if objective == "next" else both_ways
    given_sites = [
        Site(tokenize(before)[-flank(window) :], tokenize(after)[: flank(window)], [tokenize(a) for a in alleles])
        for before, alleles, after in sites
    ]
    found = llrs(model, given_sites, objective, window, max_tokens, both_strands=both_strands)
    assert len(found) == len(sites)
    for of_site, (before, alleles, after) in zip(found, sites, strict=True):
        before, after = before[-flank(window) :], after[: flank(window)]
        wanted = truth(model, before, alleles, after, window)
        if both_strands:
            turned = [reversed_complement(text) for text in (after, before)]
            other = truth(model, turned[0], list(map(reversed_complement, alleles)), turned[1], window)
            wanted = [(one + two) / 2 for one, two in zip(wanted, other, strict=True)]
        assert of_site == pytest.approx(wanted, abs=1e-5)
        assert all(math.isfinite(value) for value in of_site)


def test_a_reference_that_equals_the_allele_has_no_effect(causal, both_ways):
    site = Site(tokenize("ACGTT"), tokenize("GGCAT"), [tokenize("CA"), tokenize("CA")])
    for model, objective in ((causal, "next"), (both_ways, "masked")):
        (found,) = llrs(model, [site], objective, 10, 1000, both_strands=True)
        assert np.allclose(found, 0, atol=1e-6)


def test_substitutions_of_a_place_are_one_forward_of_a_masked_model(both_ways, monkeypatch):
    rows = []
    forward = both_ways.forward
    monkeypatch.setattr(both_ways, "forward", lambda tokens, **o: rows.append(len(tokens)) or forward(tokens, **o))
    site = Site(tokenize("ACGTTAAC"), tokenize("GGCATTTT"), [tokenize(base) for base in "CAGT"])
    llrs(both_ways, [site], "masked", 16, 1000, both_strands=False)
    assert rows == [1]
