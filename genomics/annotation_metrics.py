"""How well the bases of a genome are annotated, from sums: of millions of bases neither scores nor labels are kept.

The bases come in units, consecutive stretches of a contig; of each unit there is kept what adds up: the confusion
counts, how often each label has a score in each of BINS bins, moments. Figures of many units come from their sums, and
so do those of resamples, in which units are drawn (bootstrap.Resampling: of few contigs in blocks of neighbours). AUROC
and AUPRC take scores of one bin as equal. Where there come to be over MOST_UNITS, neighbours are joined two by two.

U units, R resamples, K classes or labels, n bases; the results have the shape of those of core/metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.bootstrap import Resampling, figures_of_confusion, figures_of_counts, mean_defined, with_intervals
from .config import Target

BINS = 1024  # of a score's logit, from -REACH to REACH
REACH = 16.0
MOST_UNITS = 1000


class BaseFigures:
    """Takes predictions and labels of units, one after another; `metrics` says what they come to."""

    def __init__(self, classes: Sequence[str], target: Target):
        self.classes, self.target = tuple(classes), target
        self.contigs: list[int] = []
        self.sums: list[np.ndarray] = []  # of each unit, float64 (what adds up,)
        self.n_bases = 0
        self.n_joined = 1  # units as they came that one of them is now
        self._pending: list[tuple[int, np.ndarray]] = []

    def add(self, contig: int, predictions: np.ndarray, labels: np.ndarray) -> None:
        """Of the bases that are asked: predictions float (n, K), labels (n,) or (n, K) as Annotation.of gives them."""
        if not len(labels):
            return
        self.n_bases += len(labels)
        of_target = {"multiclass": _of_classes, "multilabel": _of_labels, "regression": _of_values}
        self._pending.append((contig, of_target[self.target](predictions.astype(np.float64), labels)))
        if self._pending[0][0] != contig:
            self._put(self._pending[:-1])
            self._pending = self._pending[-1:]
        if len(self._pending) == self.n_joined:
            self._put(self._pending)
            self._pending = []

    def _put(self, units: list[tuple[int, np.ndarray]]) -> None:
        self.contigs.append(units[0][0])
        self.sums.append(np.sum([sums for _, sums in units], axis=0))
        if len(self.sums) > MOST_UNITS:
            contigs, sums, at = [], [], 0
            while at < len(self.sums):
                pair = 2 if self.contigs[at : at + 2] == [self.contigs[at]] * 2 else 1
                contigs.append(self.contigs[at])
                sums.append(np.sum(self.sums[at : at + pair], axis=0))
                at += pair
            self.contigs, self.sums, self.n_joined = contigs, sums, 2 * self.n_joined

    def metrics(self, seed: int, n_bootstrap: int = 1000, confidence: float = 0.95) -> dict[str, Any]:
        """Figures with intervals, JSON-safe; those of each class; `bases`. Raises ValueError if there was nothing."""
        if self._pending:
            self._put(self._pending)
            self._pending = []
        if not self.n_bases:
            raise ValueError("no bases to measure")
        sums, k = np.stack(self.sums), len(self.classes)
        resampling = Resampling(np.array(self.contigs))
        of_target = {"multiclass": _class_figures, "multilabel": _label_figures, "regression": _value_figures}
        figures = of_target[self.target]

        def of_resamples(times: np.ndarray) -> dict[str, np.ndarray]:
            return figures(times.astype(np.float64) @ sums, k)

        return {
            "n": resampling.n,
            "n_records": resampling.n_records,
            "block_length": resampling.block_length,
            "n_bootstrap": n_bootstrap,
            "confidence": confidence,
            **with_intervals(of_resamples, resampling, n_bootstrap, seed, confidence),
            **self._of_each(sums.sum(0)),
        }

    def _of_each(self, total: np.ndarray) -> dict[str, Any]:
        k = len(self.classes)
        if self.target == "regression":
            return {"bases": int(total[0])}
        if self.target == "multiclass":
            confusion, ranks = total[: k * k].reshape(k, k), total[k * k :].reshape(1, k, 2, BINS)
            hits, true, chosen = np.diagonal(confusion), confusion.sum(1), confusion.sum(0)
            more = {"bases": int(confusion.sum()), "confusion": confusion.astype(int).tolist()}
        else:
            cells, ranks = total[2 : 2 + 3 * k].reshape(3, k), total[2 + 3 * k :].reshape(1, k, 2, BINS)
            hits, true, chosen = cells
            more = {"bases": int(total[0])}
        auroc, auprc = (figure[0] for figure in _rankings(ranks))
        each = {
            name: {
                "support": int(true[c]),
                "precision": _share(hits[c], chosen[c]),
                "recall": _share(hits[c], true[c]),
                "f1": _share(2 * hits[c], true[c] + chosen[c]),
                "auroc": None if np.isnan(auroc[c]) else float(auroc[c]),
                "auprc": None if np.isnan(auprc[c]) else float(auprc[c]),
            }
            for c, name in enumerate(self.classes)
        }
        what = "per_class" if self.target == "multiclass" else "per_label"
        support = {name: row["support"] for name, row in each.items()}
        return {**more, "classes": list(self.classes), "support": support, what: each}


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


# What adds up: of the bases of a unit, (what adds up,)


def _of_classes(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Confusion counts (K, K), scores (K, 2, BINS)."""
    k = probabilities.shape[1]
    cells = np.bincount(labels * k + probabilities.argmax(1), minlength=k * k)
    return np.concatenate((cells, _binned(probabilities, labels[:, None] == np.arange(k)).ravel()))


