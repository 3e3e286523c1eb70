"""Every format against its FASTA twin and against Biopython's writers, and every file that must be refused."""

import gzip
import io
import os
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pysam
import pytest
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import tokenize
from polymamba.genomics.reading.records import read_records

# Versioned names, for Biopython completes an accession without a version when it writes EMBL.
NAMES = st.from_regex(r"[A-Z]{1,2}[0-9]{1,8}\.[1-9]", fullmatch=True)
SEQUENCES = st.text("ACGTNacgtnRYK", min_size=1, max_size=200)
RECORDS = st.lists(st.tuples(NAMES, SEQUENCES), min_size=1, max_size=5, unique_by=lambda record: record[0])
TWINS = [("AB1.1", "ACGTNacgtRYKM" * 11), ("AB22.3", "C"), ("AB3.1", "GATTACA" * 30)]
FORMATS = ["fasta", "fastq", "genbank", "embl"]


def written(records: list[tuple[str, str]], format: str) -> bytes:
    """By Biopython; the qualities go through all characters that are allowed."""
    bio_records = []
    for name, sequence in records:
        record = SeqRecord(
            Seq(sequence), name, name.split(".")[0], "a definition", annotations={"molecule_type": "DNA"}
        )
        record.letter_annotations["phred_quality"] = [i % 94 for i in range(len(sequence))]
        bio_records.append(record)
    SeqIO.write(bio_records, text := io.StringIO(), format)
    return text.getvalue().encode()


def bgzipped(content: bytes, folder: Path) -> bytes:
    (folder / "plain").write_bytes(content)
    pysam.tabix_compress(str(folder / "plain"), str(folder / "packed"), force=True)
    return (folder / "packed").read_bytes()


def names_and_tokens(path) -> list[tuple[str, list[int]]]:
    return [(record.name, record.tokens.tolist()) for record in read_records(path)]


def refusal(path) -> str:
    """The message with which a file is refused, without its path."""
    with pytest.raises(InputError) as error:
        list(read_records(path))
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).lstrip(",: ")


def refused(tmp_path, content: bytes) -> str:
    (tmp_path / "x").write_bytes(content)
    return refusal(tmp_path / "x")


# What is read


@pytest.mark.parametrize("packing", ["plain", "gzip", "bgzip"])
@pytest.mark.parametrize("end", ["LF", "CRLF"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_form_equals_its_plain_twin(tmp_path, format, mark, end, packing):
    content = mark + written(TWINS, format)
    content = content.replace(b"\n", b"\r\n") if end == "CRLF" else content
    pack = {"plain": bytes, "gzip": gzip.compress, "bgzip": lambda content: bgzipped(content, tmp_path)}[packing]
    (tmp_path / "x").write_bytes(pack(content))
    (tmp_path / "twin.fa").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in TWINS))
    assert names_and_tokens(tmp_path / "x") == names_and_tokens(tmp_path / "twin.fa")
    assert names_and_tokens(tmp_path / "x") == [(name, tokenize(sequence).tolist()) for name, sequence in TWINS]


@pytest.mark.parametrize("format", FORMATS)
@given(records=RECORDS)
def test_reads_back_what_biopython_wrote(tmp_path_factory, format, records):
    path = tmp_path_factory.mktemp("records") / "x"
    path.write_bytes(written(records, format))
    read = list(read_records(path))
    keeps_case = format in ("fasta", "fastq")
    expected = [(name, sequence if keeps_case else sequence.upper()) for name, sequence in records]
    assert [(record.name, record.sequence) for record in read] == expected
    for record, (_, sequence) in zip(read, records, strict=True):
        assert np.array_equal(record.tokens, tokenize(sequence))
    assert {record.description for record in read} == {"a definition"}


@given(records=RECORDS, widths=st.tuples(st.integers(1, 80), st.integers(1, 80)), caption=st.booleans(), data=st.data())
def test_fastq_over_several_lines(tmp_path_factory, records, widths, caption, data):
    """Also with `@` and `+` at the start of a line of qualities, where they do not mean what they mean elsewhere."""
    text = ""
    for name, sequence in records:
        size = len(sequence)
        quality = data.draw(st.text("@+I!~>", min_size=size, max_size=size))
        lines = [[s[i : i + w] for i in range(0, size, w)] for s, w in zip((sequence, quality), widths, strict=True)]
        text += "\n".join([f"@{name} x", *lines[0], f"+{name} x" if caption else "+", *lines[1], ""])
    path = tmp_path_factory.mktemp("fastq") / "x.fq"
    path.write_text(text)
    assert [(r.name, r.description, r.sequence) for r in read_records(path)] == [(n, "x", s) for n, s in records]


