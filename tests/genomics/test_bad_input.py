"""What the command line makes of bad sequences, labels and regions: one clear line, exit code 1, and no file touched.

Bad models: test_bad_models.py; bad flags, divisions and outputs: test_bad_flags.py.
"""

import gzip

import pytest
from Bio.bgzf import BgzfWriter

from polymamba.cli import main
from polymamba.genomics.reading import format as reading_format

GOOD = b"".join(b">g%d\n%s\n" % (i, b"ACGTTGCA" * 4 + b"ACGT"[i % 4 : i % 4 + 1] * (i + 1)) for i in range(40))


def bgzip(content: bytes, path) -> bytes:
    with BgzfWriter(str(path)) as file:
        file.write(content)
    return path.read_bytes()


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF, content[middle + 1] ^ 0xFF]) + content[middle + 2 :]


# What a file holds -> what the line has to say of it.
BAD_FILES = {
    "empty": (b"", ["is empty"]),
    "blank": (b"\n \n", ["is empty"]),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), ["a PNG image"]),
    "csv": (b"id,sequence\na,ACGT\n", ["a comma-separated table"]),
    "html": (b"<!DOCTYPE html>\n<p>404</p>\n", ["HTML"]),
    "utf16": (">a\nACGT\n".encode("utf-16"), ["UTF-16"]),
    "gzip_truncated": (gzip.compress(GOOD)[:-30], ["truncated", "get the file again"]),
    "gzip_damaged": (damaged(gzip.compress(GOOD)), ["damaged", "get the file again"]),
    "no_sequence": (b">a\n>b\nACGT\n", ["record 'a'", "line 1", "no sequence"]),
    "no_sequence_at_the_end": (b">a\nACGT\n>b\n", ["record 'b'", "line 3", "no sequence"]),
    "no_name": (b">\nACGT\n", ["line 1", "no name"]),
    "duplicate": (b">a\nACGT\n>a\nAACC\n", ["'a'", "twice", "lines 1 and 3"]),
    "illegal_letter": (b">a\nACGT\n>b\nACGT\nAC!T\n", ["'b'", "line 5", "'!'"]),
    "protein": (b">p\nMKLVFEIPQ\n", ["'p'", "line 2", "protein"]),
    "quality_too_short": (b"@a\nACGT\n+\nIIII\n@b\nACGT\n+\nII\n", ["record 2", "line 5", "quality values"]),
    "nul": (b">a\nAC\0GT\n", ["line 2", "NUL"]),
    "genbank_cut": (b"LOCUS       A  4 bp DNA linear\nORIGIN\n        1 acgt\n", ["line 1"]),
}


@pytest.mark.parametrize("kind", [*BAD_FILES, "missing", "bgzip_truncated", "folder"])
def test_unreadable_sequences(kind, error, run, tmp_path):
    """Of all verbs alike: the first error of the file, before anything is written."""
    bad, good, output = tmp_path / "bad.fa.gz", tmp_path / "good.fa", tmp_path / "output"
    good.write_bytes(GOOD)
    content, expected = BAD_FILES.get(kind, (None, []))
    if kind == "missing":
        expected = ["no such file"]
    elif kind == "folder":
        bad.mkdir()
        expected = ["no sequence file"]
    elif kind == "bgzip_truncated":
        bad.write_bytes(bgzip(GOOD * 10, tmp_path / "whole.gz")[:-28])
        expected = ["truncated", "bgzip"]
    else:
        bad.write_bytes(content)
    classes = ["--class", f"with={good}", "--class", f"without={bad}"]
    for words in (
        ["train", *classes, "-o", output],
        ["split", *classes, "-o", output],
        ["stats", *classes, "-o", output],
        ["stats", "--fasta", bad],
        ["eval", run, *classes, "-o", output],
        ["predict", run, good, bad],
        ["predict", run, good, bad, "-o", output.with_suffix(".bed")],
        ["embed", run, good, bad, "-o", output.with_suffix(".npy")],
    ):
        line = error(*words)
        for words_of_it in (str(bad), *expected):
            assert words_of_it in line


@pytest.mark.parametrize("verb", ["train", "predict"])
def test_a_file_that_changes_while_it_is_read(verb, error, run, files, tmp_path, monkeypatch):
    growing, output = tmp_path.parent / f"growing-{verb}.fa", tmp_path / "output.tsv"
    growing.write_bytes(GOOD)
    tokenize = reading_format.tokenize

    def tokenize_while_another_writes(sequence):
        with growing.open("ab") as file:
            file.write(b">more\nACGT\n")
        return tokenize(sequence)

    monkeypatch.setattr(reading_format, "tokenize", tokenize_while_another_writes)
    words = {
        "train": ["train", "--class", f"a={growing}", "--class", f"b={files['with']}"],
        "predict": ["predict", run, growing],
    }
    assert f"{growing}: changed while it was read" in error(*words[verb], "-o", output)


