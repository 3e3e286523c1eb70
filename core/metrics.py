"""How well a model did on labelled records: of one class each, of independent labels, or of a measured quantity.

n records or windows of records, K classes or labels. The results of all three kinds are JSON-safe and have one shape:
`n`, `n_records`, `block_length` (bootstrap.Resampling), `n_bootstrap`, `confidence`; each figure as {"value", "low",
"high"} with its percentile bootstrap interval; then what is known of each class. What is undefined is None. A class's
AUROC and AUPRC (average precision) set it against all others.

`records` (n,) are numbers that say which record each window is of; left out, each is a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import metrics as skm

from .bootstrap import Ranking, Regression, Resampling, confusion_figures, label_figures, mean_defined, with_intervals
from .files import save_tsv
from .thresholds import check_probabilities, decide, one_against_rest

NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "mcc": "MCC",
    "exact_match": "exact match",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "pearson": "Pearson r",
    "spearman": "Spearman rho",
    "r2": "R2",
    "rmse": "RMSE",
    "mae": "MAE",
}
_IN_UNITS = ("rmse", "mae")  # of the quantity's own size: printed with significant digits, the others with decimals


def classification_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    *,
    threshold: float | None = None,
    records: np.ndarray | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Measure predictions (n, K) against labels (n,), which are indices into the K `classes`.

    threshold    of two classes, the second is predicted at or above it; None: the most probable class is

    The result, beside what all kinds have:
    accuracy, balanced_accuracy, mcc, macro_f1, auroc, auprc
                 figures; the second and the last two are means over the classes that stand in the labels
    per_class    class -> support, precision, recall, f1, auroc, auprc
    support      class -> number of records
    confusion    (K, K) counts, true classes in rows, predicted ones in columns
    classes, threshold

    AUROC of a class with no record is None, and so are mcc, auroc and auprc if the labels hold one class only.
    Resamples in which a figure is undefined, because a rare class was not drawn, do not count for it.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    _check_names(classes)
    _check_labels(labels, probabilities, classes)
    k = len(classes)
    predicted = decide(probabilities, threshold)
    present = np.unique(labels)
    rankings = [Ranking(labels == c, probabilities[:, c]) for c in present]

    def figures(times: np.ndarray) -> dict[str, np.ndarray]:
        auroc, auprc = np.mean([ranking(times) for ranking in rankings], axis=0)
        return {**confusion_figures(labels, predicted, k, times), "auroc": auroc, "auprc": auprc}

    per_class = {
        name: _against_rest(labels == c, predicted == c, probabilities[:, c]) for c, name in enumerate(classes)
    }
    return {
        **_measured(figures, len(labels), records, n_bootstrap, seed, confidence),
        "classes": list(classes),
        "threshold": None if threshold is None else float(threshold),
        "support": {name: row["support"] for name, row in per_class.items()},
        "per_class": per_class,
        "confusion": skm.confusion_matrix(labels, predicted, labels=np.arange(k)).tolist(),
    }


def multilabel_metrics(
    truth: np.ndarray,
    probabilities: np.ndarray,
    labels: Sequence[str],
    *,
    thresholds: np.ndarray | None = None,
    records: np.ndarray | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Measure predictions of K independent labels against truth (n, K), bool or 0 and 1.

    probabilities   (n, K), from 0 to 1
    thresholds      (K,): a label is predicted at or above its own; None: 0.5 for all

    The result, beside what all kinds have:
    exact_match     share of the records in which every label is right (subset accuracy)
    micro_f1        F1 of all labels' decisions counted together
    macro_f1        mean F1 of the labels that are there or predicted
    auroc, auprc    means over the labels of which both values occur
    per_label       label -> support, precision, recall, f1, auroc, auprc, threshold
    support         label -> number of records that have it
    confusion       label -> counts tp, fp, fn, tn
    labels

    A mean over labels is, in each resample too, over those of which the figure is defined: with many rare labels hardly
    any resample has them all.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    _check_names(labels)
    truth, thresholds = _checked_flags(np.asarray(truth), probabilities, thresholds, len(labels))
    predicted = probabilities >= thresholds
    both = np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0))
    rankings = [Ranking(truth[:, k], probabilities[:, k]) for k in both]

    def figures(times: np.ndarray) -> dict[str, np.ndarray]:
        by_label = np.array([ranking(times) for ranking in rankings]).reshape(len(rankings), 2, len(times))
        auroc, auprc = mean_defined(by_label[:, 0].T), mean_defined(by_label[:, 1].T)
        return {**label_figures(truth, predicted, times), "auroc": auroc, "auprc": auprc}

    per_label = {
        name: {**_against_rest(truth[:, k], predicted[:, k], probabilities[:, k]), "threshold": float(thresholds[k])}
        for k, name in enumerate(labels)
    }
    return {
        **_measured(figures, len(truth), records, n_bootstrap, seed, confidence),
        "labels": list(labels),
        "support": {name: row["support"] for name, row in per_label.items()},
        "per_label": per_label,
        "confusion": {name: _cells(truth[:, k], predicted[:, k]) for k, name in enumerate(labels)},
    }


def regression_metrics(
    truth: np.ndarray,
    predictions: np.ndarray,
    *,
    records: np.ndarray | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Measure predictions (n,) of a quantity against truth (n,).

    The result, beside what all kinds have: pearson, spearman, r2, rmse, mae, the last two in the quantity's unit. r and
    rho are None where truth or predictions are constant, R2 where truth is.
    """
    truth, predictions = np.asarray(truth, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != predictions.shape:
        raise ValueError(f"truth {truth.shape} and predictions {predictions.shape} should both be (n,)")
    if len(truth) == 0:
        raise ValueError("no records to measure")
    for values, what in ((truth, "truth"), (predictions, "prediction")):
        if not np.isfinite(values).all():
            raise ValueError(f"the {what} of record {np.argmin(np.isfinite(values))} is not finite")
    return _measured(Regression(truth, predictions), len(truth), records, n_bootstrap, seed, confidence)


def format_table(metrics: dict[str, Any]) -> str:
    """The figures of any of the three kinds of metrics as lines for a terminal."""
    names = {key: name for key, name in NAMES.items() if key in metrics}
    width = max(map(len, names.values())) + 2
    lines = [f"{'':{width}}{'value':>7}   {100 * metrics['confidence']:g} % interval"]
    for key, name in names.items():
        digits = ".4g" if key in _IN_UNITS else ".4f"
        value, low, high = (metrics[key][part] for part in ("value", "low", "high"))
        line = f"{name:{width}}" + (f"{'-':>7}" if value is None else f"{value:7{digits}}")
        lines.append(line if low is None else f"{line}   {low:{digits}} to {high:{digits}}")
    support = ", ".join(f"{name} {count}" for name, count in metrics.get("support", {}).items())
    n, n_records, block_length = metrics["n"], metrics["n_records"], metrics["block_length"]
    what = f"{n} records" if n == n_records else f"{n} windows of {n_records} records"
    lines.append(what + (f": {support}" if support else ""))
    if block_length is not None:
        lines.append(
            f"the intervals are over blocks of up to {block_length} windows, for so few records cannot be drawn:"
        )
        lines.append("they say what other windows of the same records would give, and nothing of other records")
    elif n != n_records:
        lines.append("the intervals are over records, each with all its windows")
    return "\n".join(lines)


def write_confusion_tsv(path: str | Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Counts (K, K), one row a true class and one column a predicted class, both named."""
    rows = ([name, *row] for name, row in zip(classes, np.asarray(matrix).tolist(), strict=True))
    save_tsv(path, ["true\\predicted", *classes], rows)


def _measured(
    figures: Callable[[np.ndarray], dict[str, np.ndarray]],
    n: int,
    records: np.ndarray | None,
    n_bootstrap: int,
    seed: int,
    confidence: float,
) -> dict[str, Any]:
    """What the results of all kinds begin with; `figures` as for with_intervals."""
    records = np.arange(n) if records is None else np.asarray(records)
    if records.shape != (n,):
        raise ValueError(f"records {records.shape} should be ({n},): which record each of {n} windows is of")
    resampling = Resampling(records)
    return {
        "n": n,
        "n_records": resampling.n_records,
        "block_length": resampling.block_length,
        "n_bootstrap": n_bootstrap,
        "confidence": confidence,
        **with_intervals(figures, resampling, n_bootstrap, seed, confidence),
    }


def _check_names(names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not len(names):
        raise ValueError(f"{repeated[0]!r} is named twice" if repeated else "no classes to measure")


def _check_labels(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> None:
    n, k = len(labels), len(classes)
    if n == 0:
        raise ValueError("no records to measure")
    if labels.shape != (n,) or probabilities.shape != (n, k):
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} should be (n,) and (n, {k})")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= k:
        raise ValueError(f"labels must be integers from 0 to {k - 1}, indices into the classes")
    if not np.isfinite(probabilities).all():
        raise ValueError(f"the probabilities of record {np.argmin(np.isfinite(probabilities).all(1))} are not finite")


def _checked_flags(
    truth: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Truth (n, K) bool and thresholds (K,)."""
    if len(truth) == 0:
        raise ValueError("no records to measure")
    if truth.ndim != 2 or truth.shape != probabilities.shape or truth.shape[1] != k:
        raise ValueError(f"truth {truth.shape} and probabilities {probabilities.shape} should both be (n, {k})")
    check_probabilities(probabilities)
    thresholds = np.full(k, 0.5) if thresholds is None else np.asarray(thresholds, dtype=np.float64)
    if thresholds.shape != (k,) or not np.isfinite(thresholds).all():
        raise ValueError(f"thresholds {thresholds.tolist()} should be {k} finite numbers, one a label")
    return one_against_rest(truth, k), thresholds


def _against_rest(truth: np.ndarray, predicted: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """One class or label: who has it (n,), who is said to (n,), and with which score (n,)."""
    hits, support, n_predicted = int((truth & predicted).sum()), int(truth.sum()), int(predicted.sum())
    ranked = 0 < support < len(truth)
    return {
        "support": support,
        "precision": hits / n_predicted if n_predicted else None,
        "recall": hits / support if support else None,
        "f1": 2 * hits / (support + n_predicted) if support + n_predicted else None,
        "auroc": float(skm.roc_auc_score(truth, scores)) if ranked else None,
        "auprc": float(skm.average_precision_score(truth, scores)) if ranked else None,
    }


def _cells(truth: np.ndarray, predicted: np.ndarray) -> dict[str, int]:
    counts = {"tp": truth & predicted, "fp": ~truth & predicted, "fn": truth & ~predicted, "tn": ~truth & ~predicted}
    return {name: int(cell.sum()) for name, cell in counts.items()}
