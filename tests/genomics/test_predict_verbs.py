"""`polymamba genomics predict` in windows, to a table, BED and bedGraph, and `embed`: against each sequence alone."""

import json

import numpy as np
import pytest
import torch

from polymamba.genomics import DNAClassifier, tokenize


def random_dna(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGT"), length))


# Windows


LONG, SHORT = random_dna(np.random.default_rng(1), 100), random_dna(np.random.default_rng(2), 12)
WINDOWS = [  # of 30 bases every 13; the last one is moved back to end where the record does
    *[("long", start, start + 30) for start in (0, 13, 26, 39, 52, 65, 70)],
    ("short", 0, 12),
]


@pytest.fixture
def windowed(run, tmp_path, genomics, read_tsv, write_fasta):
    """Predict LONG and SHORT in windows to a file of this name; returns its lines, and the windows' probabilities.

    The probabilities (n, 2) are those of a prediction that has each window as a record of its own.
    """
    whole = write_fasta(tmp_path / "whole.fa", [("long", LONG), ("short", SHORT)])
    pieces = [(str(i), {"long": LONG, "short": SHORT}[name][a:b]) for i, (name, a, b) in enumerate(WINDOWS)]
    genomics("predict", run, write_fasta(tmp_path / "pieces.fa", pieces), "-o", tmp_path / "pieces.tsv")
    expected = np.array([row[2:] for row in read_tsv(tmp_path / "pieces.tsv")[1:]], float)

    def predict(name: str) -> tuple[list[list[str]], np.ndarray]:
        genomics("predict", run, whole, "--window", 30, "--stride", 13, "-o", tmp_path / name)
        return read_tsv(tmp_path / name), expected

    return predict


def test_windows_as_a_table(windowed):
    rows, expected = windowed("p.tsv")
    assert rows[0] == ["id", "start", "end", "label", "with", "without"]
    assert [(name, int(a), int(b)) for name, a, b, *_ in rows[1:]] == WINDOWS
    assert np.array([row[4:] for row in rows[1:]], float) == pytest.approx(expected, abs=3e-6)
    assert [row[3] for row in rows[1:]] == [["with", "without"][k] for k in expected.argmax(1)]


def test_windows_as_bed(windowed):
    rows, expected = windowed("p.bed")
    assert [(name, int(a), int(b)) for name, a, b, *_ in rows] == WINDOWS
    for (*_, label, score, strand), probabilities in zip((row[:6] for row in rows), expected, strict=True):
        assert label == ["with", "without"][probabilities.argmax()]
        assert int(score) == pytest.approx(1000 * probabilities.max(), abs=0.51)
        assert strand == "."


def test_windows_as_bedgraph(windowed):
    """Base by base the mean of the windows that cover it."""
    rows, expected = windowed("p.bedGraph")
    values = {(k, name, i): [] for k in (0, 1) for name, n in (("long", 100), ("short", 12)) for i in range(n)}
    for (name, start, end), probabilities in zip(WINDOWS, expected, strict=True):
        for i in range(start, end):
            for k in (0, 1):
                values[k, name, i].append(probabilities[k])
    found, k = {}, -1
    for row in rows:
        if row[0].startswith("track"):
            k += 1
            assert row == [f'track type=bedGraph name="{["with", "without"][k]}"']
            continue
        name, start, end, value = row
        for i in range(int(start), int(end)):
            assert (k, name, i) not in found, "lines overlap"
            found[k, name, i] = float(value)
    assert found.keys() == values.keys()
    for key, covering in values.items():
        assert found[key] == pytest.approx(np.mean(covering), abs=5e-6), key


def test_a_model_of_windows_predicts_windows(two_classes, fast, files, tmp_path, genomics, read_tsv, write_fasta):
    genomics("train", *two_classes, "-o", tmp_path / "run", *fast, "--epochs", 1, "--window", 25, "--stride", 10)
    genomics("predict", tmp_path / "run", write_fasta(tmp_path / "a.fa", [("a", LONG)]), "-o", tmp_path / "p.tsv")
    assert [row[:3] for row in read_tsv(tmp_path / "p.tsv")[1:]] == [
        ["a", str(start), str(start + 25)] for start in (0, 25, 50, 75)
    ]
    # Test figures are of windows side by side, named after their records.
    lengths = {
        line[1:].split()[0]: len(sequence)
        for file in files.values()
        for line, sequence in zip(*[iter(file.read_text().splitlines())] * 2, strict=True)
    }
    tested = [row[0] for row in read_tsv(tmp_path / "run" / "splits.tsv")[1:] if row[2] == "test"]
    expected = [f"{name}:{a}-{b}" for name in tested for a, b in ((0, 25), (lengths[name] - 25, lengths[name]))]
    assert [row[0] for row in read_tsv(tmp_path / "run" / "predictions.tsv")[1:]] == expected
    # Their intervals are of the records.
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["n"], metrics["n_records"], metrics["block_length"]) == (2 * len(tested), len(tested), None)
    # `eval` may cut others.
    genomics("eval", tmp_path / "run", *two_classes, "--window", 20, "-o", tmp_path / "of-20")
    spans = [row[0].rsplit(":", 1)[1] for row in read_tsv(tmp_path / "of-20" / "predictions.tsv")[1:]]
    assert {int(end) - int(start) for start, end in (span.split("-") for span in spans)} == {20}


# Embeddings


@pytest.fixture
def embedded(run, tmp_path, write_fasta):
    """Names, and what the model makes of each record alone, (n, D); and the file with the records."""
    rng = np.random.default_rng(3)
    records = [(f"r{i}", random_dna(rng, n)) for i, n in enumerate((40, 1, 97, 33, 33, 250))]
    model = DNAClassifier.from_pretrained(run)
    with torch.no_grad():
        alone = [model.embed(torch.from_numpy(tokenize(s).astype(np.int64))[None])[0].numpy() for _, s in records]
    return [name for name, _ in records], np.stack(alone), write_fasta(tmp_path / "records.fa", records)


@pytest.mark.parametrize("sizes", [[], ["--batch-size", 1], ["--batch-size", 2, "--max-tokens", 250]])
def test_embed_equals_each_record_alone(sizes, run, embedded, tmp_path, genomics, read_tsv):
    names, alone, fasta = embedded
    genomics("embed", run, fasta, "-o", tmp_path / "e.npy", *sizes)
    found = np.load(tmp_path / "e.npy", allow_pickle=False)
    assert found.dtype == np.float32
    assert found == pytest.approx(alone, abs=2e-5)
    assert read_tsv(tmp_path / "e.names.tsv") == [["id"], *([name] for name in names)]


def test_embed_windows(run, embedded, tmp_path, genomics, read_tsv):
    _, _, fasta = embedded
    genomics("embed", run, fasta, "-o", tmp_path / "e.npy", "--window", 40)
    rows = read_tsv(tmp_path / "e.names.tsv")
    assert rows[0] == ["id", "start", "end"]
    assert rows[1:5] == [["r0", "0", "40"], ["r1", "0", "1"], ["r2", "0", "40"], ["r2", "40", "80"]]
    assert len(np.load(tmp_path / "e.npy")) == len(rows) - 1


def test_embed_parquet(run, embedded, tmp_path, genomics):
    parquet = pytest.importorskip("pyarrow.parquet")
    names, alone, fasta = embedded
    genomics("embed", run, fasta, "-o", tmp_path / "e.parquet")
    table = parquet.read_table(tmp_path / "e.parquet").to_pydict()
    assert table["id"] == names
    assert np.array(table["embedding"], np.float32) == pytest.approx(alone, abs=2e-5)