def test_genbank_with_features_contig_line_and_no_description(tmp_path):
    path = tmp_path / "x.gb"
    path.write_text(
        "LOCUS       AB1                       12 bp    DNA     linear   BCT 01-JAN-2020\n"
        "DEFINITION  .\nACCESSION   AB1\nVERSION     AB1.7\n"
        "FEATURES             Location/Qualifiers\n     CDS             nonsense((\n"
        '                     /note="LOCUS and //\n                     //"\n'
        "CONTIG      join(AB1.1:1..12)\nORIGIN\n        1 acgtnacgtn\n       11 ry\n//\n\n"
    )
    assert [record[:3] for record in read_records(path)] == [("AB1.7", "", "ACGTNACGTNRY")]


class Stdin:
    def __init__(self, content: bytes):
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize("format", FORMATS)
def test_standard_input(tmp_path, monkeypatch, format):
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    monkeypatch.setattr(sys, "stdin", Stdin(gzip.compress(written(TWINS, format), mtime=0)))
    assert names_and_tokens("-") == [(name, tokenize(sequence).tolist()) for name, sequence in TWINS]
    assert not list((tmp_path / "copies").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input: is empty; expected FASTA "),
        (b">a\nAC\n>b\nA-\n", "standard input, record 'b', line 4: '-' at position 2 is no DNA letter"),
    ],
)
def test_standard_input_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    with pytest.raises(InputError) as error:
        list(read_records("-"))
    assert str(error.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_standard_input_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input: is closed"):
        next(read_records("-"))


def test_no_room_for_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b">a\nAC\n"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(InputError, match=r"standard input: cannot be copied to .* \(No space left on device\)"):
        next(read_records("-"))


def through_fifo(tmp_path, content: bytes) -> tuple[Path, threading.Thread]:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    return tmp_path / "pipe", writer


def test_pipe(tmp_path):
    path, writer = through_fifo(tmp_path, written(TWINS, "fastq"))
    assert names_and_tokens(path) == [(name, tokenize(sequence).tolist()) for name, sequence in TWINS]
    writer.join()


def test_pipe_refused_by_its_own_name(tmp_path):
    path, writer = through_fifo(tmp_path, b">a\nAC\n>a\nAC\n")
    assert refusal(path) == "record 'a': the name stands twice, in lines 1 and 3"
    writer.join()


def test_pipe_by_number():
    """As /dev/fd/63 of a process substitution."""
    reading, writing = os.pipe()
    os.write(writing, b">a\nACGT\n")
    os.close(writing)
    assert names_and_tokens(f"/dev/fd/{reading}") == [("a", [7, 8, 9, 10])]
    os.close(reading)


def test_a_file_is_never_taken_for_an_address(tmp_path, monkeypatch):
    """htslib would read what stands behind `data:,`."""
    monkeypatch.chdir(tmp_path)
    Path("data:,>b").write_text(">a\nAC\n")
    assert names_and_tokens("data:,>b") == [("a", [7, 8])]


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected FASTA (which begins with '>'), FASTQ (which begins with '@'), GenBank "),
        (b"\x89PNG\r\n\x1a\n\0\0", "is not FASTA (which begins with '>'), FASTQ "),
        (b"a\tb\n", "it looks like a tab-separated table"),
    ],
)
def test_no_known_format(tmp_path, content, message):
    assert message in refused(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"@a\nACGT\n+\nIII\n", "record 1, line 1: Lengths of sequence and quality values differs for a (4 and 3)"),
        (b"@a\nACGT\n+\nIIIII\n", "record 1, line 1: Lengths "),
        (b"@a\nAC\n+\nII\n@b\nACGT\n+\nII\n", "record 2, line 5: Lengths "),
        (b"@a\nAC\n+\nII\n@b\nACGT\n+\nII\n@c\nAC\n+\nII\n", "record 2, line 5: Lengths "),
        (b"@a\nAC\n+\nII\njunk\n@b\nAC\n+\nII\n", "record 1, line 1: Lengths "),  # kseq skips the fifth line
        (b"@a\nAC\n+\nII\n>b\nAC\n", "record 1, line 1: Lengths "),  # kseq reads a FASTA record
        (b"@a\nBBBB\nBBBB\n@b\nAC\n+\nII\n", "record 1, line 1: Lengths "),  # kseq reads BBBBBBBB: no `+`
        (b"@a\nAC\n+\nII\n@b\nAC\n", "record 2, line 5: End of file without quality information"),
        (b"@a\nAC\n+\nII\n@b\nAC\n+\n", "record 2, line 5: Unexpected end of file"),
        (b"@a\nAC\n+\nII\n@b\n", "record 2, line 5: Unexpected end of file"),
        (b"@a\nAC\n+\nII\n@b\nAC\n+\nI", "record 2, line 5: Lengths "),
        (b"@a x\nAC\n+b\nII\n", "record 1, line 1: Sequence and quality captions differ"),
        (b"@a\nAC\n+\nI\x7f\n", "record 1, line 1: a quality that is none of the characters from '!' to '~'"),
        (b"@a\nACG\n+\nI I\n", "record 1, line 1: a quality that is none "),
        (b"@a\nAC\n+\nI\xff\n", "record 1, line 1: a quality that is none "),
        (b"@a\r\nA\r\n+\r\n\r\n", "record 1, line 1: Lengths "),  # kseq takes the carriage return for the quality
        (b"@a\nAC\n+\nII\n@b\n\n+\n\n", "record 'b', line 5: no sequence after the header"),
        (b"@a\nAC\n+\nII\n@ b\nAC\n+\nII\n", "record 2, line 5: no name in the header"),
        (b"@a\nAC\n+\nII\n@b\nAC\nG-\n+\nIIII\n", "record 'b', line 7: '-' at position 4 is no DNA letter; "),
        (b"@a\nAC\n+\nII\n@b\nA\xffC\n+\nIII\n", "record 'b', line 6: byte 0xff, which is not UTF-8 text"),
        (b"@\xe9\nAC\n+\nII\n", "line 1: byte 0xe9, which is not UTF-8 text"),
        (b"@a\nAC\n+\nII\n@b\nAC\n+\nII\n@a\nAC\n+\nII\n", "record 'a': the name stands twice, in lines 1 and 9"),
        (b"@a\nAC\0\n+\nII\n", "line 2: a NUL byte; the file is damaged or binary"),
        (b"@a x\rAC\n+\nII\n", "record 1, line 1: "),
    ],
)
def test_bad_fastq(tmp_path, content, message):
    assert message in refused(tmp_path, content)


