"""Genomes by position: any stretch against the text that was written, however it is packed; and indexes that lie."""

import gzip
import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pysam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import tokenize
from polymamba.genomics.reading.genome import Genome

compress = partial(gzip.compress, mtime=0)  # the same bytes in every process: they stand in test names

NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=6)
SEQUENCES = st.text("ACGTNacgtnURYK", min_size=1, max_size=150)
RECORDS = st.lists(st.tuples(NAMES, SEQUENCES), min_size=1, max_size=5, unique_by=lambda record: record[0])
PACKINGS = ["plain", "gzip", "bgzip"]


def text_of(records, width: int, end: str = "\n", last_end: bool = True) -> bytes:
    lines = []
    for name, sequence in records:
        lines += [f">{name} about it", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    return (end.join(lines) + (end if last_end else "")).encode()


def packed(folder: Path, content: bytes, packing: str) -> Path:
    path = folder / f"{packing}.fa"
    path.write_bytes(compress(content) if packing == "gzip" else content)
    if packing == "bgzip":
        pysam.tabix_compress(str(path), str(folder / "bgzip.fa.gz"), force=True)
        path = folder / "bgzip.fa.gz"
    return path


def refusal(*paths: Path) -> str:
    """The one line with which the genome is refused, before or while all of it is read."""

    def read() -> None:
        with Genome(paths) as genome:
            for i, contig in enumerate(genome.contigs):
                genome.tokens(i, 0, contig.length)

    with pytest.raises(InputError) as error:
        read()
    assert "\n" not in str(error.value)
    return str(error.value)


# What is read


@settings(max_examples=40)
@given(
    RECORDS, st.integers(1, 70), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.sampled_from(PACKINGS), st.data()
)
def test_any_stretch_of_any_file(tmp_path_factory, records, width, end, last_end, packing, data):
    folder = tmp_path_factory.mktemp("genome")
    path = packed(folder, text_of(records, width, end, last_end), packing)
    if packing != "gzip" and data.draw(st.booleans(), "an index beside"):
        pysam.faidx(str(path))
    before = sorted(folder.iterdir())
    with Genome([path]) as genome:
        assert [(c.name, c.length, c.path) for c in genome.contigs] == [(n, len(s), path) for n, s in records]
        for i, (_, sequence) in enumerate(records):
            start = data.draw(st.integers(0, len(sequence)))
            stop = data.draw(st.integers(start, len(sequence)))
            assert genome.letters(i, start, stop).decode() == sequence[start:stop]
            tokens, lower = genome.tokens(i, start, stop)
            assert np.array_equal(tokens, tokenize(sequence[start:stop]))
            assert lower.tolist() == [letter.islower() for letter in sequence[start:stop]]
            again = np.concatenate([piece for _, piece in genome.pieces(i, start, stop, 7)] or [tokens])
            assert np.array_equal(again, tokens)
    assert sorted(folder.iterdir()) == before, "an index was left beside the file"


def test_files_of_several_kinds(tmp_path):
    uneven = tmp_path / "uneven.fa"
    uneven.write_text("\n>a\nACGT\nAC\nACGTA\n>b\nGG\n")
    fastq = tmp_path / "reads.fq"
    fastq.write_text("@q\nACGTN\n+\nIIIII\n")
    with Genome([uneven, fastq]) as genome:
        assert [contig[:2] for contig in genome.contigs] == [("a", 11), ("b", 2), ("q", 5)]
        assert genome.letters(0, 3, 8) == b"TACAC"
        assert genome.letters(2, 1, 5) == b"CGTN"
        assert genome.n_bases == 18


def test_two_files_may_hold_one_name(tmp_path):
    for name, sequence in (("one", "AAAA"), ("two", "CCCCC")):
        (tmp_path / f"{name}.fa").write_text(f">bin1\n{sequence}\n")
    with Genome([tmp_path / "one.fa", tmp_path / "two.fa"]) as genome:
        assert [genome.letters(i, 0, 4) for i in (0, 1)] == [b"AAAA", b"CCCC"]


def test_a_process_reads_by_a_handle_of_its_own(tmp_path):
    """Shared between processes, a handle's position would be that of whoever read last."""
    rng = np.random.default_rng(0)
    sequence = "".join(rng.choice(list("ACGT"), 5000))
    path = packed(tmp_path, text_of([("x", sequence)], 50), "bgzip")
    with Genome([path]) as genome:
        genome.letters(0, 0, 10)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()

        def read(n: int) -> None:
            right = all(genome.letters(0, i, i + 90).decode() == sequence[i : i + 90] for i in range(n, 4800, 37))
            queue.put(right and len(genome._handles) == 2)

        workers = [context.Process(target=read, args=(n,)) for n in (1, 2)]
        for worker in workers:
            worker.start()
        assert all(genome.letters(0, i, i + 90).decode() == sequence[i : i + 90] for i in range(0, 4800, 41))
        assert [queue.get(timeout=20) for _ in workers] == [True, True]
        for worker in workers:
            worker.join()


def test_temporary_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "x.fa.gz").write_bytes(compress(b">x\nACGT\n"))
    with Genome([tmp_path / "x.fa.gz"]) as genome:
        assert len(os.listdir(tmp_path)) == 2
        assert genome.letters(0, 0, 4) == b"ACGT"
    assert os.listdir(tmp_path) == ["x.fa.gz"]


