import numpy as np
import pytest
import torch
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st

from polymamba.genomics import alphabet
from polymamba.genomics.alphabet import COMPLEMENT, TOKEN_NAMES, complement, decode, reverse_complement, tokenize

DNA = st.text("ACGTNacgtn")
IUPAC = "ACGTURYSWKMBDHVN"


def test_vocabulary_is_that_of_hyena_dna_and_caduceus():
    # from their tokenizer: special tokens 0 to 6, then the characters given to it, "ACGTN"
    names = ["CLS", "SEP", "BOS", "MASK", "PAD", "RESERVED", "UNK", "A", "C", "G", "T", "N"]
    assert {name: getattr(alphabet, name) for name in names} == {name: i for i, name in enumerate(names)}
    assert [name.strip("[]") for name in TOKEN_NAMES] == names
    assert alphabet.VOCAB_SIZE == 12


@given(st.text(IUPAC + IUPAC.lower()))
def test_policy_for_case_u_and_ambiguity_codes(sequence):
    by_hand = {"A": 7, "C": 8, "G": 9, "T": 10, "U": 10}
    ids = tokenize(sequence)
    assert ids.dtype == np.uint8
    assert ids.tolist() == [by_hand.get(letter.upper(), 11) for letter in sequence]
    assert np.array_equal(ids, tokenize(sequence.encode()))


@pytest.mark.parametrize("illegal", ["-", ".", "*", " ", "\t", "\n", "\r", "\0", "1", "E", "x", "é", "漢", "😀"])
@pytest.mark.parametrize("before", ["", "ACGTRYacgtry", "N" * 1000])
def test_error_names_character_and_position(illegal, before):
    with pytest.raises(ValueError, match="A C G T U N") as error:
        tokenize(before + illegal + "AC*")
    assert str(error.value).startswith(f"{illegal!r} at position {len(before) + 1} ")
    assert error.value.position == len(before) + 1


def test_every_byte_is_either_a_letter_of_the_policy_or_refused():
    letters = {ord(letter) for letter in IUPAC + IUPAC.lower()}
    for byte in range(256):
        if byte in letters:
            tokenize(bytes([byte]))
        else:
            with pytest.raises(ValueError, match="position 1"):
                tokenize(bytes([byte]))


@given(DNA)
def test_reverse_complement_equals_biopython(sequence):
    assert decode(reverse_complement(tokenize(sequence))) == str(Seq(sequence.upper()).reverse_complement())
    assert decode(complement(tokenize(sequence))) == str(Seq(sequence.upper()).complement())


@given(st.text(IUPAC + IUPAC.lower()))
def test_reverse_complement_of_ambiguity_codes_equals_biopython(sequence):
    assert np.array_equal(reverse_complement(tokenize(sequence)), tokenize(str(Seq(sequence).reverse_complement())))
    assert np.array_equal(complement(tokenize(sequence)), tokenize(str(Seq(sequence).complement())))


@given(st.lists(st.integers(0, 11)))
def test_reverse_complement_is_its_own_inverse_and_keeps_specials(tokens):
    ids = np.array(tokens, dtype=np.uint8)
    assert np.array_equal(reverse_complement(reverse_complement(ids)), ids)
    assert np.array_equal(complement(ids)[ids < 7], ids[ids < 7])


def test_reverse_complement_of_a_batch_is_that_of_each_row():
    ids = np.random.default_rng(0).integers(7, 12, (3, 5, 17)).astype(np.uint8)
    result = reverse_complement(ids)
    assert result.flags.c_contiguous  # so that torch.from_numpy takes it
    for row, expected in zip(result.reshape(-1, 17), ids.reshape(-1, 17), strict=True):
        assert np.array_equal(row, reverse_complement(expected))


def test_complement_table_on_torch_tensors():
    ids = torch.arange(12)
    assert torch.equal(torch.tensor(COMPLEMENT)[ids], torch.from_numpy(complement(ids.numpy()).astype(np.int64)))


def test_decode_names_special_tokens():
    assert decode(np.array([0, 7, 3, 11, 4])) == "[CLS]A[MASK]N[PAD]"
    assert decode(tokenize("acgtuNry")) == "ACGTTNNN"