def changed(format: str, old: str, new: str) -> bytes:
    content = written(TWINS, format).decode()
    assert old in content
    return content.replace(old, new, 1).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            changed("genbank", "  143 bp", "  144 bp"),
            "record in line 1: Expected sequence length 144, found 143 (AB1.1)",
        ),
        (
            changed("embl", "Sequence 143 BP", "Sequence 142 BP"),
            "record in line 1: Expected sequence length 142, found 143 (AB1.1)",
        ),
        (
            changed("genbank", "121 tnacgtrykm", "121 tnacgtrykl"),
            "record 'AB1.1', line 13: 'L' at position 130 is no DNA letter; ",
        ),
        (changed("genbank", "121 t", "121 -"), "record 'AB1.1', line 13: '-' at position 121 is no DNA letter; "),
        (changed("embl", "ykm   ", "ykl   "), "record 'AB1.1', line 16: 'L' at position 143 is no DNA letter; "),
        (changed("genbank", "//\n", "//\njunk\n"), "line 15: expected 'LOCUS       ', which begins a record"),
        (changed("embl", "//\n", "//\njunk\n"), "line 18: expected 'ID   ', which begins a record"),
        (changed("genbank", "//\nLOCUS       ", "//\nLOCUS"), "line 15: expected 'LOCUS       ', which begins"),
        (changed("genbank", "//\n", ""), "line 14: the record of line 1 has no end, '//'"),
        (changed("embl", "//\n", ""), "line 17: the record of line 1 has no end, '//'"),
        (written([*TWINS, TWINS[1]], "genbank"), "record 'AB22.3': the name stands twice, in lines 15 and 42"),
        (written([*TWINS, TWINS[1]], "embl"), "record 'AB22.3': the name stands twice, in lines 18 and 51"),
        (written(TWINS, "genbank").removesuffix(b"//\n"), "record in line 27: Premature end of file in sequence data"),
        (written(TWINS, "embl").removesuffix(b"//\n"), "record in line 33: Premature end of file in sequence data"),
        (b"LOCUS       AB1  nonsense\n//\n", "record in line 1: Did not recognise the LOCUS line layout: LOCUS"),
        (b"ID   AB1 nonsense\nXX\n//\n", "record in line 1: Did not recognise the ID line layout: ID"),
        (written(TWINS, "genbank").replace(b"definition", b"d\xe9finition"), "line 1: byte 0xe9, which is not UTF-8"),
        (written(TWINS, "genbank").replace(b"ORIGIN", b"ORI\0IN"), "line 10: a NUL byte"),
    ],
)
def test_bad_flat_file(tmp_path, content, message):
    assert message in refused(tmp_path, content)


