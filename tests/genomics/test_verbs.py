"""`polymamba genomics train`, `predict` and `eval` as a user runs them: what the files that they write hold.

Windows and embeddings: test_predict_verbs.py; `split` and `stats`: test_dividing_verbs.py; bad input: test_bad_*.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from polymamba.cli import main


def random_dna(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGT"), length))


def test_train_leaves_a_run_that_explains_itself(run, read_tsv):
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


def test_predict_keeps_the_order_of_the_input(run, files, tmp_path, capsys, read_tsv, write_fasta):
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


def test_a_prediction_depends_on_its_sequence_alone(run, tmp_path, read_tsv, write_fasta):
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


def test_eval_equals_what_predict_and_the_labels_say(run, two_classes, tmp_path, capsys, read_tsv):
    assert main(["genomics", "eval", str(run), *two_classes, "-o", str(tmp_path / "out")]) == 0
    assert "accuracy" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = read_tsv(tmp_path / "out" / "predictions.tsv")[1:]
    assert len(rows) == 120
    assert metrics["accuracy"]["value"] == pytest.approx(np.mean([r[1] == r[2] for r in rows]))
    matrix = np.array([row[1:] for row in read_tsv(tmp_path / "out" / "confusion.tsv")[1:]], int)
    assert matrix.sum() == 120
    assert matrix.trace() == sum(r[1] == r[2] for r in rows)


# Measuring


@pytest.fixture
def predictions(read_tsv):
    """Of a folder: decided labels, and the figures beside them, of its predictions.tsv."""

    def of(folder: Path) -> tuple[list[str], np.ndarray]:
        rows = read_tsv(folder / "predictions.tsv")[1:]
        return [row[2] for row in rows], np.array([row[3:] for row in rows], float)

    return of


def test_eval_of_one_part(run, files, tmp_path, genomics, read_tsv, write_fasta):
    for part, first in (("train", 0), ("valid", 40), ("test", 50)):
        for name, file in files.items():
            records = list(zip(*[iter(file.read_text().splitlines())] * 2, strict=True))[first : first + 10]
            path = tmp_path / "data" / part / f"{name}.fa"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_fasta(path, [(header[1:], sequence) for header, sequence in records])
    genomics("eval", run, "--data", tmp_path / "data", "--split", "test", "-o", tmp_path / "part")
    genomics("eval", run, "--data", tmp_path / "data" / "test", "-o", tmp_path / "alone")
    for name in ("metrics.json", "predictions.tsv", "confusion.tsv"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    assert len(read_tsv(tmp_path / "part" / "predictions.tsv")) == 21


def test_ensemble_is_the_mean(run, files, two_classes, fast, tmp_path, genomics, read_tsv, predictions):
    genomics("train", *two_classes, "-o", tmp_path / "other", *fast, "--epochs", 1, "--seed", 1)
    for name, words in (("a", [run]), ("b", [tmp_path / "other"]), ("ab", [run, "--ensemble", tmp_path / "other"])):
        genomics("eval", *words, *two_classes, "-o", tmp_path / name)
    (_, a), (_, b), (labels, both) = (predictions(tmp_path / name) for name in ("a", "b", "ab"))
    assert np.abs(a - b).max() > 0.1
    assert both == pytest.approx((a + b) / 2, abs=2e-6)
    assert labels == [["with", "without"][k] for k in both.argmax(1)]
    genomics("predict", run, *files.values(), "--ensemble", tmp_path / "other", "-o", tmp_path / "p.tsv")
    assert [row[1:] for row in read_tsv(tmp_path / "p.tsv")[1:]] == [
        row[2:] for row in read_tsv(tmp_path / "ab" / "predictions.tsv")[1:]
    ]


def test_tuned_threshold_decides(run, files, two_classes, tmp_path, genomics, read_tsv, predictions):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((run / name).read_bytes())
    genomics("eval", copy, *two_classes, "-o", tmp_path / "plain")
    _, probabilities = predictions(tmp_path / "plain")
    threshold = float(np.quantile(probabilities[:, 1], 0.3)) + 1e-7  # decides otherwise than 0.5 does
    (copy / "thresholds.json").write_text(json.dumps({"with": 1 - threshold, "without": threshold}))
    expected = [["with", "without"][int(p >= threshold)] for p in probabilities[:, 1]]
    genomics("eval", copy, *two_classes, "-o", tmp_path / "tuned", "--tuned-threshold")
    assert predictions(tmp_path / "tuned")[0] == expected != predictions(tmp_path / "plain")[0]
    genomics("predict", copy, *files.values(), "-o", tmp_path / "p.tsv", "--tuned-threshold")
    assert [row[1] for row in read_tsv(tmp_path / "p.tsv")[1:]] == expected


# Labels and values


def write_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("id\tsequence\tlabel\n" + "".join(f"t{i}\t{s}\t{label}\n" for i, (s, label) in enumerate(rows)))
    return path


def test_multilabel(fast, tmp_path, genomics, read_tsv):
    rng = np.random.default_rng(4)
    rows = []
    for i in range(160):
        has = {"box": i % 2 == 0, "tail": i % 4 < 2}
        sequence = (
            random_dna(rng, 12)
            + ("GGGTACCCGG" if has["box"] else random_dna(rng, 10))
            + random_dna(rng, 10)
            + ("AAAAAAAAAAAA" if has["tail"] else random_dna(rng, 12))
        )
        rows.append((sequence, ";".join([name for name, there in has.items() if there]) or "."))
    table = write_table(tmp_path / "table.tsv", rows)
    run = tmp_path / "run"
    flags = ["--epochs", 10, "--batch-size", 32, "--lr", 1e-2, "--target", "multilabel", "--balance", "loss"]
    genomics("train", "--table", table, "-o", run, *fast, *flags, "--mask-rate", 0)
    tested = read_tsv(run / "predictions.tsv")
    assert tested[0] == ["id", "true", "label", "box", "tail"]
    truth = {f"t{i}": label for i, (_, label) in enumerate(rows)}
    for name, true, decided, *probabilities in tested[1:]:
        assert true == truth[name]
        above = [label for label, p in zip(("box", "tail"), probabilities, strict=True) if float(p) >= 0.5]
        assert decided == (";".join(above) or ".")
    assert {name for name, *_ in tested[1:]} == {r[0] for r in read_tsv(run / "splits.tsv")[1:] if r[2] == "test"}
    assert np.mean([row[1] == row[2] for row in tested[1:]]) > 0.6  # of four combinations
    assert set(json.loads((run / "thresholds.json").read_text())) == {"box", "tail"}
    assert json.loads((run / "metrics.json").read_text())
    for picture in ("roc.png", "precision_recall.png", "curves.png"):
        assert (run / picture).stat().st_size > 1000
    genomics("eval", run, "--table", table, "-o", tmp_path / "eval", "--tuned-threshold")
    assert len(read_tsv(tmp_path / "eval" / "predictions.tsv")) == 161


def test_regression(fast, tmp_path, capsys, genomics, read_tsv, write_fasta):
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(160):
        share = rng.random()
        sequence = "".join(rng.choice(list("GC" if rng.random() < share else "AT")) for _ in range(40))
        rows.append((sequence, f"{100 * (sequence.count('G') + sequence.count('C')) / 40:g}"))
    table, run = write_table(tmp_path / "table.tsv", rows), tmp_path / "run"
    flags = ["--target", "regression", "--heads", 0, "--epochs", 10, "--batch-size", 32, "--lr", 1e-2]
    genomics("train", "--table", table, "-o", run, *fast, *flags)
    tested = read_tsv(run / "predictions.tsv")
    assert tested[0] == ["id", "true", "value"]
    true, value = np.array([row[1:] for row in tested[1:]], float).T
    assert np.corrcoef(true, value)[0, 1] > 0.9
    assert json.loads((run / "metrics.json").read_text())
    assert (run / "regression.png").stat().st_size > 1000
    assert not (run / "thresholds.json").exists()
    capsys.readouterr()
    genomics("predict", run, write_fasta(tmp_path / "a.fa", [("at", "AT" * 20), ("gc", "GC" * 20)]))
    header, low, high = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == ["id", "value"]
    assert float(low[1]) + 30 < float(high[1])


# Masked letters


def test_hard_mask_is_remembered(two_classes, fast, tmp_path, genomics, read_tsv, write_fasta):
    genomics("train", *two_classes, "-o", tmp_path / "run", *fast, "--epochs", 1, "--hard-mask")
    records = [("soft", "ACGTTGCAAC" + "acgttacgat" * 2), ("hard", "ACGTTGCAAC" + "N" * 20), ("none", "ACGTTGCAAC" * 3)]
    genomics("predict", tmp_path / "run", write_fasta(tmp_path / "a.fa", records), "-o", tmp_path / "p.tsv")
    soft, hard, none = (np.array(row[2:], float) for row in read_tsv(tmp_path / "p.tsv")[1:])
    assert soft == pytest.approx(hard, abs=2e-6)
    assert np.abs(soft - none).max() > 1e-4
