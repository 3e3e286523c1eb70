"""What the command line makes of bad flags, divisions and outputs: a clear line, exit code 1 or 2, no file touched."""

import shutil

import pytest

from polymamba.cli import main

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


# Divisions


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


# Outputs


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


def test_a_full_disk(full_disk, error, run, files, two_classes, tmp_path):
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
        with full_disk(64):
            line = error(*words)
        assert "cannot be written (File too large)" in line
        assert str(tmp_path) in line
