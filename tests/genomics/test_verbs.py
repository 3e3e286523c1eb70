"""`polymamba genomics ...` as a user runs it: what the files that it writes hold. (Bad input: test_bad_input.py.)"""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from polymamba.cli import main
from polymamba.core import BackboneConfig, TrainConfig
from polymamba.core.hub import config_from_dict
from polymamba.genomics import Dividing, DNAClassifier, DNAClassifierConfig, Source, divide, read_source, tokenize
from polymamba.genomics.alphabet import decode
from polymamba.genomics.training import TrainDNA


def write_fasta(path: Path, records: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records))
    return path


def random_dna(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGT"), length))


def genomics(*words: object) -> None:
    """Run `polymamba genomics ...`, which must succeed."""
    assert main(["genomics", *map(str, words)]) == 0


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


def test_eval_equals_what_predict_and_the_labels_say(run, two_classes, tmp_path, capsys):
    assert main(["genomics", "eval", str(run), *two_classes, "-o", str(tmp_path / "out")]) == 0
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


def test_windows_grow_from_epoch_to_epoch(files):
    source = Source(classes=tuple(f"{name}={path}" for name, path in files.items()))
    data = divide(read_source(source), Dividing(), 0)
    settings = {"mask_rate": 0.0, "rc_augment": False, "label_smoothing": 0.0, "balance": "none"}
    config = TrainConfig(batch_size=50, max_tokens=100)
    task = TrainDNA(data, config, 0, first_window=6, steps_per_epoch=30, **settings)
    longest, n = task.lengths.max(), len(task.lengths)
    for epoch, wanted in enumerate((6, 12, 24, longest, longest)):
        plan = task.plan(epoch)
        times = np.bincount(np.concatenate(plan), minlength=n)
        assert times.sum() == 30 * max(1, 100 // wanted)
        assert times.max() - times.min() <= 1  # each once before any again
        whole = set()
        for description in plan:
            tokens, mask, _ = task.batch(description, epoch)
            assert mask.sum(1).tolist() == np.minimum(task.lengths[description], wanted).tolist()
            for i, row, real in zip(description, tokens.numpy(), mask.numpy(), strict=True):
                assert decode(row[real]) in decode(task.train.tokens[i])
                whole.add(decode(task.train.tokens[i]).find(decode(row[real])))
        assert (len(whole) > 5) == (wanted < longest)  # at places of its own


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


# Windows


LONG, SHORT = random_dna(np.random.default_rng(1), 100), random_dna(np.random.default_rng(2), 12)
WINDOWS = [  # of 30 bases every 13; the last one is moved back to end where the record does
    *[("long", start, start + 30) for start in (0, 13, 26, 39, 52, 65, 70)],
    ("short", 0, 12),
]


@pytest.fixture
def windowed(run, tmp_path):
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


def test_a_model_of_windows_predicts_windows(two_classes, fast, files, tmp_path):
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
def embedded(run, tmp_path):
    """Names, and what the model makes of each record alone, (n, D); and the file with the records."""
    rng = np.random.default_rng(3)
    records = [(f"r{i}", random_dna(rng, n)) for i, n in enumerate((40, 1, 97, 33, 33, 250))]
    model = DNAClassifier.from_pretrained(run)
    with torch.no_grad():
        alone = [model.embed(torch.from_numpy(tokenize(s).astype(np.int64))[None])[0].numpy() for _, s in records]
    return [name for name, _ in records], np.stack(alone), write_fasta(tmp_path / "records.fa", records)


@pytest.mark.parametrize("sizes", [[], ["--batch-size", 1], ["--batch-size", 2, "--max-tokens", 250]])
def test_embed_equals_each_record_alone(sizes, run, embedded, tmp_path):
    names, alone, fasta = embedded
    genomics("embed", run, fasta, "-o", tmp_path / "e.npy", *sizes)
    found = np.load(tmp_path / "e.npy", allow_pickle=False)
    assert found.dtype == np.float32
    assert found == pytest.approx(alone, abs=2e-5)
    assert read_tsv(tmp_path / "e.names.tsv") == [["id"], *([name] for name in names)]


def test_embed_windows(run, embedded, tmp_path):
    _, _, fasta = embedded
    genomics("embed", run, fasta, "-o", tmp_path / "e.npy", "--window", 40)
    rows = read_tsv(tmp_path / "e.names.tsv")
    assert rows[0] == ["id", "start", "end"]
    assert rows[1:5] == [["r0", "0", "40"], ["r1", "0", "1"], ["r2", "0", "40"], ["r2", "40", "80"]]
    assert len(np.load(tmp_path / "e.npy")) == len(rows) - 1


def test_embed_parquet(run, embedded, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    names, alone, fasta = embedded
    genomics("embed", run, fasta, "-o", tmp_path / "e.parquet")
    table = parquet.read_table(tmp_path / "e.parquet").to_pydict()
    assert table["id"] == names
    assert np.array(table["embedding"], np.float32) == pytest.approx(alone, abs=2e-5)


# Measuring


def predictions(folder: Path) -> tuple[list[str], np.ndarray]:
    """Decided labels, and the figures beside them, of a predictions.tsv."""
    rows = read_tsv(folder / "predictions.tsv")[1:]
    return [row[2] for row in rows], np.array([row[3:] for row in rows], float)


def test_eval_of_one_part(run, files, tmp_path):
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


def test_ensemble_is_the_mean(run, files, two_classes, fast, tmp_path):
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


def test_tuned_threshold_decides(run, files, two_classes, tmp_path):
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


def test_multilabel(fast, tmp_path):
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


def test_regression(fast, tmp_path, capsys):
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


# Rare classes, masked letters


def test_sampling_draws_each_class_equally(files, tmp_path, fast):
    few = write_fasta(tmp_path / "few.fa", [(f"f{i}", random_dna(np.random.default_rng(i), 30)) for i in range(13)])
    source = Source(classes=(f"many={files['with']}", f"few={few}"))
    data = divide(read_source(source), Dividing(), 0)
    settings = {"mask_rate": 0.0, "rc_augment": False, "label_smoothing": 0.0}
    task = TrainDNA(data, TrainConfig(batch_size=7), 0, balance="sampling", **settings)
    labels, n = task.train.labels, len(task.train.labels)
    for epoch in (0, 1):
        times = np.bincount(np.concatenate(task.plan(epoch)), minlength=n)
        assert times.sum() == n
        assert abs(times[labels == 0].sum() - times[labels == 1].sum()) <= 1
        assert times[labels == 0].max() == 1  # of the many a part
        assert times[labels == 1].max() - times[labels == 1].min() <= 1  # of the few all, again and again
    flags = ["--class", f"many={files['with']}", "--class", f"few={few}", "--balance", "sampling", "--epochs", 1]
    genomics("train", *flags, "-o", tmp_path / "run", *fast[2:])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_hard_mask_is_remembered(two_classes, fast, tmp_path):
    genomics("train", *two_classes, "-o", tmp_path / "run", *fast, "--epochs", 1, "--hard-mask")
    records = [("soft", "ACGTTGCAAC" + "acgttacgat" * 2), ("hard", "ACGTTGCAAC" + "N" * 20), ("none", "ACGTTGCAAC" * 3)]
    genomics("predict", tmp_path / "run", write_fasta(tmp_path / "a.fa", records), "-o", tmp_path / "p.tsv")
    soft, hard, none = (np.array(row[2:], float) for row in read_tsv(tmp_path / "p.tsv")[1:])
    assert soft == pytest.approx(hard, abs=2e-6)
    assert np.abs(soft - none).max() > 1e-4


# Dividing, looking


def test_splits_of_an_earlier_run(run, two_classes, fast, tmp_path, capsys):
    flags = ["--splits", run / "splits.tsv", "--seed", 7]
    genomics("train", *two_classes, "-o", tmp_path / "again", *fast, "--epochs", 1, *flags)
    assert (tmp_path / "again" / "splits.tsv").read_bytes() == (run / "splits.tsv").read_bytes()
    genomics("split", *two_classes, "-o", tmp_path / "split")  # by the seed of the run
    assert (tmp_path / "split" / "splits.tsv").read_bytes() == (run / "splits.tsv").read_bytes()
    genomics("split", *two_classes, "-o", tmp_path / "other", "--seed", 7)
    assert (tmp_path / "other" / "splits.tsv").read_bytes() != (run / "splits.tsv").read_bytes()


def parts_of(splits: Path, key) -> dict[str, set[str]]:
    """key(record name) -> the parts that its records are in."""
    parts: dict[str, set[str]] = {}
    for name, _, part, _ in read_tsv(splits)[1:]:
        parts.setdefault(key(name), set()).add(part)
    return parts


def test_split_by_chromosome(tmp_path):
    rng = np.random.default_rng(6)
    names = [f"chr{1 + i % 7}:{100 * i}-{100 * i + 40}" for i in range(70)]
    both = [write_fasta(tmp_path / f"{x}.fa", [(name, random_dna(rng, 40)) for name in names]) for x in "ab"]
    flags = ["--class", f"a={both[0]}", "--class", f"b={both[1]}", "--split-by", "chromosome"]
    genomics("split", *flags, "-o", tmp_path / "dealt")
    genomics(
        "split", *flags, "-o", tmp_path / "named", "--valid-chromosomes", "chr2", "--test-chromosomes", "chr4", "chr7"
    )
    dealt, named = (parts_of(tmp_path / x / "splits.tsv", lambda name: name.split(":")[0]) for x in ("dealt", "named"))
    assert set.union(*dealt.values()) == {"train", "valid", "test"}
    assert all(len(parts) == 1 for parts in dealt.values())
    assert named == {f"chr{i}": {{2: "valid", 4: "test", 7: "test"}.get(i, "train")} for i in range(1, 8)}


def test_split_by_cluster(tmp_path, capsys):
    """Families of sequences that differ in a few bases are never torn; record by record they are, and it is said."""
    rng = np.random.default_rng(7)

    def family(number: int) -> list[tuple[str, str]]:
        ancestor = random_dna(rng, 120)
        members = []
        for i in range(4):
            at = int(rng.integers(120))
            members.append((f"f{number}_{i}", ancestor[:at] + random_dna(rng, 1) + ancestor[at + 1 :]))
        return members

    flags = []
    for label in "ab":
        records = [record for number in range(25) for record in family(number)]
        flags += ["--class", f"{label}={write_fasta(tmp_path / f'{label}.fa', records)}"]
    torn = {}
    for how in ("record", "cluster"):
        genomics("split", *flags, "-o", tmp_path / how, "--split-by", how)
        rows = read_tsv(tmp_path / how / "splits.tsv")[1:]
        assert {part for _, _, part, _ in rows} == {"train", "valid", "test"}
        parts: dict[tuple[str, str], set[str]] = {}
        for name, label, part, _ in rows:
            parts.setdefault((label, name.split("_")[0]), set()).add(part)
        torn[how] = sum(len(found) > 1 for found in parts.values())
        assert json.loads((tmp_path / how / "leakage.json").read_text())
    assert torn["cluster"] == 0 < torn["record"]
    assert capsys.readouterr().out


def test_stats(files, two_classes, tmp_path, capsys):
    genomics("stats", *two_classes)
    tables = capsys.readouterr().out
    genomics("stats", *two_classes, "-o", tmp_path / "stats")
    assert capsys.readouterr().out == tables
    assert "without" in tables
    assert sorted(p.name for p in (tmp_path / "stats").iterdir()) == ["manifest.json", "stats.json", "stats.png"]
    assert "120" in (tmp_path / "stats" / "stats.json").read_text()
    manifest = json.loads((tmp_path / "stats" / "manifest.json").read_text())
    assert manifest["inputs_sha256"] == {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files.values()}
    assert (tmp_path / "stats" / "stats.png").read_bytes().startswith(b"\x89PNG")