# What is refused

GOOD = b">x 1\nACGTA\nACG\n>y\nACG\n>z\nACGTT\n"


@pytest.mark.parametrize("packing", ["plain", "bgzip"])
@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        (b"x\t8\n", "line 1: not a line of a FASTA index, expected 5 columns separated by tabs"),
        (b"x\t8\t5\t5\t6\ny\tthree\t18\t3\t4\n", "line 2: not a line of a FASTA index"),
        (b"", "an empty index of"),
        (b"\xff\xfe\x00", "cannot be read (no text)"),
        (b"x\t9\t5\t5\t6\n", "record 'x' is not where the index"),
        (b"other\t8\t5\t5\t6\n", "record 'other' is not where the index"),
        (b"x\t8\t5\t5\t6\ny\t3\t17\t3\t4\n", "record 'y' is not where the index"),
        (b"x\t8\t5\t5\t6\ny\t3\t18\t3\t4\nz\t8000\t25\t5\t6\n", "record 'z' is not where the index"),
        (b"x\t8\t9999999\t5\t6\n", "record 'x' is not where the index"),
    ],
)
def test_a_malformed_or_stale_index(tmp_path, packing, index, wanted):
    path = packed(tmp_path, GOOD, packing)
    pysam.faidx(str(path))
    Path(f"{path}.fai").write_bytes(index)
    message = refusal(path)
    assert wanted in message
    assert f"{path}.fai" in message
    assert "remove" in message


@pytest.mark.parametrize("gzi", [b"", b"\x07", bytes([5]) + bytes(7)])
def test_a_malformed_bgzip_index(tmp_path, gzi):
    path = packed(tmp_path, GOOD, "bgzip")
    pysam.faidx(str(path))
    Path(f"{path}.gzi").write_bytes(gzi)
    assert refusal(path).startswith(f"{path}.gzi: not an index of a bgzip file; remove it")


def test_an_index_of_many_bgzip_blocks_is_checked_in_the_right_places(tmp_path):
    rng = np.random.default_rng(1)
    records = [(f"r{i}", "".join(rng.choice(list("ACGT"), 60_000))) for i in range(5)]
    path = packed(tmp_path, text_of(records, 60), "bgzip")
    pysam.faidx(str(path))
    with Genome([path]) as genome:
        assert genome.letters(4, 59_990, 60_000).decode() == records[4][1][-10:]
    moved = packed(tmp_path, b">new\nA\n" + text_of(records, 60), "bgzip")  # the index is that of the file before
    assert "is not where the index" in refusal(moved)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "is empty"),
        (b"hello\n", "is not FASTA"),
        (b">x\nACGT\n>y\nACQT\n", "record 'y': 'Q' at position 3 is no DNA letter"),
        (b">x\n>y\nACT\n", "record 'x'"),
        (b">x\nACT\n>x\nACT\n", "the name stands twice, in lines 1 and 3"),
        (b">x\nAC*GT\n", "'*' at position 3"),
        (b">x\nAC\0GT\n", "NUL byte"),
        (compress(GOOD)[:-9], "truncated"),
    ],
)
def test_a_bad_file(tmp_path, content, wanted):
    path = tmp_path / "x.fa"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(str(path))
    assert wanted in message


def test_a_bgzip_file_without_its_last_block(tmp_path):
    path = packed(tmp_path, GOOD, "bgzip")
    path.write_bytes(path.read_bytes()[:-28])
    assert "the block that ends a bgzip file is missing" in refusal(path)


def test_a_missing_file(tmp_path):
    assert refusal(tmp_path / "x.fa") == f"{tmp_path / 'x.fa'}: no such file"


def test_a_file_that_changes_meanwhile(tmp_path):
    path = packed(tmp_path, GOOD, "plain")
    with Genome([path]) as genome:
        shutil.copy(path, tmp_path / "copy")
        path.write_bytes(b">x\n")
        with pytest.raises(InputError, match="changed while it was read"):
            genome.letters(2, 0, 5)


def test_outside_a_contig(tmp_path):
    with Genome([packed(tmp_path, GOOD, "plain")]) as genome, pytest.raises(ValueError, match="not within its 8 bases"):
        genome.letters(0, 5, 9)
