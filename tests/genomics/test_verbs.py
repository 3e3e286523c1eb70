"""`polymamba genomics ...` as a user runs it: files in, files out, one clear line when something is wrong."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from polymamba.cli import main
from polymamba.core import BackboneConfig, TrainConfig
from polymamba.core.hub import config_from_dict
from polymamba.genomics import Dividing, DNAClassifier, DNAClassifierConfig, Source, divide, read_source
from polymamba.genomics.training import TrainDNA

FAST = ["--epochs", "3", "--batch-size", "16", "--device", "cpu", "--lr", "5e-3"]


def write_fasta(path: Path, records: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records))
    return path


def sequences(rng, prefix: str, motif: str, n: int) -> list[tuple[str, str]]:
    """Random DNA of 30 to 50 bases, of which each holds `motif`."""

    def one() -> str:
        left, right = ("".join(rng.choice(list("ACGT"), rng.integers(10, 20))) for _ in range(2))
        return left + motif + right

    return [(f"{prefix}{i}", one()) for i in range(n)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder, rng = tmp_path_factory.mktemp("fasta"), np.random.default_rng(0)
    return {
        "with": write_fasta(folder / "with.fa", sequences(rng, "w", "GGGTACCCGG", 60)),
        "without": write_fasta(folder / "without.fa", sequences(rng, "o", "ATATATTTAA", 60)),
    }


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["genomics", "train", *class_flags(files), "-o", str(output), *FAST]) == 0
    return output


def class_flags(files: dict[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in ("--class", f"{name}={path}")]


def read_tsv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def test_train_leaves_a_run_that_explains_itself(run):
    names = {
        *("config.json", "model.safetensors", "labels.json", "splits.tsv", "metrics.json", "log.jsonl", "curves.png"),
        *("manifest.json", "confusion.tsv", "confusion.png", "predictions.tsv"),
    }
    assert names <= {p.name for p in run.iterdir()}
    assert json.loads((run / "labels.json").read_text()) == {"0": "with", "1": "without"}
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 0
    assert len(manifest["inputs_sha256"]) == 2
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) >= {"accuracy", "mcc", "macro_f1", "auroc", "auprc"}
    test_rows = [row for row in read_tsv(run / "splits.tsv")[1:] if row[2] == "test"]
    predictions = read_tsv(run / "predictions.tsv")
    assert predictions[0] == ["id", "true", "label", "with", "without"]
    assert [(row[0], row[1]) for row in predictions[1:]] == [(row[0], row[1]) for row in test_rows]
    correct = np.mean([row[1] == row[2] for row in predictions[1:]])
    assert metrics["accuracy"]["value"] == pytest.approx(correct)


def test_predict_keeps_the_order_of_the_input(run, files, tmp_path, capsys):
    mixed = write_fasta(tmp_path / "mixed.fa", [("long", "ACGT" * 50), ("short", "acgun"), ("middle", "TTGAC" * 9)])
    paths = [str(mixed), str(files["with"])]
    assert main(["genomics", "predict", str(run), *paths, "-o", str(tmp_path / "p.tsv")]) == 0
    rows = read_tsv(tmp_path / "p.tsv")
    assert rows[0] == ["id", "label", "with", "without"]
    assert [row[0] for row in rows[1:]] == ["long", "short", "middle", *(f"w{i}" for i in range(60))]
    for row in rows[1:]:
        probabilities = np.array(row[2:], float)
        assert probabilities.sum() == pytest.approx(1, abs=1e-5)
        assert row[1] == ["with", "without"][probabilities.argmax()]
    capsys.readouterr()
    assert main(["genomics", "predict", str(run), *paths]) == 0
    assert capsys.readouterr().out == (tmp_path / "p.tsv").read_text()


def test_a_prediction_depends_on_its_sequence_alone(run, tmp_path):
    """Neither on batch mates (padding) nor on letter case, nor with --rc-average on the strand."""
    alone, crowd = tmp_path / "alone.fa", tmp_path / "crowd.fa"
    write_fasta(alone, [("a", "ACCGTTTGAC" * 3)])
    reverse = ("GTCAAACGGT" * 3).lower()
    write_fasta(crowd, [("x", "ACGTAC" * 40), ("a", "accguuugac" * 3), ("r", reverse), ("y", "A")])
    for fasta in (alone, crowd):
        words = [str(run), str(fasta), "-o", str(fasta.with_suffix(".tsv")), "--rc-average"]
        assert main(["genomics", "predict", *words]) == 0
    a = np.array(read_tsv(tmp_path / "alone.tsv")[1][2:], float)
    rows = read_tsv(tmp_path / "crowd.tsv")
    for row in (rows[2], rows[3]):
        assert np.array(row[2:], float) == pytest.approx(a, abs=2e-6)


def test_eval_equals_what_predict_and_the_labels_say(run, files, tmp_path, capsys):
    assert main(["genomics", "eval", str(run), *class_flags(files), "-o", str(tmp_path / "out")]) == 0
    assert "accuracy" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = read_tsv(tmp_path / "out" / "predictions.tsv")[1:]
    assert len(rows) == 120
    assert metrics["accuracy"]["value"] == pytest.approx(np.mean([r[1] == r[2] for r in rows]))
    matrix = np.array([row[1:] for row in read_tsv(tmp_path / "out" / "confusion.tsv")[1:]], int)
    assert matrix.sum() == 120
    assert matrix.trace() == sum(r[1] == r[2] for r in rows)


def test_validation_is_never_augmented(files):
    source = Source(classes=tuple(f"{name}={path}" for name, path in files.items()))
    data = divide(read_source(source), Dividing(), 0)
    task = TrainDNA(data, TrainConfig(), 0, mask_rate=0.5, rc_augment=True, balance="none", label_smoothing=0.0)
    torch.manual_seed(0)
    config = DNAClassifierConfig(backbone=BackboneConfig(d_model=8, n_layer=1), classes=data.classes)
    model = DNAClassifier(config).eval()
    with torch.no_grad():
        assert task.evaluate(model) == task.evaluate(model)
    assert task.plan(3)[0].tolist() == task.plan(3)[0].tolist()
    a, b = task.batch(task.plan(3)[0], 3), task.batch(task.plan(3)[0], 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], task.batch(task.plan(3)[0], 4)[0])  # augmented anew in the next epoch


def test_classifier_ignores_padding():
    torch.manual_seed(0)
    fields = {"backbone": {"d_model": 12, "n_layer": 2, "pattern": ["bimamba"]}, "classes": ["a", "b", "c"]}
    model = DNAClassifier(config_from_dict(DNAClassifierConfig, fields)).eval()
    tokens = torch.randint(7, 11, (3, 33))
    mask = torch.arange(33) < torch.tensor([33, 20, 1])[:, None]
    with torch.no_grad():
        batch = model(tokens, mask)
        for row, length in enumerate((33, 20, 1)):
            assert torch.allclose(batch[row], model(tokens[row : row + 1, :length])[0], atol=1e-5)


# A killed run


def train_words(files, output: Path) -> list[str]:
    flags = ["--epochs", "6", "--save-every", "3", *FAST[2:]]
    return [sys.executable, "-m", "polymamba", "genomics", "train", *class_flags(files), "-o", str(output), *flags]


@pytest.mark.slow
def test_kill_and_resume_gives_the_same_bits(files, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(train_words(files, whole), check=True, capture_output=True)
    process = subprocess.Popen(train_words(files, broken), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(broken.glob("checkpoints/step-*[1-9]"))) == 0:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "metrics.json").exists()
    subprocess.run([*train_words(files, broken), "--resume"], check=True, capture_output=True)
    for name in ("model.safetensors", "metrics.json", "predictions.tsv", "splits.tsv"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


# One clear line


@pytest.fixture
def error(capsys):
    """Run the command line; return its one line of error after checking exit code 1 and silence on stdout."""

    def run_main(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run_main


def test_missing_file(error, files, tmp_path):
    line = error("genomics", "train", "--class", f"a={tmp_path}/no.fa", *class_flags(files), "-o", tmp_path / "run")
    assert f"{tmp_path}/no.fa" in line
    assert "no such file" in line
    assert not (tmp_path / "run").exists()


def test_not_fasta(error, files, tmp_path):
    picture = tmp_path / "picture.fa"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    line = error("genomics", "train", "--class", f"a={picture}", *class_flags(files), "-o", tmp_path / "run")
    assert str(picture) in line
    assert "PNG" in line
    assert not (tmp_path / "run").exists()


def test_empty_class(error, files, tmp_path):
    (tmp_path / "empty.fa").write_text("")
    line = error("genomics", "train", "--class", f"a={tmp_path}/empty.fa", *class_flags(files), "-o", tmp_path / "run")
    assert "empty.fa" in line
    assert "empty" in line
    assert not (tmp_path / "run").exists()


def test_output_that_holds_another_run(error, files, run, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert "already holds a run" in error("genomics", "train", *class_flags(files), "-o", run, *FAST)
    other = ("--epochs", "9", *FAST[2:])
    line = error("genomics", "train", *class_flags(files), "-o", run, *other, "--resume")
    assert "setting epochs was 3 and is now 9" in line
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    (tmp_path / "thesis.tex").write_text("x")
    assert "holds other files" in error("genomics", "train", *class_flags(files), "-o", tmp_path, *FAST)


def test_foreign_model_folder(error, files, run, tmp_path):
    assert "no config.json" in error("genomics", "predict", tmp_path, files["with"])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "holds no polymamba model" in error("genomics", "predict", tmp_path, files["with"])
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    (damaged / "model.safetensors").write_bytes(b"x" * 1000)
    assert "not the weights of this model" in error(
        "genomics", "eval", damaged, *class_flags(files), "-o", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


def test_other_wrong_words(error, files, run, tmp_path, capsys):
    assert "in one of these ways" in error("genomics", "train", "-o", tmp_path / "run")
    assert "expected NAME=FASTA" in error("genomics", "train", "--class", "with.fa", "-o", tmp_path / "run")
    assert "no example 'human'" in error("genomics", "train", "--example", "human", "-o", tmp_path / "run")
    line = error("genomics", "eval", run, "--class", f"third={files['with']}", "-o", tmp_path / "e")
    assert "class third" in line
    assert main(["genomics", "fly"]) == 2
    assert main(["alchemy"]) == 2
    assert main(["genomics", "train", "--epochs", "many", "-o", "x"]) == 2
    assert main([]) == 2
    capsys.readouterr()


def test_no_partial_output(error, run, files, tmp_path):
    output = tmp_path / "p.tsv"
    output.write_text("precious")
    bad = write_fasta(tmp_path / "bad.fa", [("ok", "ACGT"), ("protein", "MKLV")])
    line = error("genomics", "predict", run, files["with"], bad, "-o", output)
    assert "protein" in line
    assert output.read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"p.tsv", "bad.fa"}
