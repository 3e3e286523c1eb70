"""What the command line makes of bad input: one clear line, exit code 1 (2 for bad usage), and no file touched."""

import gzip
import json
import pickle  # noqa: TID251 - to show that it is not read
import resource
import shutil
from contextlib import contextmanager

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


# Models


def test_folders_that_are_no_model(error, run, files, two_classes, tmp_path):
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    empty.mkdir()
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    copies = {
        "half.safetensors": lambda weights: weights.write_bytes(weights.read_bytes()[:-100]),
        "zeros.safetensors": lambda weights: weights.write_bytes(bytes(weights.stat().st_size)),
        "none.safetensors": lambda weights: weights.unlink(),
    }
    expected = {
        empty: "no config.json",
        foreign: "holds no polymamba model",
        tmp_path / "nowhere": "no such run folder",
    }
    for name, damage in copies.items():
        shutil.copytree(run, tmp_path / name)
        damage(tmp_path / name / "model.safetensors")
        expected[tmp_path / name] = "model.safetensors"
    shutil.copytree(run, tmp_path / "config")
    (tmp_path / "config" / "config.json").write_text("{")
    expected[tmp_path / "config"] = "config.json: not JSON"
    for folder, words in expected.items():
        for verb in (
            ["predict", folder, files["with"]],
            ["embed", folder, files["with"], "-o", tmp_path / "e.npy"],
            ["eval", folder, *two_classes, "-o", tmp_path / "output"],
        ):
            line = error(*verb)
            assert str(folder) in line
            assert words in line


