"""Bits of bases against plain loops over single forwards; along a sequence in pieces against one shot."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.core.config import BackboneConfig, LanguageModelConfig
from polymamba.core.errors import InputError
from polymamba.core.language_model import LanguageModel
from polymamba.genomics import evaluation
from polymamba.genomics.alphabet import BOS, MASK, VOCAB_SIZE, A, N, T
from polymamba.genomics.baselines import order_bits
from polymamba.genomics.evaluation import STRIDE, Reader, Score, causal_bits, masked_bits, score_windows
from polymamba.genomics.parts import Stretch
from polymamba.genomics.reading.genome import Genome
from polymamba.genomics.tokenizers import CHARACTERS, KMers


def model_of(mixer: str) -> LanguageModel:
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=16, n_layer=2, d_state=4, pattern=(mixer,))
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=VOCAB_SIZE, tie_embeddings=False))
    return model.double().eval()


@pytest.fixture(scope="module")
def causal():
    return model_of("mamba")


@pytest.fixture(scope="module")
def both_ways():
    return model_of("bimamba")


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("genome"), np.random.default_rng(0)
    letters = rng.choice(list("ACGTacgtN"), 400, p=[0.2] * 4 + [0.04] * 4 + [0.04])
    (folder / "x.fa").write_text(f">x\n{''.join(letters)}\n>y\nACGTacNtAC\n")
    with Genome([folder / "x.fa"]) as genome:
        yield genome


def bits_of(model, inputs: list[int], place: int, token: int) -> float:
    """-log2 of the probability that a model gives a token at a place."""
    with torch.no_grad():
        return -float(model(torch.tensor([inputs]))[0, place].log_softmax(-1)[token]) / math.log(2)


def is_base(token: int) -> bool:
    return A <= token <= T


def causally(model, tokens: list[int]) -> list[float]:
    """Bits of each base, nan for N, by a forward for each over what stands before it."""
    read = [BOS, *tokens]
    return [bits_of(model, read[: i + 1], i, t) if is_base(t) else math.nan for i, t in enumerate(tokens)]


def hidden(model, tokens: list[int], first: int) -> list[float]:
    """Bits of each base, nan for N, hidden with every STRIDE-th one of its window, which begins at `first`."""
    bits = []
    for i, token in enumerate(tokens):
        inputs = [MASK if (j - i) % STRIDE == 0 and is_base(t) else t for j, t in enumerate(tokens)]
        bits.append(bits_of(model, inputs, i, token) if is_base(token) else math.nan)
    return bits


@pytest.mark.parametrize("chunk", [1, 13, 64, 1000])
def test_along_a_sequence_causally(chunk, genome, causal):
    tokens = genome.tokens(0, 100, 220)[0].tolist()
    found = list(causal_bits(reader(causal), genome.pieces(0, 100, 220, chunk)))
    assert [start for start, _ in found] == list(range(100, 220, chunk))
    np.testing.assert_allclose(np.concatenate([bits for _, bits in found]), causally(causal, tokens), rtol=1e-5)


def test_along_a_sequence_masked_in_one_window(genome, both_ways):
    """As long as all fits into one window, the figures are those of one shot."""
    tokens = genome.tokens(0, 10, 80)[0].tolist()
    found = list(masked_bits(reader(both_ways, "masked"), genome, 0, 10, 80, window=90, overlap=20, max_tokens=1000))
    assert [start for start, _ in found] == [10]
    np.testing.assert_allclose(found[0][1], hidden(both_ways, tokens, 10), rtol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(0, 39), st.integers(1, 200), st.integers(0, 60), st.integers(1, 90))
def test_along_a_sequence_masked_in_windows(genome, both_ways, window, overlap, max_tokens, start, size):
    end = start + size
    if overlap >= window:
        with pytest.raises(ValueError, match="must be at least 0 and less than the window"):
            list(
                masked_bits(
                    reader(both_ways, "masked"), genome, 0, start, end, window=window, overlap=overlap, max_tokens=9
                )
            )
        return
    found = list(
        masked_bits(
            reader(both_ways, "masked"), genome, 0, start, end, window=window, overlap=overlap, max_tokens=max_tokens
        )
    )
    at = start
    for left, bits in found:
        assert left == at
        right = at = left + len(bits)
        assert right - left == min(window - overlap, end - left)
        first, last = max(start, left - overlap // 2), min(end, right + overlap - overlap // 2)
        assert last - first <= window
        if left in (start, found[-1][0]):  # the others would take long
            tokens = genome.tokens(0, first, last)[0].tolist()
            truth = hidden(both_ways, tokens, first)[left - first : right - first]
            np.testing.assert_allclose(bits, truth, rtol=1e-4)
    assert at == end


def reader(model, objective="next", tokenizer=CHARACTERS) -> Reader:
    return Reader(model, tokenizer, objective)


WINDOWS = [(0, 0, 30), (0, 200, 30), (1, 0, 10), (0, 370, 17)]


@pytest.mark.parametrize(("max_tokens", "chunk"), [(1, 65_536), (61, 65_536), (10_000, 65_536), (10_000, 13)])
def test_windows_causally(max_tokens, chunk, genome, causal, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", chunk)
    bits = np.concatenate([causally(causal, genome.tokens(c, s, s + n)[0].tolist()) for c, s, n in WINDOWS])
    seen = []
    found = score_windows(reader(causal), genome, WINDOWS, max_tokens, advance=seen.append)
    assert found.n_bases == np.sum(~np.isnan(bits))
    assert found.bits == pytest.approx(np.nansum(bits), rel=1e-5)
    assert sum(seen) == 87


@pytest.mark.parametrize("max_tokens", [1, 61, 10_000])
def test_windows_masked(max_tokens, genome, both_ways):
    """One base in STRIDE is asked; which ones does not matter much, as an untrained model's figures are much alike."""
    found = score_windows(reader(both_ways, "masked"), genome, WINDOWS * 7, max_tokens)
    bits = np.concatenate([hidden(both_ways, genome.tokens(c, s, s + n)[0].tolist(), s) for c, s, n in WINDOWS])
    assert found.n_bases == pytest.approx(np.sum(~np.isnan(bits)), rel=0.15)
    assert found.bits_per_base == pytest.approx(np.nanmean(bits), rel=0.02)


