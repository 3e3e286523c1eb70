"""Tables of labels and sequences against what was written, and every table that must be refused."""

import csv
import gzip
import io

import numpy as np
import pysam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import tokenize
from polymamba.genomics.reading.tables import (
    LabelRow,
    match_labels,
    part_at,
    read_label_table,
    read_sequence_table,
)

# Anything that may stand in a field, delimiters, quotes and line ends too; blanks around it would not count.
FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=8).filter(
    lambda text: text == text.strip()
)
LABELS = st.lists(st.tuples(FIELDS, FIELDS, st.sampled_from(["train", "Valid", "val", "validation", "DEV", "test"])))
PART_OF = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "dev": "valid", "test": "test"}


def table_text(header, rows, delimiter: str = ",", end: str = "\n", quoting=csv.QUOTE_MINIMAL) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([header, *rows])
    return text.getvalue()


def refusal(tmp_path, content: str | bytes, read=read_label_table) -> str:
    """The message with which a table of this content is refused, without its path."""
    path = tmp_path / "x.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).lstrip(",: ")


# What is read


@given(
    rows=LABELS.filter(lambda rows: rows and len({row[0] for row in rows}) == len(rows)),
    delimiter=st.sampled_from("\t,;"),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    packed=st.booleans(),
)
def test_label_table_reads_back(tmp_path_factory, rows, delimiter, end, quoting, mark, packed):
    content = mark + table_text(["id", "label", "split"], rows, delimiter, end, quoting).encode()
    path = tmp_path_factory.mktemp("table") / "x"  # compression is told by content, not by name
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    read = read_label_table(path)
    assert [(row.id, row.label, row.split) for row in read] == [(i, x, PART_OF[part.lower()]) for i, x, part in rows]
    line = 2  # fields may hold line ends, so that a row takes several lines
    for row, written in zip(read, rows, strict=True):
        assert row.line == line
        line += 1 + sum(field.count("\n") for field in written)


@given(
    sequences=st.lists(st.text("ACGTNacgtnURYK", min_size=1, max_size=40), min_size=1, max_size=6),
    numbered=st.booleans(),
    delimiter=st.sampled_from("\t,;"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_sequence_table_reads_back(tmp_path_factory, sequences, numbered, delimiter, end):
    rows = [(f"s{i}", sequence, f"class {i % 2}") for i, sequence in enumerate(sequences)]
    header = ["Name", "DNA", "Target"]
    if numbered:
        header, rows = header[1:], [row[1:] for row in rows]
    path = tmp_path_factory.mktemp("table") / "x.tsv"
    path.write_bytes(table_text(header, rows, delimiter, end).encode())
    read = read_sequence_table(path)
    ids = [str(i + 1) for i in range(len(rows))] if numbered else [row[0] for row in rows]
    assert [(row.id, row.sequence, row.label, row.split) for row in read] == [
        (name, *row[-2:], "") for name, row in zip(ids, rows, strict=True)
    ]
    assert [row.line for row in read] == list(range(2, len(rows) + 2))
    for row, sequence in zip(read, sequences, strict=True):
        assert row.tokens.dtype == np.uint8
        assert np.array_equal(row.tokens, tokenize(sequence))


@pytest.mark.parametrize("id_name", ["id", "NAME", "Seq_ID", "#id", " # Id"])
@pytest.mark.parametrize("label_name", ["label", "Class", "TARGET"])
@pytest.mark.parametrize("split_name", ["split", "set", "Partition"])
def test_synonyms_in_any_order_among_other_columns(tmp_path, id_name, label_name, split_name):
    (tmp_path / "x").write_text(f"{id_name}\t{split_name}\tlength\t{label_name}\n\na \tval\t\t b c\n   \n")
    assert read_label_table(tmp_path / "x") == [LabelRow("a", "b c", "valid", 3)]


def test_commas_in_quotes_do_not_make_the_delimiter(tmp_path):
    (tmp_path / "x").write_text('"id";"a,b,c,d";label\n1; "x;y";"z ""w"""\n')
    assert read_label_table(tmp_path / "x") == [LabelRow("1", 'z "w"', "", 2)]


def test_a_chromosome_in_one_field(tmp_path):
    sequence = "ACGT" * 100_003
    (tmp_path / "x").write_text(f"sequence,label\n{sequence},a\n")
    usual_limit = csv.field_size_limit()
    assert read_sequence_table(tmp_path / "x")[0].sequence == sequence
    assert csv.field_size_limit() == usual_limit


def test_many_blocks(tmp_path):
    rows = [(f"r{i}", f"c{i % 7}") for i in range(60_001)]
    content = table_text(["id", "class"], rows, "\t").encode()
    (tmp_path / "plain").write_bytes(content)
    pysam.tabix_compress(str(tmp_path / "plain"), str(tmp_path / "packed"))
    for name in ("plain", "packed"):
        assert [row[:2] for row in read_label_table(tmp_path / name)] == rows


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected a table"),
        ("\n \n", "is empty; expected a table"),
        ("id,label\n", "has no row below its header"),
        ("id,kind\na,b\n", "line 1: no column for the label (label or class or target); the header has id, kind"),
        ("\nkind|id\n", "line 2: no column for the id (id or name or seq_id); the header has kind|id"),
        ("id,class,Label\na,b,c\n", "line 1: columns 'class' and 'Label' may both be the label; rename one"),
        ("id,label\na,b\nc\n", "line 3: 1 fields, but the header has 2"),
        ("id,label\na,b,c\n", "line 2: 3 fields, but the header has 2"),
        ('id,label\n"a\n1",b\nc,d,e\n', "line 4: 3 fields, but the header has 2"),
        ("id,label\na,b\nc, \n", "line 3: no label; fill the column 'label'"),
        ("id,label\n,b\n", "line 2: no id; fill the column 'id'"),
        ("id,label\na,b\nc,d\n\na,e\n", "line 5: id 'a' stands in line 2 too"),
        ("id,label,split\na,b,train\nc,d,holdout\n", "line 3: split 'holdout' is none of train, valid (or val, "),
        ("id,label,split\na,b,\n", "line 2: no split; fill the column 'split'"),
        ('id,label\na,b\n"c,d\ne,f\n', "line 3: quotes that do not match"),
        ('id,label\na,"b"c\n', "line 2: quotes that do not match"),
        (b"id,label\na,b\n\xe9,d\n", "line 3: byte 0xe9, which is not UTF-8 text"),
        ("id,label\na,b\0\n", "line 2: a NUL byte"),
        ("id,label\ra,b\r", "line 1: a bare carriage return"),
        (gzip.compress(b"id,label\na,b\n" * 9, mtime=0)[:-3], "truncated: "),
    ],
)
def test_label_table_refused(tmp_path, content, message):
    assert refusal(tmp_path, content).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seq,label\nACGT,a\nAC-T,b\n", "record '2', line 3: '-' at position 3 is no DNA letter"),
        ("id\tseq\tlabel\nx\tACGT\ta\ny\tAC GT\tb\n", "record 'y', line 3: ' ' at position 3 is no DNA letter"),
        ("seq,label\n,a\n", "line 2: no sequence; fill the column 'seq'"),
        ("seq,label\nACGT,\n", "line 2: no label; fill the column 'label'"),
        ("id,label\na,b\n", "line 1: no column for the sequence (sequence or seq or dna); the header has id, label"),
        ("id,seq,label\na,A,b\na,C,b\n", "line 3: id 'a' stands in line 2 too"),
        ("seq,label,set\nA,b,final\n", "line 2: split 'final' is none of train, "),
        (">a\nACGT\n", "line 1: no column for the sequence"),
    ],
)
def test_sequence_table_refused(tmp_path, content, message):
    assert refusal(tmp_path, content, read_sequence_table).startswith(message)