def test_a_name_of_two_files_along_records(error, run, tmp_path):
    for name in ("x", "y"):
        (tmp_path / f"{name}.fa").write_text(">chr1\nACGTACGTACGT\n")
    for ending in ("bed", "bedgraph"):
        words = (run, tmp_path / "x.fa", tmp_path / "y.fa", "-o", tmp_path / f"o.{ending}")
        assert "record 'chr1' stands in" in error("predict", *words)
    assert "given twice" in error("predict", run, tmp_path / "x.fa", tmp_path / "x.fa")


def test_only_windows_of_n(error, run, tmp_path):
    (tmp_path / "n.fa").write_text(f">a\n{'N' * 40}\n")
    assert "4 windows are mostly N; see --max-n" in error("predict", run, tmp_path / "n.fa", "--window", 10)


# Labels


def test_classes_that_cannot_be_learnt(error, files, tmp_path):
    output, one = tmp_path / "run", tmp_path / "one.fa"
    assert "with) is too few to classify" in error("train", "--class", f"with={files['with']}", "-o", output)
    one.write_text(">only\nACGTACGT\n")
    classes = ["--class", f"with={files['with']}", "--class", f"rare={one}"]
    for verb in ("train", "split"):
        line = error(verb, *classes, "-o", output)
        assert "rare" in line
        assert "1 " in line


def test_sequences_of_nothing_but_n(error, run, files, tmp_path):
    output, ns = tmp_path / "output", tmp_path / "ns.fa"
    ns.write_text("".join(f">n{i}\n{'N' * (20 + i)}\n" for i in range(20)))
    both = ["--class", f"with={ns}", "--class", f"without={files['without']}"]
    for flags in ([], ["--window", 15], ["--balance", "loss"], ["--balance", "sampling"]):
        line = error("train", *both, "-o", output, *flags)
        assert "class 'with': no sequence is left for the train part" in line
        assert "--max-n" in line
    line = error("eval", run, "--class", f"with={ns}", "-o", output)
    assert "all 20 sequences are more than 50% N" in line


def test_a_label_table_that_does_not_fit(error, run, files, tmp_path):
    table, output = tmp_path / "labels.tsv", tmp_path / "output"
    rows = [f"w{i}\t{'with' if i % 2 else 'without'}\n" for i in range(60)]
    source = ["--fasta", files["with"], "--labels", table]
    tables = {
        "1 of 60 sequences have no row (w59)": ["id\tlabel\n", *rows[:-1]],
        "1 of 61 rows have no sequence (w60)": ["id\tlabel\n", *rows, "w60\twith\n"],
        "line 62: id 'w0' stands in line 2 too": ["id\tlabel\n", *rows, rows[0]],
        "line 3: no label": ["id\tlabel\n", rows[0], "w1\t\n"],
        "no column for the label": ["id\tcolour\n", *rows],
        "is empty": [],
        "has no row": ["id\tlabel\n"],
    }
    for expected, lines in tables.items():
        table.write_text("".join(lines))
        for words in (["train"], ["stats"], ["split"], ["eval", run]):
            line = error(*words, *source, "-o", output)
            assert str(table) in line
            assert expected in line


@pytest.mark.parametrize("label", ["high", "nan", "inf"])
def test_a_value_that_is_no_number(label, error, tmp_path):
    table = tmp_path / "table.tsv"
    table.write_text(f"id\tsequence\tlabel\nr\tACGT\t1.5\ns\tACGT\t{label}\n")
    for words in (["train", "-o", tmp_path / "run"], ["stats"]):
        line = error(*words, "--table", table, "--target", "regression")
        assert f"{table}, record 's': label {label!r} is no finite number" in line


# Regions


def test_regions_that_do_not_fit_the_genome(error, run, tmp_path):
    genome, bed, output = tmp_path / "genome.fa", tmp_path / "regions.bed", tmp_path / "output"
    genome.write_text(">1\n" + "ACGT" * 25 + "\n>2\n" + "GATTACA" * 10 + "\n")
    beds = {
        "line 2: ends at 101, but chromosome '1' has 100 bases": "1\t0\t10\twith\n1\t90\t101\twithout\n",
        "line 1: chromosome 'X' is not in the genome": "X\t0\t10\twith\n",
        "line 1: the region is empty or backwards, 10-10": "1\t10\t10\twith\n",
        "line 1: the region is empty or backwards, 20-10": "1\t20\t10\twith\n",
        "line 1: start '-5' is no whole number": "1\t-5\t10\twith\n",
        "line 1: 2 columns": "1\t5\n",
        "line 1: no label": "1\t5\t20\n",
        "holds no region": "# nothing\n",
    }
    for expected, text in beds.items():
        bed.write_text(text)
        for words in (["train"], ["stats"], ["eval", run]):
            line = error(*words, "--regions", bed, "--genome", genome, "-o", output)
            assert str(bed) in line
            assert expected in line


def test_regions_under_the_genome_s_other_names_are_no_error(tmp_path, capsys):
    (tmp_path / "genome.fa").write_text(">1\nACGTACGTAC\n")
    (tmp_path / "regions.bed").write_text("chr1\t2\t6\twith\n")
    words = ["--regions", str(tmp_path / "regions.bed"), "--genome", str(tmp_path / "genome.fa")]
    assert main(["genomics", "stats", *words]) == 0
    assert "with" in capsys.readouterr().out
