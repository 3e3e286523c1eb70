"""What the verbs share: models from run folders, tables, and the report on labelled sequences."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...core.config import ComputeConfig
from ...core.device import autocast, pick_device
from ...core.errors import InputError
from ...core.files import save_tsv, write_json
from ...core.hub import model_name
from ...core.metrics import (
    classification_metrics,
    format_table,
    multilabel_metrics,
    regression_metrics,
    write_confusion_tsv,
)
from ...core.plots import plot_confusion, plot_precision_recall, plot_regression, plot_roc
from ...core.run_folder import checksums_of, write_manifest
from ...core.thresholds import decide
from ..commands import Eval, Predict, Source, Split, Stats
from ..config import DNAClassifierConfig, Target
from ..dataset import NO_LABEL, LabelledSequences
from ..inference import predict
from ..model import DNAClassifier
from ..reading.files import find_files
from ..stored import embedding_model, require_run_folder

THRESHOLDS = "thresholds.json"


def load_models(runs: Sequence[Path], compute: ComputeConfig) -> list[DNAClassifier]:
    """The models of run folders, on the device. Raises InputError if they do not predict the same thing."""
    for run in runs:
        require_run_folder(run)
    models = [DNAClassifier.from_pretrained(run) for run in runs]
    first = models[0].config
    for run, model in zip(runs[1:], models[1:], strict=True):
        for field in ("target", "classes", "window", "hard_mask"):
            ours, theirs = getattr(first, field), getattr(model.config, field)
            if ours != theirs:
                unlike = f"{field} {theirs}, but {runs[0]} has {ours}"
                raise InputError(f"--ensemble {run}: {unlike}; only models of one kind can be averaged")
    return [model.to(pick_device(compute)) for model in models]


def load_embedder(run: Path, compute: ComputeConfig) -> DNAClassifier:
    """The classifier of a run folder, or a language model as one, on the device."""
    if model_name(run) in ("DNALanguageModel", "Caduceus"):
        return embedding_model(run).to(pick_device(compute))
    return load_models([run], compute)[0]


def mean_predictions(
    models: Sequence[DNAClassifier],
    tokens: Sequence[np.ndarray],
    args: Eval | Predict,
    advance: Callable[[int], object],
) -> np.ndarray:
    """The mean of the models' predictions, (n, K); `advance` as for predict, of each model."""
    options: Any = {"rc_average": args.rc_average, "advance": advance}
    with autocast(args.compute):
        each = [predict(model, tokens, args.batch_size, args.max_tokens, **options) for model in models]
    return np.mean(each, axis=0)


def passes(args: Eval | Predict) -> int:
    """How often mean_predictions goes over each base."""
    return (1 + len(args.ensemble)) * (1 + args.rc_average)


def tuned_thresholds(args: Eval | Predict, config: DNAClassifierConfig) -> np.ndarray:
    """The thresholds (K,) that training left in the run folder, of two classes or of several labels."""
    path = args.run / THRESHOLDS
    if args.ensemble:
        raise InputError("--tuned-threshold: the thresholds are one model's, not those of an --ensemble; leave one out")
    if config.target == "regression" or (config.target == "multiclass" and len(config.classes) != 2):
        raise InputError("--tuned-threshold decides between two classes or for each of several labels; leave it out")
    if not path.is_file():
        raise InputError(f"{path}: no such file; --tuned-threshold needs a run folder of `train`")
    try:
        thresholds = json.loads(path.read_text(encoding="utf-8"))
        return np.array([float(thresholds[name]) for name in config.classes])
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{path}: damaged, or of another model; expected a number for each class") from None


def input_files(source: Source, data: LabelledSequences, *others: Path | None) -> list[Path]:
    """The files that labelled sequences came from, and `others` that are given."""
    named = [Path(s) for s in data.sources] + [p for p in (source.labels, *others) if p is not None]
    genome = [path for word in source.genome for path in find_files(word)]
    return sorted({path for path in (*named, *genome) if path.is_file()})


def write_inputs(folder: Path, args: Eval | Split | Stats, data: LabelledSequences, *others: Path | None) -> None:
    """The manifest of a folder that is made once: flags, versions, checksums of the input files."""
    settings = json.loads(json.dumps(asdict(args), default=str))
    write_manifest(folder, settings, checksums_of(input_files(args.source, data, *others)))


def report(
    folder: Path,
    data: LabelledSequences,
    predictions: np.ndarray,
    seed: int,
    thresholds: np.ndarray | None = None,
) -> None:
    """Metrics on stdout and in the folder, pictures, and the predictions beside the truth. predictions (n, K)."""
    drawing: Any = {"records": data.records, "seed": seed}
    if data.target == "regression":
        metrics = regression_metrics(data.labels, predictions[:, 0], **drawing)
        plot_regression(folder / "regression.png", data.labels, predictions[:, 0], data.classes[0])
    else:
        if data.target == "multiclass":
            threshold = None if thresholds is None else float(thresholds[1])
            metrics = classification_metrics(data.labels, predictions, data.classes, threshold=threshold, **drawing)
            matrix = np.array(metrics["confusion"])
            write_confusion_tsv(folder / "confusion.tsv", matrix, data.classes)
            plot_confusion(folder / "confusion.png", matrix, data.classes)
        else:
            metrics = multilabel_metrics(data.labels, predictions, data.classes, thresholds=thresholds, **drawing)
        plot_roc(folder / "roc.png", data.labels, predictions, data.classes)
        plot_precision_recall(folder / "precision_recall.png", data.labels, predictions, data.classes)
    decided = decisions(predictions, data.classes, data.target, thresholds)
    rows = zip(data.names, data.label_texts(), decided, predictions, strict=True)
    header = ["id", "true", "label", *data.classes] if data.target != "regression" else ["id", "true", "value"]
    save_tsv(folder / "predictions.tsv", header, table_rows(rows, data.target))
    write_json(folder / "metrics.json", metrics)
    print(format_table(metrics))


def decisions(
    predictions: np.ndarray, classes: Sequence[str], target: Target, thresholds: np.ndarray | None
) -> list[str]:
    """The label of each row of predictions (n, K) as text: the likeliest class, or all labels at their thresholds.

    thresholds (K,) of labels, or of two classes, of which the second one's decides.
    """
    if target == "multiclass":
        return [classes[int(k)] for k in decide(predictions, None if thresholds is None else float(thresholds[1]))]
    if target == "multilabel":
        limits = np.full(len(classes), 0.5) if thresholds is None else thresholds
        return [";".join([classes[int(k)] for k in np.flatnonzero(row >= limits)]) or NO_LABEL for row in predictions]
    return [f"{row[0]:.6g}" for row in predictions]


def table_rows(rows: Iterable[Sequence[Any]], target: str) -> Iterable[list[Any]]:
    """Rows of (texts ..., decision, predictions): the probabilities written out, of a regression only the decision."""
    for *texts, row in rows:
        yield [*texts, *([f"{p:.6f}" for p in row] if target != "regression" else [])]