def test_genbank_without_bases(tmp_path):
    head = "LOCUS       AB1                       12 bp    DNA     linear   BCT 01-JAN-2020\nDEFINITION  x.\n"
    for rest in ("ACCESSION   AB1\nVERSION     AB1.7\nCONTIG      join(AB1.1:1..12)\n//\n", "ORIGIN\n//\n"):
        assert ", line 1: no sequence; get the full record" in refused(tmp_path, (head + rest).encode())


def read_as_far_as_it_goes(path) -> tuple[list[tuple[str, list[int]]], str]:
    """Names and tokens of the records given, and the message of the error that ended it, "" if there was none."""
    given: list[tuple[str, list[int]]] = []
    try:
        given.extend((record.name, record.tokens.tolist()) for record in read_records(path))
    except InputError as error:
        return given, str(error)
    return given, ""


@pytest.mark.parametrize("format", ["fastq", "genbank", "embl"])
@given(data=st.data())
def test_cut_anywhere_gives_whole_records_and_says_so(tmp_path_factory, format, data):
    content = written(TWINS, format)
    path = tmp_path_factory.mktemp("cut") / "x"
    path.write_bytes(content[: data.draw(st.integers(1, len(content) - 1))])
    given, message = read_as_far_as_it_goes(path)
    assert given == [(name, tokenize(sequence).tolist()) for name, sequence in TWINS][: len(given)]
    is_whole = path.read_bytes().rstrip() + b"\n" in [written(TWINS[:n], format) for n in (1, 2, 3)]
    assert is_whole is (message == "")
    assert is_whole or message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_any_damage_gives_records_or_one_line(tmp_path_factory, format, data):
    content = bytearray(written(TWINS, format))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path = tmp_path_factory.mktemp("damaged") / "x"
    path.write_bytes(bytes(content))
    given, message = read_as_far_as_it_goes(path)
    assert all(name and tokens for name, tokens in given)
    assert given or message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.parametrize(("sequence", "says"), [("MKVLE", True), ("mkfl*", True), ("ACGTE", False), ("ACG-T", False)])
def test_protein_is_called_protein(tmp_path, sequence, says):
    message = refused(tmp_path, f">a\nAC\n>p\n{sequence}\n".encode())
    assert message.startswith("record 'p', line 4: ")
    assert message.endswith("in either case; it looks like protein") is says


# A file that changes meanwhile


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b">z\nAC\n")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 12345))


def replace_by_a_copy(path: Path) -> None:
    status = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


@pytest.mark.parametrize("change", [append, touch, replace_by_a_copy, Path.unlink])
@pytest.mark.parametrize("after", [b">c\nAC\n", b">c\nA-\n"], ids=["good", "bad"])
def test_change_while_it_is_read(tmp_path, change, after):
    path = tmp_path / "x.fa"
    path.write_bytes(b">a\nAC\n>b\nAC\n" + after)
    records = read_records(path)
    assert next(records).name == "a"
    change(path)
    with pytest.raises(InputError, match=r"x.fa: changed while it was read; read it again when it is complete$"):
        list(records)


def test_fastq_cut_while_it_is_read(tmp_path):
    path = tmp_path / "x.fq"
    path.write_bytes(b"@a\nAC\n+\nII\n@b\nA-\n+\nII\n")
    records = read_records(path)
    assert next(records).name == "a"
    path.write_bytes(b"@a\nAC\n")  # too short to find the line of record b again
    with pytest.raises(InputError, match=r"x.fq: changed while it was read"):
        list(records)
