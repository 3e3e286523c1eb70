"""What `polymamba genomics train, eval, predict` do: from flags to files."""

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from rich.console import Console

from ..core.config import ComputeConfig
from ..core.errors import InputError
from ..core.files import require_new_folder, write_json, written_whole
from ..core.metrics import classification_metrics, format_table, write_confusion_tsv
from ..core.plots import plot_confusion
from ..core.run_folder import RunFolder
from ..core.train import pick_device, train_model, uses_bf16
from .commands import Eval, Predict, Train
from .config import PRESETS, DNAClassifierConfig
from .dataset import LabelledSequences, example, from_class_files, from_folder
from .inference import predict_probabilities
from .model import DNAClassifier
from .reading.fasta import read_fasta
from .training import ClassifyDNA


def train(args: Train) -> None:
    """Train, then test on the test part with the best epoch's model."""
    torch.manual_seed(args.compute.seed)
    _require_one(example=args.example, data=args.data, **{"class": args.classes})
    split = {"valid_fraction": args.valid_fraction, "test_fraction": args.test_fraction, "seed": args.compute.seed}
    data = example(args.example, **split) if args.example else _labelled(args.data, args.classes, **split)
    settings = {
        **{
            k: v
            for k, v in asdict(args).items()
            if k not in ("output", "resume", "train", "compute", "data", "classes")
        },
        **asdict(args.train),
        "seed": args.compute.seed,
        "device": pick_device(args.compute).type,
        "bf16": uses_bf16(args.compute, pick_device(args.compute)),
        "classes": list(data.classes),
    }
    run = RunFolder(args.output, settings, sorted({Path(s) for s in data.sources}), resume=args.resume)
    _say(data.describe())
    data.write_splits_tsv(run / "splits.tsv")
    write_json(run / "labels.json", dict(enumerate(data.classes)))

    model = DNAClassifier(DNAClassifierConfig(backbone=PRESETS[args.preset], classes=data.classes))
    n_parameters = sum(p.numel() for p in model.parameters())
    _say(f"model {args.preset}: {n_parameters:,} parameters; training on {pick_device(args.compute)}")
    task = ClassifyDNA(
        data,
        args.train,
        args.compute.seed,
        mask_rate=args.mask_rate,
        rc_augment=args.rc_augment,
        balance=args.balance,
        label_smoothing=args.label_smoothing,
    )
    train_model(model, task, args.train, args.compute, run, resume=args.resume)

    model = DNAClassifier.from_pretrained(run.path).to(pick_device(args.compute))
    test = data.subset("test")
    if not len(test.labels):
        _say("no test part: nothing is held out to measure the model on")
        return
    options = {"batch_size": args.train.batch_size, "max_tokens": args.train.max_tokens, "rc_average": args.rc_average}
    with _autocast(args.compute):
        probabilities = predict_probabilities(model, test.tokens, **options, progress="test")
    _report(run.path, test, probabilities, args.compute.seed)


def evaluate(args: Eval) -> None:
    """Measure the model of a run folder on labelled files."""
    _require_one(data=args.data, **{"class": args.classes})
    models = _models(args)
    data = _labelled(args.data, args.classes, split=False).with_classes(models[0].config.classes)
    if args.split is not None:
        data = data.subset(args.split)
        if not len(data.labels):
            raise InputError(f"--split {args.split}: no record is of this part")
    require_new_folder(args.output)
    probabilities = _predict(models, data.tokens, args, progress="eval")
    args.output.mkdir(parents=True, exist_ok=True)
    _report(args.output, data, probabilities, args.compute.seed)


def predict(args: Predict) -> None:
    """Classify FASTA files with the model of a run folder."""
    models = _models(args)
    records = [record for path in args.fasta for record in read_fasta(path)]
    probabilities = _predict(models, [record.tokens for record in records], args, progress="predict")
    rows = _prediction_rows([r.name for r in records], probabilities, models[0].config.classes)
    if args.output is None:
        _write_tsv(sys.stdout, rows)
    else:
        _save_tsv(args.output, rows)


def _models(args: Eval | Predict) -> list[DNAClassifier]:
    """The run's model and those of --ensemble, which must know the same classes."""
    models = [DNAClassifier.from_pretrained(run) for run in (args.run, *args.ensemble)]
    known = models[0].config.classes
    for run, model in zip(args.ensemble, models[1:], strict=True):
        if model.config.classes != known:
            theirs = ", ".join(model.config.classes)
            raise InputError(f"--ensemble {run}: knows the classes {theirs}; {args.run} knows {', '.join(known)}")
    return [model.to(pick_device(args.compute)) for model in models]


def _predict(
    models: Sequence[DNAClassifier], tokens: list[np.ndarray], args: Eval | Predict, progress: str
) -> np.ndarray:
    """The mean of the models' class probabilities, (n, K)."""
    options: dict[str, Any] = {"rc_average": args.rc_average, "progress": progress}
    with _autocast(args.compute):
        each = [predict_probabilities(m, tokens, args.batch_size, args.max_tokens, **options) for m in models]
    return np.mean(each, axis=0)


def _labelled(folder: Path | None, classes: Sequence[str], **split: Any) -> LabelledSequences:
    """The sequences of --data or of the --class flags; `split` goes to the readers of dataset.py."""
    if folder is not None:
        return from_folder(folder, **split)
    files: dict[str, list[Path]] = {}
    for word in classes:
        label, separator, path = word.partition("=")
        if not (label and separator and path):
            raise InputError(f"--class {word}: expected NAME=FASTA, as in --class donor=donors.fa.gz")
        files.setdefault(label, []).append(Path(path))
    return from_class_files(files, **split)


def _require_one(**ways: Any) -> None:
    if sum(bool(way) for way in ways.values()) != 1:
        raise InputError(f"say where the sequences are in one of these ways: {', '.join(f'--{way}' for way in ways)}")


def _autocast(compute: ComputeConfig) -> torch.autocast:
    device = pick_device(compute)
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(compute, device))


def _report(folder: Path, data: LabelledSequences, probabilities: np.ndarray, seed: int) -> None:
    """Metrics on stdout and in the folder, confusion matrix as TSV and picture, predictions with the true labels."""
    metrics = classification_metrics(data.labels, probabilities, data.classes, seed=seed)
    matrix = np.array(metrics["confusion"])
    write_confusion_tsv(folder / "confusion.tsv", matrix, data.classes)
    plot_confusion(folder / "confusion.png", matrix, data.classes)
    rows = _prediction_rows(data.names, probabilities, data.classes, [data.classes[i] for i in data.labels])
    _save_tsv(folder / "predictions.tsv", rows)
    write_json(folder / "metrics.json", metrics)
    print(format_table(metrics))


def _prediction_rows(
    names: Sequence[str], probabilities: np.ndarray, classes: Sequence[str], truth: Sequence[str] | None = None
) -> Iterable[list[str]]:
    yield ["id", *(["true"] if truth else []), "label", *classes]
    for i, (name, row) in enumerate(zip(names, probabilities, strict=True)):
        yield [name, *([truth[i]] if truth else []), classes[int(row.argmax())], *(f"{p:.6f}" for p in row)]


def _write_tsv(file: TextIO, rows: Iterable[list[Any]]) -> None:
    csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


def _save_tsv(path: Path, rows: Iterable[list[Any]]) -> None:
    with written_whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        _write_tsv(file, rows)


def _say(message: str) -> None:
    Console(stderr=True, highlight=False).print(message, markup=False)
