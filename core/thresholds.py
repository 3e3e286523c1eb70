"""From probabilities to decisions, and the thresholds that decide best. n records, K classes or labels."""

from __future__ import annotations

import numpy as np


def decide(probabilities: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """(n, K) -> the predicted class of each record, (n,).

    The most probable class, the first of equals; with a threshold, for which K must be 2, the second class where its
    probability is at or above the threshold.
    """
    if threshold is None:
        return probabilities.argmax(axis=1)
    if probabilities.shape[1] != 2:
        raise ValueError(f"a threshold decides between two classes; these are {probabilities.shape[1]}: give none")
    if not np.isfinite(threshold):
        raise ValueError(f"threshold {threshold} must be a finite number")
    return (probabilities[:, 1] >= threshold).astype(np.int64)


def one_against_rest(truth: np.ndarray, k: int) -> np.ndarray:
    """Class indices (n,) or label flags (n, K), 0 and 1 -> which record is of which class, (n, K) bool."""
    truth = np.asarray(truth)
    if truth.dtype != bool and not np.issubdtype(truth.dtype, np.integer):
        raise ValueError(f"truth is {truth.dtype}; it must be bool or integers")
    if truth.ndim == 1 and truth.dtype != bool:
        if truth.size and not 0 <= truth.min() <= truth.max() < k:
            raise ValueError(f"labels must be integers from 0 to {k - 1}, indices into the classes")
        return truth[:, None] == np.arange(k)
    if truth.ndim != 2 or truth.shape[1] != k:
        raise ValueError(f"truth {truth.shape} should be class indices (n,) or flags (n, {k})")
    if truth.size and not 0 <= truth.min() <= truth.max() <= 1:
        raise ValueError("flags must be 0 or 1: each label of a record is there or not")
    return truth.astype(bool)


def best_thresholds(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The threshold (K,) of each class or label, set against the rest, with the highest F1. Use validation records.

    truth          class indices (n,), or flags (n, K) for labels that are independent
    probabilities  (n, K), from 0 to 1; a record is decided to be of the class at or above the threshold

    F1 is the same all along the interval between two neighbouring probabilities. Of the intervals where it is highest,
    neighbouring ones joined, the widest is taken (of equally wide ones the highest), and of it the middle. A class that
    all or none of the records belong to gets 0.5.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities {probabilities.shape} should be (n, K)")
    truth = one_against_rest(truth, probabilities.shape[1])
    if len(truth) != len(probabilities):
        raise ValueError(f"truth has {len(truth)} records, probabilities have {len(probabilities)}")
    check_probabilities(probabilities)
    return np.array([_best_threshold(*columns) for columns in zip(truth.T, probabilities.T, strict=True)])


def _best_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    if truth.all() or not truth.any():
        return 0.5
    order = np.argsort(-scores)
    step_ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last record of each score
    hits = np.cumsum(truth[order])[step_ends]
    f1 = 2 * hits / (truth.sum() + step_ends + 1)  # equal ratios of integers are equal floats
    change = np.diff((f1 == f1.max()).astype(int), prepend=0, append=0)
    bounds = np.append(scores[order][step_ends], 0.0)  # from one bound down to, without it, the next F1 is the same
    high, low = bounds[change == 1], bounds[change == -1]
    widest = np.argmax(high - low)
    middle = (high[widest] + low[widest]) / 2
    return float(middle if middle > low[widest] else high[widest])  # neighbouring floats have nothing between them


def check_probabilities(probabilities: np.ndarray) -> None:
    """Raises ValueError unless all are from 0 to 1."""
    within = (probabilities >= 0) & (probabilities <= 1)
    if not within.all():
        record = np.argmin(within.all(axis=1))
        raise ValueError(f"record {record} has a probability outside 0 to 1: {probabilities[record].tolist()}")
