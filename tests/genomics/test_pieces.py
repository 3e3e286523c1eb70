"""`predict` and `embed` over more than fits in one go: the same results, bounded memory, nothing left half-written."""

import csv
import io
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics import pieces as pieces_module
from polymamba.genomics.alphabet import decode
from polymamba.genomics.pieces import Piece, Pieces, in_chunks
from polymamba.genomics.reading.source import opened
from polymamba.genomics.verbs import predict as verb


def random_dna(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGT"), length))


@pytest.fixture
def records(tmp_path) -> dict[str, str]:
    """Name -> sequence of what stands in records.fa."""
    rng = np.random.default_rng(0)
    records = {f"r{i}": random_dna(rng, int(n)) for i, n in enumerate(rng.integers(1, 90, size=23))}
    (tmp_path / "records.fa").write_text("".join(f">{name}\n{text}\n" for name, text in records.items()))
    return records


@given(lengths=st.lists(st.integers(1, 30), max_size=40), batch_size=st.integers(1, 5), max_tokens=st.integers(1, 60))
def test_chunks(lengths, batch_size, max_tokens):
    bucket = pieces_module.BUCKET
    pieces = [Piece(str(i), 0, n, np.zeros(n, np.uint8)) for i, n in enumerate(lengths)] * 7
    chunks = list(in_chunks(iter(pieces), batch_size, max_tokens))
    assert [piece.name for chunk in chunks for piece in chunk] == [piece.name for piece in pieces]
    for chunk in chunks:
        assert 1 <= len(chunk) <= bucket * batch_size
        assert sum(piece.end for piece in chunk[:-1]) < bucket * max_tokens


def test_pieces_can_be_read_again(records, tmp_path):
    with opened(tmp_path / "records.fa") as file:
        pieces = Pieces([file], window=20, stride=7, max_n=0.5, hard_mask=False)
        pieces.check(20, unique_names=True)
        first, again = list(pieces), list(pieces)
    assert [piece[:3] for piece in first] == [piece[:3] for piece in again]
    assert pieces.count == len(first)
    assert pieces.n_bases == sum(len(piece.tokens) for piece in first)
    for piece in again:
        assert decode(piece.tokens) == records[piece.name][piece.start : piece.end]


def test_a_pipe_is_read_once_and_used_twice(run, records, tmp_path, monkeypatch, genomics):
    genomics("predict", run, tmp_path / "records.fa", "-o", tmp_path / "file.tsv")
    stdin = io.TextIOWrapper(io.BytesIO((tmp_path / "records.fa").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    genomics("predict", run, "-", "-o", tmp_path / "pipe.tsv")
    assert (tmp_path / "pipe.tsv").read_bytes() == (tmp_path / "file.tsv").read_bytes()


@pytest.mark.parametrize("flags", [[], ["--window", 20, "--stride", 9]])
def test_a_few_at_a_time(flags, run, records, tmp_path, monkeypatch, genomics):
    """The same rows from many chunks as from one; figures to float32's rounding, for batches are composed otherwise."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for folder, bucket in (("one", 10**6), ("many", 1)):
        monkeypatch.setattr(pieces_module, "BUCKET", bucket)
        (tmp_path / folder).mkdir()
        for verb_name, names in (("predict", ("p.tsv", "p.bed", "p.bedgraph")), ("embed", ("e.npy", "e.parquet"))):
            for name in names:
                words = (run, tmp_path / "records.fa", "-o", tmp_path / folder / name, "--batch-size", 3)
                genomics(verb_name, *words, *flags)
    one, many = tmp_path / "one", tmp_path / "many"
    for name in ("p.tsv", "p.bed", "p.bedgraph"):
        rows = [list(csv.reader((folder / name).open(), delimiter="\t")) for folder in (one, many)]
        assert len(rows[0]) == len(rows[1]) > 20
        for a, b in zip(*rows, strict=True):
            figures = [(float(x), float(y)) for x, y in zip(a, b, strict=True) if x != y]
            assert all(x == pytest.approx(y, abs=2e-6) for x, y in figures), (a, b)
    assert (one / "e.names.tsv").read_bytes() == (many / "e.names.tsv").read_bytes()
    arrays = [np.load(folder / "e.npy") for folder in (one, many)]
    assert arrays[1] == pytest.approx(arrays[0], abs=1e-5)
    tables = [parquet.read_table(folder / "e.parquet") for folder in (one, many)]
    assert tables[0].schema == tables[1].schema
    assert tables[0].drop_columns("embedding") == tables[1].drop_columns("embedding")
    for table, array in zip(tables, arrays, strict=True):
        assert np.array_equal(table["embedding"].combine_chunks().flatten().to_numpy(), array.reshape(-1))
    assert (
        parquet.ParquetFile(many / "e.parquet").num_row_groups > parquet.ParquetFile(one / "e.parquet").num_row_groups
    )


@pytest.fixture
def no_model(monkeypatch):
    """A model that costs nothing: what is measured is what lies around it."""

    def by_length(model_or_models, tokens, *rest, **options):
        return np.array([[len(ids) / 1e6, 1 - len(ids) / 1e6] for ids in tokens])

    monkeypatch.setattr(verb, "mean_predictions", by_length)
    monkeypatch.setattr(
        verb, "embed_sequences", lambda model, tokens, *rest, **options: np.zeros((len(tokens), 32), np.float32)
    )


@pytest.mark.parametrize("name", ["p.tsv", "p.bed", "p.bedgraph", "e.npy", "e.parquet"])
def test_memory_does_not_grow_with_the_records(name, run, tmp_path, monkeypatch, no_model, genomics):
    """Of 1.6 MB more sequence, in 3,200 more windows, the peak grows by some kB of names."""
    if name == "e.parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(pieces_module, "BUCKET", 4)
    rng = np.random.default_rng(0)
    texts = [random_dna(rng, 20_000) for _ in range(3)]
    peaks = []
    for n in (10, 10, 90):  # the first run also pays for what is imported and kept
        (tmp_path / "x.fa").write_text("".join(f">r{i}\n{texts[i % 3]}\n" for i in range(n)))
        words = ("embed" if name[0] == "e" else "predict", run, tmp_path / "x.fa", "-o", tmp_path / name)
        tracemalloc.start()
        genomics(*words, "--window", 500, "--batch-size", 64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 250_000


def test_a_piece_longer_than_a_batch_may_be(error, run, tmp_path, genomics):
    fasta, output = tmp_path / "x.fa", tmp_path / "output"
    fasta.write_text(f">a\nACGT\n>chr1\n{'ACGT' * 100}\n")
    for words in (["predict", run, fasta], ["embed", run, fasta, "-o", output.with_suffix(".npy")]):
        line = error(*words, "--max-tokens", 399)
        for expected in (str(fasta), "'chr1'", "400 bases", "--max-tokens is 399", "--window", "raise --max-tokens"):
            assert expected in line
    assert "'chr1': 101 bases" in error("predict", run, fasta, "--max-tokens", 100, "--window", 101)
    genomics("predict", run, fasta, "-o", tmp_path / "whole.tsv", "--max-tokens", 400)
    genomics("predict", run, fasta, "-o", tmp_path / "windows.tsv", "--max-tokens", 50, "--window", 50)


@pytest.mark.parametrize("name", ["p.tsv", "p.bed", "p.bedgraph", "e.npy", "e.parquet"])
def test_an_error_in_the_middle_leaves_nothing(name, error, run, records, tmp_path, monkeypatch):
    if name == "e.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text("precious")
    monkeypatch.setattr(pieces_module, "BUCKET", 1)
    function = "embed_sequences" if name[0] == "e" else "mean_predictions"
    usual, calls = getattr(verb, function), []

    def fails_at_last(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 4:
            raise InputError("the cat has pulled the plug")
        return usual(*arguments, **options)

    monkeypatch.setattr(verb, function, fails_at_last)
    words = ("embed" if name[0] == "e" else "predict", run, tmp_path / "records.fa", "-o", tmp_path / name)
    assert "pulled the plug" in error(*words, "--batch-size", 2)


def test_a_file_that_changes_after_it_was_checked(error, run, tmp_path, monkeypatch):
    growing = tmp_path.parent / "growing-later.fa"
    growing.write_text(">a\nACGT\n")
    check = Pieces.check

    def check_before_another_writes(*arguments, **options):
        check(*arguments, **options)
        with growing.open("a") as file:
            file.write(">b\nACGT\n")

    monkeypatch.setattr(Pieces, "check", check_before_another_writes)
    assert f"{growing}: changed while it was read" in error("predict", run, growing, "-o", tmp_path / "p.tsv")
