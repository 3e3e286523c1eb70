"""How well a classifier did on labelled records: five figures with bootstrap intervals, and the confusion matrix.

n records, K classes. A class's AUROC and AUPRC (average precision) set it against all others; the figures reported are
the means over the classes that stand in the labels.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import metrics as skm

from .files import written_whole

NAMES = {"accuracy": "accuracy", "mcc": "MCC", "macro_f1": "macro-F1", "auroc": "AUROC", "auprc": "AUPRC"}
_BATCH = 1_000_000  # records drawn at a time in the bootstrap: bounds its memory to some 100 MB


def classification_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Measure predictions (n, K) against labels (n,), which are indices into the K `classes`. JSON-safe.

    accuracy, mcc, macro_f1, auroc, auprc   {"value", "low", "high"}: with a percentile bootstrap interval over records
    per_class    class -> support, precision, recall, f1, auroc, auprc
    support      class -> number of records
    confusion    (K, K) counts, true classes in rows, predicted ones in columns
    n, classes, n_bootstrap, confidence

    What is undefined is None: AUROC of a class with no record, all but accuracy and macro-F1 if the labels hold one
    class only. Resamples in which a figure is undefined, because a rare class was not drawn, do not count for it.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    _check(labels, probabilities, classes)
    predicted = probabilities.argmax(axis=1)
    confusion = skm.confusion_matrix(labels, predicted, labels=np.arange(len(classes)))
    per_class = {name: _of_class(k, confusion, labels, probabilities) for k, name in enumerate(classes)}
    values = {
        "accuracy": float(skm.accuracy_score(labels, predicted)),
        "mcc": float(skm.matthews_corrcoef(labels, predicted)) if len(np.unique(labels)) > 1 else None,
        "macro_f1": float(skm.f1_score(labels, predicted, average="macro")),
        "auroc": _mean(row["auroc"] for row in per_class.values() if row["support"]),
        "auprc": _mean(row["auprc"] for row in per_class.values() if row["support"]),
    }
    resampled = _bootstrap(labels, predicted, probabilities, n_bootstrap, seed)
    return {
        "n": len(labels),
        "n_bootstrap": n_bootstrap,
        "confidence": confidence,
        **{name: _with_interval(value, resampled[name], confidence) for name, value in values.items()},
        "classes": list(classes),
        "support": {name: row["support"] for name, row in per_class.items()},
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def format_table(metrics: dict[str, Any]) -> str:
    """The five figures of `classification_metrics` as lines for a terminal."""
    lines = [f"{'':10}{'value':>7}   {100 * metrics['confidence']:g} % interval"]
    for key, name in NAMES.items():
        value, low, high = (metrics[key][part] for part in ("value", "low", "high"))
        line = f"{name:10}" + (f"{'-':>7}" if value is None else f"{value:7.4f}")
        lines.append(line if low is None else f"{line}   {low:.4f} to {high:.4f}")
    support = ", ".join(f"{name} {count}" for name, count in metrics["support"].items())
    return "\n".join([*lines, f"{metrics['n']} records: {support}"])


def write_confusion_tsv(path: str | Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Counts (K, K), one row a true class and one column a predicted class, both named."""
    with written_whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["true\\predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, np.asarray(matrix).tolist(), strict=True))


def _check(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> None:
    n, k = len(labels), len(classes)
    if n == 0:
        raise ValueError("no records to measure")
    if labels.shape != (n,) or probabilities.shape != (n, k):
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape} should be (n,) and (n, {k})")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= k:
        raise ValueError(f"labels must be integers from 0 to {k - 1}, indices into the classes")
    if not np.isfinite(probabilities).all():
        raise ValueError(f"the probabilities of record {np.argmin(np.isfinite(probabilities).all(1))} are not finite")


def _of_class(k: int, confusion: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    hits, support, n_predicted = int(confusion[k, k]), int(confusion[k].sum()), int(confusion[:, k].sum())
    truth, scores = labels == k, probabilities[:, k]
    ranked = 0 < support < len(labels)
    return {
        "support": support,
        "precision": hits / n_predicted if n_predicted else None,
        "recall": hits / support if support else None,
        "f1": 2 * hits / (support + n_predicted) if support + n_predicted else None,
        "auroc": float(skm.roc_auc_score(truth, scores)) if ranked else None,
        "auprc": float(skm.average_precision_score(truth, scores)) if ranked else None,
    }


# Bootstrap. scipy.stats.bootstrap over scikit-learn's functions takes over 10 ms a resample of 5,000 records, and its
# interval is undefined as soon as one resample is. So a resample is held as the number of times that each record was
# drawn, all figures come from those counts, many resamples at once, and the tests compare them with scikit-learn's.


def _bootstrap(
    labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, n_bootstrap: int, seed: int
) -> dict[str, np.ndarray]:
    """The five figures (n_bootstrap,) on resamples of the records; nan where undefined."""
    n = len(labels)
    rng = np.random.default_rng(seed)
    batches = []
    for start in range(0, n_bootstrap, size := max(1, _BATCH // n)):
        rows = min(size, n_bootstrap - start)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        batches.append(_weighted_metrics(labels, predicted, probabilities, times))
    return {name: np.concatenate([batch[name] for batch in batches]) if batches else np.empty(0) for name in NAMES}


def _weighted_metrics(
    labels: np.ndarray, predicted: np.ndarray, probabilities: np.ndarray, times: np.ndarray
) -> dict[str, np.ndarray]:
    """The five figures (R,) of R samples, in which record i stands times[r, i] times; nan where undefined."""
    k = probabilities.shape[1]
    cells = labels * k + predicted
    confusion = np.stack([np.bincount(cells, weights=row, minlength=k * k) for row in times]).reshape(-1, k, k)
    by_class = [_ranking_metrics(labels == c, probabilities[:, c], times) for c in np.unique(labels)]
    auroc, auprc = np.mean(by_class, axis=0)
    return {**_confusion_metrics(confusion), "auroc": auroc, "auprc": auprc}


def _confusion_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, MCC (Gorodkin 2004) and macro-F1, each (R,), of confusion matrices (R, K, K)."""
    hits = np.diagonal(confusion, axis1=1, axis2=2)  # (R, K)
    true, predicted = confusion.sum(2), confusion.sum(1)
    correct, n = hits.sum(1), true.sum(1)
    spread_true, spread_predicted = n**2 - (true**2).sum(1), n**2 - (predicted**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mcc = (correct * n - (true * predicted).sum(1)) / np.sqrt(spread_true * spread_predicted)
        f1 = 2 * hits / (true + predicted)  # nan for a class that is neither there nor predicted: left out of the mean
    mcc[spread_predicted == 0] = 0  # scikit-learn's convention: one class predicted throughout says nothing
    mcc[spread_true == 0] = np.nan
    return {"accuracy": correct / n, "mcc": mcc, "macro_f1": np.nanmean(f1, axis=1)}


def _ranking_metrics(truth: np.ndarray, scores: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision, each (R,), of one class; records of equal score form one step of the curves."""
    order = np.argsort(-scores, kind="stable")
    step_ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    weights = times[:, order]
    found = np.cumsum(weights, axis=1)[:, step_ends].astype(np.float64)  # records at or above each score
    hits = np.cumsum(weights * truth[order], axis=1)[:, step_ends].astype(np.float64)  # those of the class
    misses = found - hits
    new_hits, new_misses = np.diff(hits, axis=1, prepend=0), np.diff(misses, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (new_misses * (hits - new_hits / 2)).sum(1) / (hits[:, -1] * misses[:, -1])
        precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
        auprc = (new_hits * precision).sum(1) / hits[:, -1]
    auprc[misses[:, -1] == 0] = np.nan  # nothing to tell the class from
    return auroc, auprc


def _with_interval(value: float | None, resampled: np.ndarray, confidence: float) -> dict[str, float | None]:
    defined = resampled[~np.isnan(resampled)]
    if value is None or len(defined) == 0:
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def _mean(values: Iterable[float | None]) -> float | None:
    """None if any value is."""
    found = list(values)
    defined = [value for value in found if value is not None]
    return float(np.mean(defined)) if len(defined) == len(found) else None