def test_what_a_score_says():
    score = Score(0, 0.0).plus(np.array([2.0, math.nan, 1.0]))
    assert score == (2, 3.0)
    assert score.bits_per_base == 1.5
    assert score.perplexity == pytest.approx(2**1.5)
    assert score.log_likelihood == pytest.approx(-3 * math.log(2))
    assert math.isnan(Score(0, 0.0).bits_per_base)


def test_predictions_that_are_no_numbers(genome):
    broken = model_of("mamba")
    broken.lm_head.weight.data[A] = math.nan
    with pytest.raises(InputError, match="predictions are not finite"):
        list(causal_bits(reader(broken), genome.pieces(0, 0, 10)))
    with pytest.raises(InputError, match="predictions are not finite"):
        score_windows(reader(broken), genome, WINDOWS, 1000)


def test_kmers_along_a_sequence(genome):
    """Pieces that are whole k-mers give what one piece does; a token's bits are spread over its bases."""
    torch.manual_seed(2)
    kmers = KMers(3)
    backbone = BackboneConfig(d_model=16, n_layer=1, d_state=4)
    config = LanguageModelConfig(backbone=backbone, vocab_size=kmers.vocab_size, tie_embeddings=False)
    model = LanguageModel(config).double().eval()
    found = [
        np.concatenate([bits for _, bits in causal_bits(reader(model, tokenizer=kmers), genome.pieces(0, 0, 400, n))])
        for n in (60, 1000)
    ]
    tokens = genome.tokens(0, 0, 400)[0]
    ids, sizes = kmers.encode(tokens)
    truth = [bits_of(model, [BOS, *ids[:i].tolist()], i, int(t)) if t != N else math.nan for i, t in enumerate(ids)]
    np.testing.assert_allclose(found[1], np.repeat(np.array(truth) / sizes, sizes), rtol=1e-5)
    assert np.array_equal(np.isnan(found[1]), tokens == N)
    aligned = [len(list(kmers.encode(tokens[: 60 * k])[0])) for k in (1, 2)]
    assert aligned[0] < aligned[1]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


# Counting


def witten_bell(train: list[str], test: list[str], order: int) -> float:
    """Bits per base, by a dictionary and a recursion."""
    counts: dict[str, dict[str, int]] = {}
    for text in train:
        for i in range(order, len(text)):
            gram = text[i - order : i + 1]
            if "N" not in gram:
                for n in range(order + 1):
                    of_context = counts.setdefault(gram[order - n : -1], {})
                    of_context[gram[-1]] = of_context.get(gram[-1], 0) + 1

    def p(context: str, base: str) -> float:
        lower = p(context[1:], base) if context else 0.25
        seen = counts.get(context, {})
        total = sum(seen.values())
        return (seen.get(base, 0) + len(seen) * lower) / (total + len(seen)) if total else lower

    bits = []
    for text in test:
        for i, base in enumerate(text):
            if base != "N":
                before = text[max(0, i - order) : i]
                bits.append(-math.log2(p(before[before.rfind("N") + 1 :], base)))
    return sum(bits) / len(bits)


@settings(max_examples=30, deadline=None)
@given(
    st.text("ACGTN", min_size=8, max_size=120),
    st.text("ACGTN", max_size=60).map("A{}".format),
    st.integers(0, 4),
    st.integers(1, 50),
)
def test_orders_against_a_dictionary(tmp_path_factory, train, test, order, piece):
    folder = tmp_path_factory.mktemp("g")
    (folder / "x.fa").write_text(f">train\n{train}\n>test\n{test}\n")
    with Genome([folder / "x.fa"]) as genome, pytest.MonkeyPatch.context() as patch:
        patch.setattr("polymamba.genomics.baselines._PIECE", piece)
        cut = len(train) // 2
        stretches = [Stretch(0, 0, cut, "train"), Stretch(0, cut, len(train), "train")]
        seen = []
        found = order_bits(genome, stretches, [Stretch(1, 0, len(test), "test")], order, advance=seen.append)
    assert len(found) == order + 1
    assert found[order] == pytest.approx(witten_bell([train[:cut], train[cut:]], [test], order))
    assert sum(seen) == len(train) + len(test)