class Malicious:
    """As a pickle it runs code: it makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


def test_a_pickle_in_place_of_weights_is_not_run(error, run, files, tmp_path):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(run, folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Malicious(victim)))
    assert "not the weights of this model" in error("predict", folder, files["with"])
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(victim))).close()  # else the above would show nothing
    assert victim.exists()


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


def test_thresholds_of_one_model_for_an_ensemble(error, run, files):
    words = (run, files["with"], "--ensemble", run, "--tuned-threshold")
    assert "not those of an --ensemble" in error("predict", *words)


def test_ensembles_of_unlike_models(error, run, files, two_classes, tmp_path, fast):
    other, table = tmp_path / "other", tmp_path / "table.tsv"
    text = files["with"].read_text().split()
    rows = [
        f"{name[1:]}\t{sequence}\t{i % 2}\n" for i, (name, sequence) in enumerate(zip(*[iter(text)] * 2, strict=True))
    ]
    table.write_text("id\tsequence\tlabel\n" + "".join(rows))
    assert main(["genomics", "train", "--table", str(table), "-o", str(other), *fast, "--epochs", "1"]) == 0
    for words in (["predict", run, files["with"]], ["eval", run, *two_classes, "-o", tmp_path / "e"]):
        line = error(*words, "--ensemble", other)
        assert str(other) in line
        assert "classes ('0', '1'), but" in line


def test_thresholds_where_there_are_none(error, run, files, two_classes, tmp_path):
    untuned = tmp_path / "untuned"
    shutil.copytree(run, untuned)
    (untuned / "thresholds.json").unlink()
    for words in (["predict", untuned, files["with"]], ["eval", untuned, *two_classes, "-o", tmp_path / "e"]):
        assert "--tuned-threshold needs a run folder of `train`" in error(*words, "--tuned-threshold")
    (untuned / "thresholds.json").write_text('{"with": 0.5}')
    assert "thresholds.json" in error("predict", untuned, files["with"], "--tuned-threshold")
    three = json.loads((untuned / "config.json").read_text())
    for change in ({"target": "regression", "classes": ["value"]}, {"classes": ["a", "b", "c"]}):
        (untuned / "config.json").write_text(json.dumps(three | change))
        line = error("predict", untuned, files["with"], "--tuned-threshold")
        assert "not the weights" in line or "decides between two classes" in line


def test_a_class_that_the_model_does_not_know(error, run, files, tmp_path):
    line = error("eval", run, "--class", f"third={files['with']}", "-o", tmp_path / "e")
    assert "class third: not among the known classes with, without" in line


def test_a_part_that_is_not_there(error, run, two_classes, tmp_path):
    line = error("eval", run, *two_classes, "-o", tmp_path / "e", "--split", "valid")
    assert "--split valid: no record is of this part" in line


# Divisions


def test_splits_that_do_not_fit(error, two_classes, tmp_path, run):
    splits, output = tmp_path / "splits.tsv", tmp_path / "output"
    header, *rows = (run / "splits.tsv").read_text().splitlines(keepends=True)
    wrong = {
        "has 121 records, but 120 were read": [header, *rows, "x\twith\ttest\tno.fa\n"],
        "is not in this file": [header, *rows[1:]],
        "line 1: expected the columns": rows,
        "line 2: expected id, class, one of": [header, rows[0].replace("\ttrain\t", "\ttraining\t"), *rows[1:]],
        "line 122: record 'w0'": [header, *rows, rows[0]],
    }
    for expected, lines in wrong.items():
        splits.write_text("".join(lines))
        for verb in ("train", "split"):
            line = error(verb, *two_classes, "--splits", splits, "-o", output)
            assert str(splits) in line
            assert expected in line
    splits.unlink()
    assert str(splits) in error("train", *two_classes, "--splits", splits, "-o", output)


def test_parts_that_cannot_be(error, two_classes, tmp_path):
    output = tmp_path / "output"
    for expected, flags in {
        "valid part; see --valid-fraction": ["--valid-fraction", 0],
        "add up to less than 1": ["--valid-fraction", 0.5, "--test-fraction", 0.5],
        "must not be negative": ["--valid-fraction", -0.1],
        "need --split-by chromosome": ["--test-chromosomes", "chr1"],
        "chr99": ["--split-by", "chromosome", "--test-chromosomes", "chr99", "--valid-fraction", 0],
        "name its chromosomes too": ["--split-by", "chromosome", "--test-chromosomes", "w0"],
        "leave the other flags for it out": ["--splits", "s.tsv", "--split-by", "cluster"],
    }.items():
        assert expected in error("train", *two_classes, "-o", output, *flags)


# Flags


def test_sources_that_contradict_each_other(error, files, run, tmp_path):
    output, fasta = tmp_path / "output", files["with"]
    for expected, flags in {
        "got none of them": [],
        "got --class and --fasta together": ["--class", f"a={fasta}", "--fasta", fasta],
        "got --example and --table together": ["--example", "splice", "--table", "t.tsv"],
        "no example 'human'; there is splice": ["--example", "human"],
        "expected NAME=FASTA": ["--class", fasta],
        "given twice": ["--class", f"a={fasta}", "--class", f"b={fasta}"],
        "--labels says nothing about --class": ["--class", f"a={fasta}", "--labels", "l.tsv"],
        "--genome says nothing about --fasta": ["--fasta", fasta, "--genome", fasta],
        "--features says nothing about --example": ["--example", "splice", "--features", "CDS"],
        "both say the class": ["--fasta", fasta, "--labels", "l.tsv", "--label-pattern", "(a)"],
        "--regions needs --genome": ["--regions", "r.bed"],
        "no regular expression": ["--fasta", fasta, "--label-pattern", "("],
        "has no group": ["--fasta", fasta, "--label-pattern", "a"],
        "no class in the header 'w0'": ["--fasta", fasta, "--label-pattern", "class=(a)"],
    }.items():
        for words in (["train"], ["split"], ["stats"], ["eval", run]):
            assert expected in error(*words, *flags, "-o", output)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--window", "0"], "window is 0; it must be at least 1"),
        (["train", "--window", "5", "--stride", "-1"], "stride is -1"),
        (["train", "--stride", "5"], "give window too"),
        (["train", "--max-n", "2"], "max_n is 2.0; it is a share from 0 to 1"),
        (["train", "--similarity", "7"], "similarity is 7.0"),
        (["train", "--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["train", "--epochs", "many"], "--epochs: invalid literal for int() with base 10: 'many'"),
        (["train", "--lr", "nan"], "lr is nan; it must be a number above 0"),
        (["train", "--patience", "-1"], "patience is -1; it must not be negative"),
        (["train", "--ema", "1"], "ema (1.0) must be at least 0 and below 1"),
        (["train", "--mask-rate", "1.5"], "mask_rate is 1.5"),
        (["train", "--label-smoothing", "-1"], "label_smoothing is -1.0"),
        (["train", "--seed", "-1"], "seed is -1"),
        (["train", "--target", "multilabel", "--balance", "sampling"], "with target multilabel use none"),
        (["train", "--target", "regression", "--balance", "loss"], "with target regression use none"),
        (["split", "--seed", "-1"], "seed is -1"),
        (["eval", "run", "--max-n", "-1"], "max_n is -1.0"),
        (["eval", "run", "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["predict", "run", "x.fa", "--max-tokens", "0"], "max_tokens is 0; it must be at least 1"),
        (["predict", "run", "x.fa", "--window", "0"], "window is 0; it must be at least 1"),
        (["predict", "run"], "no sequence file"),
        (["embed", "run", "x.fa", "--stride", "0"], "stride is 0; it must be at least 1"),
    ],
)
def test_values_that_make_no_sense(words, expected, error, tmp_path):
    assert expected in error(*words, "-o", tmp_path / "output", code=2)


def test_an_idle_stride(error, run, files):
    assert "give --window too" in error("predict", run, files["with"], "--stride", 5)


def test_words_that_are_no_usage(capsys):
    for words in (["genomics", "fly"], ["alchemy"], ["genomics", "train", "-o", "x", "--colour", "red"], []):
        assert main(words) == 2
        assert "Traceback" not in capsys.readouterr().err


# Outputs


@pytest.mark.parametrize("where", ["file/output", "/proc/output", "taken"])
def test_outputs_that_cannot_be_made(where, error, run, files, two_classes, tmp_path):
    """As root no folder refuses to be written to; below a file or in /proc nobody can make one."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("precious")
    output = tmp_path / where  # an absolute one stays as it is
    for words in (["train"], ["split"], ["stats"], ["eval", run]):
        assert str(output) in error(*words, *two_classes, "-o", output)
    if where != "taken":
        assert f"{output}.tsv" in error("predict", run, files["with"], "-o", f"{output}.tsv")
        assert f"{output}.npy" in error("embed", run, files["with"], "-o", f"{output}.npy")