@pytest.mark.parametrize(("name", "message"), [("missing.csv", "no such file"), ("folder", "is a folder")])
def test_no_file(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{name}: {message}"):
        read_label_table(tmp_path / name)


def test_bgzip_cut_between_two_blocks(tmp_path):
    (tmp_path / "plain").write_text(table_text(["id", "label"], [("a", "b")]))
    pysam.tabix_compress(str(tmp_path / "plain"), str(tmp_path / "packed"))
    assert refusal(tmp_path, (tmp_path / "packed").read_bytes()[:-28]).startswith("truncated: ")


def test_part_at():
    assert {word: part_at("t.tsv, line 2", word) for word in PART_OF} == PART_OF
    for word in ("", "training", "."):
        with pytest.raises(InputError, match=r"t\.tsv, line 2: split .* is none of train, valid"):
            part_at("t.tsv, line 2", word)


# Records and rows


@given(st.permutations([f"r{i}" for i in range(7)]))
def test_labels_in_the_order_of_the_records(names):
    rows = [LabelRow(f"r{i}", f"c{i}", "", i + 2) for i in range(7)]
    assert [row.id for row in match_labels(iter(names), rows, "x.csv")] == names


@pytest.mark.parametrize(
    ("names", "ids", "message"),
    [
        ("abc", "bc", "x.csv: 1 of 3 sequences have no row (a); ids"),
        ("a", "dacb", "x.csv: 3 of 4 rows have no sequence (d, c, b); ids"),
        (
            "abcdef",
            "fxg",
            "x.csv: 5 of 6 sequences have no row (a, b, c, ...); 2 of 3 rows have no sequence (x, g); ids",
        ),
        ("aba", "ab", "x.csv: a name more than one of the sequences"),
        ("", "a", "x.csv: 1 of 1 rows have no sequence (a); ids"),
    ],
)
def test_labels_that_do_not_match(names, ids, message):
    rows = [LabelRow(name, "c", "", line) for line, name in enumerate(ids, 2)]
    with pytest.raises(InputError) as error:
        match_labels(names, rows, "x.csv")
    assert str(error.value).startswith(message)
