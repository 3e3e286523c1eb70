"""Tokens against slow and plain cutting; no base is lost by any of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import VOCAB_SIZE, A, N, decode, tokenize
from polymamba.genomics.config import language_model_config
from polymamba.genomics.tokenizers import (
    CHARACTERS,
    BytePairs,
    KMers,
    is_asked,
    load_tokenizer,
    per_base,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def pairs() -> BytePairs:
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(["TATA", "GC", "A", "CAT"], 4000))
    return BytePairs.learned([tokenize(text), tokenize("NNACGTN")], 40)


def spelled(text: str, k: int) -> list[str]:
    """k-mers as strings, those that cannot be as letters."""
    cut = [text[i : i + k] for i in range(0, len(text), k)]
    return [token for one in cut for token in ([one] if len(one) == k and "N" not in one else one)]


def kmer_id(word: str) -> int:
    if len(word) == 1:
        return int(tokenize(word)[0])
    return VOCAB_SIZE + sum(4**i * "ACGT".index(base) for i, base in enumerate(reversed(word)))


@given(st.text("ACGTN", max_size=60), st.integers(2, 7))
def test_kmers(text, k):
    kmers = KMers(k)
    ids, sizes = kmers.encode(tokenize(text))
    words = spelled(text, k)
    assert ids.tolist() == [kmer_id(word) for word in words]
    assert sizes.tolist() == [len(word) for word in words]
    assert decode(kmers.decode(ids)) == text
    assert is_asked(ids).tolist() == [word != "N" for word in words]
    assert (ids < kmers.vocab_size).all()


def test_single_kmers_are_characters_by_another_id():
    ids, sizes = KMers(1).encode(tokenize("ACGTN"))
    assert ids.tolist() == [12, 13, 14, 15, N]
    assert sizes.tolist() == [1] * 5


@settings(max_examples=50, deadline=None)
@given(
    text=st.text("ACGTN", max_size=90)
    | st.lists(st.sampled_from(["TATA", "GC", "N", "CAT"]), max_size=400).map("".join)
)
def test_byte_pairs(pairs, text):
    bases = tokenize(text)
    ids, sizes = pairs.encode(bases)
    assert decode(pairs.decode(ids)) == text
    assert sizes.sum() == len(text)
    assert (ids < pairs.vocab_size).all()
    at = 0
    for id, size in zip(ids.tolist(), sizes.tolist(), strict=True):
        assert decode(pairs.decode(np.array([id]))) == text[at : at + size]
        at += size


def test_byte_pairs_are_what_occurs_often(pairs):
    assert 12 < pairs.vocab_size <= 40
    ids, sizes = pairs.encode(tokenize("TATA" * 20))
    assert sizes.mean() > 3
    assert max(ids) >= VOCAB_SIZE
    assert (
        BytePairs(pairs.description).encode(tokenize("TATAGC"))[0].tolist()
        == pairs.encode(tokenize("TATAGC"))[0].tolist()
    )


def test_characters():
    bases = tokenize("ACGN")
    assert CHARACTERS.encode(bases)[0] is bases
    assert CHARACTERS.decode(bases).tolist() == bases.tolist()
    assert is_asked(bases).tolist() == [True, True, True, False]
    assert not is_asked(np.arange(A)).any()


def test_values_of_tokens_spread_over_bases():
    assert per_base(np.array([3.0, 1.0, np.nan]), np.array([3, 1, 1]))[:4].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert np.isnan(per_base(np.array([np.nan]), np.array([2]))).tolist() == [True, True]


def test_in_a_run_folder(pairs, tmp_path):
    save_tokenizer(tmp_path, pairs)
    config = language_model_config("tiny", "next", 32, tokenizer="bpe", vocab_size=pairs.vocab_size)
    again = load_tokenizer(tmp_path, config)
    assert again.encode(tokenize("TATAGCN"))[0].tolist() == pairs.encode(tokenize("TATAGCN"))[0].tolist()
    for damage, wanted in (("{", "not a tokenizer"), ('{"model": 3}', "not a tokenizer"), (None, "cannot be read")):
        path = tmp_path / "tokenizer.json"
        path.write_text(damage) if damage else path.unlink()
        with pytest.raises(InputError, match=wanted) as error:
            load_tokenizer(tmp_path, config)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)


def test_a_tokenizer_of_other_letters():
    import tokenizers

    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.train_from_iterator(["hello"], tokenizers.trainers.BpeTrainer(vocab_size=9, show_progress=False))
    with pytest.raises(ValueError, match="of other letters than A, C, G and T"):
        BytePairs(other.to_str())


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"needs tokenizers \(pip install 'polymamba\[bpe\]'\)"):
        BytePairs.learned([], 20)
