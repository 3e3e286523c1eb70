"""Bits per byte against a plain sum over each document alone, at any chunk; causality; what it is compared with."""

import lzma
import math
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from polymamba.bytes import ByteLM, check_causality, score
from polymamba.bytes.config import DOCUMENT
from polymamba.bytes.evaluation import order0_bits_per_byte, xz_bits_per_byte
from polymamba.bytes.plots import size_name
from polymamba.core import BackboneConfig, InputError, LanguageModelConfig


def bits_of_each_byte(model, data: bytes) -> list[float]:
    """From a step at a time."""
    state, bits, previous = model.init_state(1), [], DOCUMENT
    for byte in data:
        probabilities = model.step(torch.tensor([previous]), state).double().softmax(-1)[0]
        bits.append(-math.log2(probabilities[byte]))
        previous = byte
    return bits


def bytes_of(documents) -> list[bytes]:
    return [document.path.read_bytes() for document in documents.documents]


@pytest.mark.parametrize("chunk", [1, 2, 37, 203, 8192])
def test_equal_at_any_chunk(model, documents, chunk):
    expected = [bits_of_each_byte(model, data) for data in bytes_of(documents)]
    advanced = []
    result = score(model, documents, chunk=chunk, advance=advanced.append)
    assert sum(advanced) == result.n_bytes == documents.n_bytes
    assert result.bits == pytest.approx(sum(map(sum, expected)), rel=1e-5)
    assert result.n_words == sum(len(data.split()) for data in bytes_of(documents))
    nats = result.bits * math.log(2)
    assert result.word_perplexity == pytest.approx(math.exp(nats / result.n_words), rel=1e-9)
    octaves = [[bits for document in expected for bits in document[2**k - 1 : 2 ** (k + 1) - 1]] for k in range(8)]
    rows = result.by_position()
    assert [(row["from"], row["bytes"]) for row in rows] == [(2**k, len(o)) for k, o in enumerate(octaves)]
    assert [row["bits_per_byte"] for row in rows] == pytest.approx([np.mean(o) for o in octaves], rel=1e-4)


@pytest.mark.parametrize("chunk", [2, 37, 8192])
def test_attention_beside_mamba(documents, chunk):
    """Its state grows, and ends with the document."""
    torch.manual_seed(1)
    backbone = BackboneConfig(d_model=16, n_layer=3, d_state=4, n_heads=2, pattern=("mamba", "attention", "mlp"))
    model = ByteLM(LanguageModelConfig(backbone=backbone, vocab_size=320, tie_embeddings=False)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    check_causality(model)
    expected = sum(sum(bits_of_each_byte(model, data)) for data in bytes_of(documents))
    assert score(model, documents, chunk=chunk).bits == pytest.approx(expected, rel=1e-5)


def test_documents_do_not_know_of_each_other(model, as_documents, tmp_path):
    texts = [b"one", b"another document", b"3"]
    alone = [score(model, as_documents(tmp_path / str(i), [text])).bits for i, text in enumerate(texts)]
    assert score(model, as_documents(tmp_path / "all", texts)).bits == pytest.approx(sum(alone), rel=1e-5)


def test_no_words(model, as_documents, tmp_path):
    result = score(model, as_documents(tmp_path / "d", [b" \n"]))
    assert (result.n_words, result.word_perplexity) == (0, math.inf)


def test_a_causal_model_passes(model):
    check_causality(model)


@pytest.mark.parametrize("ahead", [1, 40])
def test_a_model_that_sees_the_future_is_refused(model, ahead):
    class Leaky(type(model)):
        def forward(self, tokens, *args, **options):
            logits = super().forward(tokens, *args, **options)
            hint = torch.roll(tokens, -ahead, 1)[..., None] == torch.arange(logits.shape[-1])
            return logits + 0.01 * hint

    model.__class__ = Leaky
    with pytest.raises(InputError, match="sees the future: changing byte"):
        check_causality(model)


def test_predictions_that_are_no_numbers(model, documents):
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        check_causality(model)
    with pytest.raises(InputError, match="not finite"):
        score(model, documents)


def test_what_it_is_compared_with(documents):
    data = b"".join(bytes_of(documents))
    counts = Counter(data)
    shares = [[counts[byte] / len(data) for byte in sorted(counts)]] * len(data)
    assert order0_bits_per_byte(documents) == pytest.approx(
        log_loss(list(data), shares, labels=sorted(counts)) / math.log(2)
    )
    assert xz_bits_per_byte(documents) == pytest.approx(8 * len(lzma.compress(data, preset=9)) / len(data))


def test_sizes_on_the_axis():
    assert [size_name(16**k) for k in range(8)] == ["1", "16", "256", "4K", "64K", "1M", "16M", "256M"]
