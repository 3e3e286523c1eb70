"""The reader against Biopython's, and against every file that it must refuse."""

import gzip
import io
import zlib
from functools import partial

import numpy as np
import pysam
import pytest
from Bio import SeqIO
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import tokenize
from polymamba.genomics.reading.fasta import read_fasta

compress = partial(gzip.compress, mtime=0)  # the same bytes in every process: they stand in test names

NAMES = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=8)
DESCRIPTIONS = st.text("ab >@+=|é\t1", max_size=12).map(str.strip)
SEQUENCES = st.text("ACGTNacgtnURYK", min_size=1, max_size=200)
RECORDS = st.lists(
    st.tuples(NAMES, DESCRIPTIONS, SEQUENCES), min_size=1, max_size=6, unique_by=lambda record: record[0]
)


def fasta_text(records, width: int, end: str = "\n", last_end: bool = True) -> bytes:
    lines = []
    for name, description, sequence in records:
        lines.append(f">{name} {description}" if description else f">{name}")
        lines += [sequence[i : i + width] for i in range(0, len(sequence), width)]
    return (end.join(lines) + (end if last_end else "")).encode()


def many_records(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    rng = np.random.default_rng(seed)
    return [(f"r{i}", "", "".join(rng.choice(list("ACGT"), 90))) for i in range(n)]


def bgzip(tmp_path, content: bytes) -> bytes:
    (tmp_path / "plain").write_bytes(content)
    pysam.tabix_compress(str(tmp_path / "plain"), str(tmp_path / "packed"), force=True)
    return (tmp_path / "packed").read_bytes()


def refusal(tmp_path, content: bytes, name: str = "x.fa") -> str:
    """The message with which a file of this content is refused, without its path."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(read_fasta(path))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).lstrip(",: ")


# What is read


@given(
    records=RECORDS,
    width=st.integers(1, 80),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\r\n\r\n"]),
    last_end=st.booleans(),
    packed=st.booleans(),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\n \n"]),
)
def test_reads_back_what_was_written(tmp_path_factory, records, width, end, last_end, packed, mark):
    path = tmp_path_factory.mktemp("fasta") / "x"  # compression is told by content, not by name
    content = mark + fasta_text(records, width, end, last_end)
    path.write_bytes(compress(content) if packed else content)
    read = list(read_fasta(path))
    assert [(r.name, r.description, r.sequence) for r in read] == records
    for record in read:
        assert np.array_equal(record.tokens, tokenize(record.sequence))


@given(records=RECORDS, width=st.integers(1, 80), end=st.sampled_from(["\n", "\r\n"]))
def test_equals_biopython(tmp_path_factory, records, width, end):
    path = tmp_path_factory.mktemp("fasta") / "x.fa"
    path.write_bytes(content := fasta_text(records, width, end))
    twins = list(SeqIO.parse(io.StringIO(content.decode(), newline=None), "fasta"))
    for record, twin in zip(read_fasta(path), twins, strict=True):
        assert record.name == twin.id
        assert f"{record.name} {record.description}".split() == twin.description.split()
        assert record.sequence == str(twin.seq)


@pytest.mark.parametrize("n", [1, 7, 5000])
def test_bgzip_and_concatenated_gzip(tmp_path, n):
    content = fasta_text(records := many_records(n), 60)
    half = content.index(b">", len(content) // 2) if n > 1 else len(content)
    for packed in (bgzip(tmp_path, content), compress(content[:half]) + compress(content[half:])):
        (tmp_path / "x.fa.gz").write_bytes(packed)
        assert [(r.name, r.description, r.sequence) for r in read_fasta(tmp_path / "x.fa.gz")] == records


# What is refused


@pytest.mark.parametrize("name", ["missing.fa", "folder"])
def test_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{name}: (no such file|is a folder)"):
        next(read_fasta(tmp_path / name))


def test_device():
    with pytest.raises(InputError, match=r"^/dev/null: is neither a file nor a pipe"):
        next(read_fasta("/dev/null"))


@pytest.mark.parametrize("content", [b"", b"\n\n \r\n", compress(b""), compress(b"\n"), b"\xef\xbb\xbf"])
def test_empty(tmp_path, content):
    assert refusal(tmp_path, content).startswith("is empty")


@pytest.mark.parametrize(
    ("content", "look"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image"),
        (compress(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "a PNG image"),
        (compress(compress(b">a\nACGT\n")), "gzip data, compressed twice"),
        (b"id,label\ns1,donor\n", "a comma-separated table, beginning 'id,label'"),
        (b"id\tlabel\ns1\tdonor\n", "a tab-separated table, beginning 'id\\tlabel'"),
        (b"<!DOCTYPE html>\n<html>", "HTML or XML"),
        (b"@read1\nACGT\n+\nIIII\n", "FASTQ"),
        (b"LOCUS       SCU49845     5028 bp    DNA\n", "GenBank"),
        (b"##gff-version 3\nchr1\t.\tgene\n", "VCF or GFF"),
        ("\ufeff>a\nACGT\n".encode("utf-16"), "UTF-16 text"),
        (bytes(range(128, 256)) + b"\0" * 50, "binary data"),
        (b"Dear colleague\n>a\nACGT\n", "other text, beginning 'Dear colleague'"),
        (b";an old comment\n>a\nACGT\n", "other text, beginning ';an old comment'"),
        (b"ACGTACGT\n" * 9, "other text, beginning 'ACGTACGT'"),
    ],
)
def test_not_fasta(tmp_path, content, look):
    assert refusal(tmp_path, content) == f"is not FASTA (which begins with '>'); it looks like {look}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b">a\n>b\nAC\n", "record 'a', line 1: no sequence after the header"),
        (b">b\nAC\n\n>a x\n", "record 'a', line 4: no sequence after the header"),
        (b">\nAC\n", "record 1, line 1: no name in the header"),
        (b">a\nAC\n> b\nAC\n", "record 2, line 3: no name in the header"),
        (b">a\nAC\n>b\nGG\n>a z\nAC\n", "record 'a': the name stands twice, in lines 1 and 5"),
        (b">a\nACGT\n\nAC-GT\n>b\nA\n", "record 'a', line 4: '-' at position 7 is no DNA letter; "),
        (b">a\r\nACGT\r\nAC*\r\n", "record 'a', line 3: '*' at position 7 is no DNA letter; "),
        (b">a\nAC\nAL\n", "record 'a', line 3: 'L' at position 4 is no DNA letter; "),
        (b">a\n1 ACGT 10\n", "record 'a', line 2: '1' at position 1 is no DNA letter; "),
        (b">a\nACGT \nAC\n", "record 'a', line 2: ' ' at position 5 is no DNA letter; "),
        (b">a\nAC>GT\n", "record 'a', line 2: '>' at position 3 is no DNA letter; "),
        (">a\nAC\nGé\n".encode(), "record 'a', line 3: 'é' at position 4 is no DNA letter; "),
        (b"\xef\xbb\xbf>a\nAC!\n", "record 'a', line 2: '!' at position 3 is no DNA letter; "),
        (b">a\rACGT\r>b\rAC\r", "record 'a', line 1: a bare carriage return in the header; convert the line ends"),
        (b">a x\rACGT\nAC\n", "record 'a', line 1: a bare carriage return in the header; convert the line ends"),
        (b">a\nACGT\n>\xe9t\xe9\nAC\n", "record in line 3: byte 0xe9, which is not UTF-8 text"),
        (b">a\nAC\xff\n", "record in line 1: byte 0xff, which is not UTF-8 text"),
        (b">a\nACGT\nAC\0GT\n>b\nA\n", "line 3: a NUL byte; the file is damaged or binary"),
        (b">a\nACGT\n+\nIIII\n", "line 3: begins with '+' as in FASTQ; expected FASTA"),
        (b">a\nAC\n@b\nGG\n+\nII\n", "line 3: begins with '@' as in FASTQ; expected FASTA"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_bad_record(tmp_path, content, message, packed):
    found = refusal(tmp_path, compress(content) if packed else content)
    assert found.startswith(message) if message.endswith("; ") else found == message


@pytest.mark.parametrize("bad", [b"\0", b"\n@b", b"\n+"])
@pytest.mark.parametrize("at", [2**18 - 2, 2**18 - 1, 2**18, 2**18 + 1, 3 * 2**18])
def test_bad_bytes_at_the_border_of_two_blocks(tmp_path, bad, at):
    content = bytearray(fasta_text(many_records(9000), 80))
    content[at : at + len(bad)] = bad
    line = content.count(b"\n", 0, at + len(bad)) + 1
    assert refusal(tmp_path, bytes(content)).startswith(f"line {line}: ")


def test_records_before_the_bad_one_are_given(tmp_path):
    (tmp_path / "x.fa").write_bytes(b">a\nAC\n>b\nGT\n>c\nA?\n")
    records = read_fasta(tmp_path / "x.fa")
    assert [next(records).name, next(records).name] == ["a", "b"]
    with pytest.raises(InputError, match="record 'c', line 6"):
        next(records)


# Damaged compression. pysam alone reads some of these in part and says nothing.

CONTENT = fasta_text(many_records(4000), 60)
GZIP = compress(CONTENT, mtime=0)


@pytest.mark.parametrize("kept", [11, 100, len(GZIP) // 2, len(GZIP) - 8, len(GZIP) - 4, len(GZIP) - 1])
def test_truncated_gzip(tmp_path, kept):
    assert refusal(tmp_path, GZIP[:kept], "x.fa.gz").startswith("truncated: ")


def test_truncated_second_member(tmp_path):
    assert refusal(tmp_path, GZIP + compress(b">z\nAC\n")[:14], "x.fa.gz").startswith("truncated: ")


@pytest.mark.parametrize("at", [len(GZIP) // 2, -6])
def test_damaged_gzip(tmp_path, at):
    damaged = bytearray(GZIP)
    damaged[at] ^= 0xFF
    assert refusal(tmp_path, bytes(damaged), "x.fa.gz").startswith("damaged gzip data (")


@pytest.mark.parametrize("tail", [b"tail", b"\0" * 100], ids=["letters", "zeros"])
def test_bytes_after_gzip(tmp_path, capfd, tail):
    assert refusal(tmp_path, GZIP + tail, "x.fa.gz").startswith("damaged ")
    assert capfd.readouterr().err == ""  # htslib would add lines of its own


def bgzip_block_ends(packed: bytes) -> list[int]:
    """Offsets at which the blocks of a bgzip file end, by inflating one after the other."""
    ends = [0]
    while ends[-1] < len(packed):
        inflater = zlib.decompressobj(wbits=31)
        inflater.decompress(packed[ends[-1] :])
        ends.append(len(packed) - len(inflater.unused_data))
    return ends[1:]


def test_bgzip_cut_between_any_two_blocks(tmp_path):
    packed = bgzip(tmp_path, CONTENT)
    ends = bgzip_block_ends(packed)
    assert len(ends) > 3
    for end in ends[:-1]:
        assert refusal(tmp_path, packed[:end], "x.fa.gz").startswith("truncated: the block that ends a bgzip file")


def test_bgzip_cut_anywhere(tmp_path):
    packed = bgzip(tmp_path, CONTENT)
    for kept in np.random.default_rng(0).integers(20, len(packed), 20):
        assert refusal(tmp_path, packed[:kept], "x.fa.gz").startswith("truncated: ")