def test_outputs_without_a_kind(error, run, files, tmp_path):
    assert "name it .tsv, .bed or .bedgraph" in error("predict", run, files["with"], "-o", tmp_path / "p.xlsx")
    assert "name it .npy or .parquet" in error("embed", run, files["with"], "-o", tmp_path / "e.txt")


def test_an_output_that_holds_another_run(error, two_classes, run, fast, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert "already holds a run" in error("train", *two_classes, "-o", folder, *fast)
    line = error("train", *two_classes, "-o", folder, *fast, "--epochs", 9, "--resume")
    assert "setting epochs was 3 and is now 9" in line
    a, b = (word.partition("=") for word in two_classes[1::2])
    swapped = ("--class", f"{a[0]}={b[2]}", "--class", f"{b[0]}={a[2]}")
    assert "setting records_sha256 was" in error("train", *swapped, "-o", folder, *fast, "--resume")
    assert "holds no run to resume" in error("train", *two_classes, "-o", tmp_path / "new", *fast, "--resume")
    (folder / "manifest.json").write_text("{")
    assert "manifest.json: damaged" in error("train", *two_classes, "-o", folder, *fast, "--resume")


@contextmanager
def full_disk(limit: int = 64):
    """Files grow no longer than `limit` bytes: what a full disk is to a writer, short of the error's number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(error, run, files, two_classes, tmp_path):
    old = tmp_path / "old.tsv"
    old.write_text("precious")
    for words in (
        ["predict", run, files["with"], "-o", old],
        ["predict", run, files["with"], "-o", tmp_path / "new.bedgraph"],
        ["embed", run, files["with"], "-o", tmp_path / "new.npy"],
        ["eval", run, *two_classes, "-o", tmp_path / "output"],
        ["stats", *two_classes, "-o", tmp_path / "output"],
        ["split", *two_classes, "-o", tmp_path / "output"],
    ):
        with full_disk():
            line = error(*words)
        assert "cannot be written (File too large)" in line
        assert str(tmp_path) in line