def _of_labels(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """n, how many have all labels right, (hits, true, chosen) of each label, scores (K, 2, BINS)."""
    chosen = probabilities >= 0.5
    counts = [len(labels), (chosen == labels).all(1).sum()]
    by_label = [(chosen & labels).sum(0), labels.sum(0), chosen.sum(0)]
    return np.concatenate((counts, *by_label, _binned(probabilities, labels).ravel())).astype(np.float64)


def _of_values(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    x, y = labels, predictions[:, 0]
    return np.array([len(x), *(v.sum() for v in (x, y, x * x, y * y, x * y, np.abs(y - x)))])


def _binned(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How often each label's scores fall into each bin, without and with the label: (K, 2, BINS)."""
    p = probabilities.clip(1e-12, 1 - 1e-12)
    logits = np.log(p) - np.log1p(-p)
    bins = ((logits + REACH) * (BINS / (2 * REACH))).astype(np.int64).clip(0, BINS - 1)
    k = p.shape[1]
    cells = (np.arange(k) * 2 + truth) * BINS + bins
    return np.bincount(cells.ravel(), minlength=k * 2 * BINS).reshape(k, 2, BINS)


# Figures: sums (R, what adds up) -> name -> (R,)


def _class_figures(sums: np.ndarray, k: int) -> dict[str, np.ndarray]:
    auroc, auprc = _rankings(sums[:, k * k :].reshape(-1, k, 2, BINS))
    found = figures_of_confusion(sums[:, : k * k].reshape(-1, k, k))
    return {**found, "auroc": mean_defined(auroc), "auprc": mean_defined(auprc)}


def _label_figures(sums: np.ndarray, k: int) -> dict[str, np.ndarray]:
    hits, true, chosen = sums[:, 2 : 2 + 3 * k].reshape(-1, 3, k).transpose(1, 0, 2)
    auroc, auprc = _rankings(sums[:, 2 + 3 * k :].reshape(-1, k, 2, BINS))
    exact = sums[:, 1] / sums[:, 0]
    found = {"exact_match": exact, **figures_of_counts(hits, true + chosen)}
    return {**found, "auroc": mean_defined(auroc), "auprc": mean_defined(auprc)}


def _value_figures(sums: np.ndarray, k: int) -> dict[str, np.ndarray]:
    x, y, xx, yy, xy, absolute = (sums[:, 1:] / sums[:, :1]).T
    var_x, var_y = np.maximum(xx - x * x, 0), np.maximum(yy - y * y, 0)
    squared = np.maximum(xx - 2 * xy + yy, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = np.where((var_x > 0) & (var_y > 0), (xy - x * y) / np.sqrt(var_x * var_y), np.nan).clip(-1, 1)
        r2 = np.where(var_x > 0, 1 - squared / var_x, np.nan)
    return {"pearson": pearson, "r2": r2, "rmse": np.sqrt(squared), "mae": absolute}


def _rankings(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision, each (R, K), of counts (R, K, 2, BINS); nan for a label of no base, or of all."""
    others, members = counts[..., 0, :], counts[..., 1, :]
    n_others, n_members = others.sum(-1), members.sum(-1)
    others_below = np.cumsum(others, -1) - others
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (members * (others_below + others / 2)).sum(-1) / (n_others * n_members)
        hits = np.cumsum(members[..., ::-1], -1)  # of this score or above, from the highest
        found = hits + np.cumsum(others[..., ::-1], -1)
        precision = np.divide(hits, found, out=np.zeros(hits.shape), where=found > 0)
        average_precision = (members[..., ::-1] * precision).sum(-1) / n_members
    one_kind = (n_others == 0) | (n_members == 0)
    return np.where(one_kind, np.nan, auroc), np.where(one_kind, np.nan, average_precision)
