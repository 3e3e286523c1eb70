"""Bootstrap intervals over records, for figures that take seconds and not hours to resample.

scipy.stats.bootstrap over scikit-learn's functions takes over 10 ms a resample of 5,000 records, and its interval is
undefined as soon as one resample is. So a resample is held as the number of times that each record was drawn, figures
come from those counts, many resamples at once, and the tests compare them with scikit-learn's and scipy's.

n records or windows of records, K classes or labels, R resamples; `times` (R, n) are the counts, whose rows may differ
in their sum. A figure (R,) is nan where it is undefined.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Interval = dict[str, float | None]  # "value", "low", "high"
_BATCH = 400_000  # records drawn at a time: bounds the memory to some 50 MB


class Resampling:
    """What is drawn anew: records, each with all its windows, for these are alike; blocks of windows of few records.

    n_records      how many records there are
    block_length   None, or how many consecutive windows are drawn together, at most, where the records are too few

    Records are drawn as wholes (the cluster bootstrap; Davison and Hinkley 1997, section 3.8), so that an interval says
    what other records would give; where each is one window, this is the ordinary bootstrap. Resamples of fewer than
    ENOUGH records say little. Then each record's m windows, a circle, are drawn anew in blocks of m^(1/3) (the circular
    block bootstrap, Politis and Romano 1992; the rate is that of Hall, Horowitz and Jing 1995), records of fewer than
    ENOUGH windows joined to one circle: an interval says what other windows of the same records would give, as far as
    windows are alike only near each other.
    """

    ENOUGH = 10

    def __init__(self, records: np.ndarray):
        """records (n,): which record each window is of, any numbers; a record's windows stand in order."""
        self.n = len(records)
        _, self._record, n_windows = np.unique(records, return_inverse=True, return_counts=True)
        self.n_records = len(n_windows)
        self.block_length = None
        if self.n_records < min(self.ENOUGH, self.n):
            circle = np.where(n_windows < self.ENOUGH, -1, np.arange(self.n_records))[self._record]
            self._circles = [np.flatnonzero(circle == c) for c in np.unique(circle)]
            self.block_length = max(_block_length(len(windows)) for windows in self._circles)

    def times(self, rng: np.random.Generator, n_resamples: int) -> np.ndarray:
        """How many times each window is drawn, (n_resamples, n)."""
        if self.block_length is None:
            return _counts(rng.integers(self.n_records, size=(n_resamples, self.n_records)))[:, self._record]
        times = np.empty((n_resamples, self.n), dtype=np.int64)
        for windows in self._circles:
            m, length = len(windows), _block_length(len(windows))
            starts = rng.integers(m, size=(n_resamples, -(-m // length), 1))
            drawn = ((starts + np.arange(length)) % m).reshape(n_resamples, -1)[:, :m]
            times[:, windows] = _counts(drawn)
        return times


def _block_length(n_windows: int) -> int:
    return round(n_windows ** (1 / 3))


def _counts(drawn: np.ndarray) -> np.ndarray:
    """Numbers (R, m), each below m -> how many times each of 0 .. m - 1 stands in a row, (R, m)."""
    rows, m = drawn.shape
    return np.bincount((drawn + m * np.arange(rows)[:, None]).ravel(), minlength=rows * m).reshape(rows, m)


def with_intervals(
    figures: Callable[[np.ndarray], dict[str, np.ndarray]],
    resampling: Resampling,
    n_bootstrap: int,
    seed: int,
    confidence: float,
) -> dict[str, Interval]:
    """Each figure's value on all n windows, and its percentile interval over `n_bootstrap` resamples of them.

    figures  times (R, n) -> name -> (R,)

    A value that is undefined is None, and so is its interval. Resamples in which a figure is undefined do not count.
    """
    values = figures(np.ones((1, resampling.n), dtype=np.int64))
    resampled = bootstrap(figures, resampling, n_bootstrap, seed)
    return {name: _interval(float(value[0]), resampled[name], confidence) for name, value in values.items()}


def bootstrap(
    figures: Callable[[np.ndarray], dict[str, np.ndarray]], resampling: Resampling, n_bootstrap: int, seed: int
) -> dict[str, np.ndarray]:
    """Each figure on n_bootstrap resamples, (n_bootstrap,)."""
    rng, n = np.random.default_rng(seed), resampling.n
    batches = [figures(np.empty((0, n), dtype=np.int64))]  # so that the names are there even without a resample
    for start in range(0, n_bootstrap, size := max(1, _BATCH // n)):
        batches.append(figures(resampling.times(rng, min(size, n_bootstrap - start))))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _interval(value: float, resampled: np.ndarray, confidence: float) -> Interval:
    defined = resampled[np.isfinite(resampled)]
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if len(defined) == 0:
        return {"value": value, "low": None, "high": None}
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"value": value, "low": float(low), "high": float(high)}


def confusion_figures(labels: np.ndarray, predicted: np.ndarray, k: int, times: np.ndarray) -> dict[str, np.ndarray]:
    """`figures_of_confusion` of labels (n,) and predictions (n,) among k classes."""
    cells = labels.astype(np.int64) * k + predicted  # small integers would overflow
    return figures_of_confusion(
        np.array([np.bincount(cells, weights=row, minlength=k * k) for row in times]).reshape(-1, k, k)
    )


def figures_of_confusion(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy (the mean of the recalls of the classes that stand in the labels), MCC (Gorodkin
    2004) and macro-F1, each (R,), of counts (R, K, K): true classes in rows, predicted ones in columns."""
    hits = np.diagonal(confusion, axis1=1, axis2=2)  # (R, K)
    true, chosen = confusion.sum(2), confusion.sum(1)
    correct, n = hits.sum(1), true.sum(1)
    spread_true, spread_chosen = n**2 - (true**2).sum(1), n**2 - (chosen**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mcc = (correct * n - (true * chosen).sum(1)) / np.sqrt(spread_true * spread_chosen)
    mcc[spread_chosen == 0] = 0  # scikit-learn's convention: one class predicted throughout says nothing
    mcc[spread_true == 0] = np.nan
    recalls = np.divide(hits, true, out=np.full(hits.shape, np.nan), where=true > 0)
    return {
        "accuracy": correct / n,
        "balanced_accuracy": mean_defined(recalls),
        "mcc": mcc,
        "macro_f1": mean_defined(_f1(hits, true + chosen)),
    }


def label_figures(truth: np.ndarray, predicted: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """Exact match, micro-F1 and macro-F1, each (R,), of independent labels (n, K), both bool."""
    weights = times.astype(np.float64)  # counts stay exact
    hits = weights @ (truth & predicted)  # (R, K)
    found = weights @ (truth.astype(np.float64) + predicted)
    return {
        "exact_match": weights @ (truth == predicted).all(axis=1) / weights.sum(axis=1),
        **figures_of_counts(hits, found),
    }


def figures_of_counts(hits: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """Micro-F1 and macro-F1, each (R,), of labels' hits (R, K) and of what `_f1` takes for found (R, K)."""
    return {"micro_f1": _f1(hits.sum(1), found.sum(1)), "macro_f1": mean_defined(_f1(hits, found))}


def _f1(hits: np.ndarray, found: np.ndarray) -> np.ndarray:
    """found: records of a class, plus those predicted as it. nan for a class that is neither there nor predicted."""
    return np.divide(2 * hits, found, out=np.full(hits.shape, np.nan), where=found > 0)


def mean_defined(figures: np.ndarray) -> np.ndarray:
    """(R, K) -> (R,): the mean over the classes in which a figure is defined; nan if there is none."""
    defined = ~np.isnan(figures)
    with np.errstate(invalid="ignore"):
        return np.where(defined, figures, 0).sum(axis=1) / defined.sum(axis=1)


class Ranking:
    """AUROC and average precision of one class, scores (n,) against truth (n,) bool, in which both values occur."""

    def __init__(self, truth: np.ndarray, scores: np.ndarray):
        members, others = np.flatnonzero(truth), np.flatnonzero(~truth)
        self._members = members[np.argsort(scores[members])]
        self._among_members = _Below(scores, self._members, self._members)
        self._among_others = _Below(scores, others, self._members)

    def __call__(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """times (R, n) -> AUROC (R,), average precision (R,); nan where only one value was drawn."""
        drawn = times[:, self._members]
        n_members = drawn.sum(axis=1)
        n_others = times.sum(axis=1) - n_members
        members_below, _ = self._among_members(times)
        others_below, others_up_to = self._among_others(times)
        # a member outranks the others below it, and half of those of equal score
        outranked = (drawn * (others_below + others_up_to)).sum(axis=1) / 2
        hits = n_members[:, None] - members_below  # records of the class at this score or above, (R, members)
        chosen = hits + n_others[:, None] - others_below
        precision = np.divide(hits, chosen, out=np.zeros(hits.shape), where=chosen > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            auroc = outranked / (n_members * n_others)
            average_precision = (drawn * precision).sum(axis=1) / n_members
        average_precision[n_others == 0] = np.nan  # nothing to tell the class from
        return auroc, average_precision


class Regression:
    """Pearson's r, Spearman's rho, R2, RMSE and MAE of predictions (n,) against truth (n,)."""

    def __init__(self, truth: np.ndarray, predictions: np.ndarray):
        error = predictions - truth
        # variances are differences of sums: taken about the median, one far outlier does not drown the other records
        x, y = truth - np.median(truth), predictions - np.median(predictions)
        self._moments = np.stack([x, y, x * x, y * y, x * y, error * error, np.abs(error)], axis=1)  # (n, 7)
        every = np.arange(len(truth))
        self._among_truth, self._among_predictions = _Below(truth, every, every), _Below(predictions, every, every)

    def __call__(self, times: np.ndarray) -> dict[str, np.ndarray]:
        """times (R, n) -> figures (R,); nan: r and rho where truth or predictions are constant, R2 where truth is."""
        x, y, xx, yy, xy, squared_error, absolute_error = (times @ self._moments / times.sum(axis=1)[:, None]).T
        rank_x = self._centred_ranks(self._among_truth, times)
        rank_y = self._centred_ranks(self._among_predictions, times)
        rank_xx, rank_yy, rank_xy = (
            np.einsum("rn,rn,rn->r", times, a, b) for a, b in ((rank_x, rank_x), (rank_y, rank_y), (rank_x, rank_y))
        )
        x_varies, y_varies = rank_xx > 0, rank_yy > 0  # ranks are exact, variances of the values are not
        with np.errstate(invalid="ignore", divide="ignore"):
            pearson = (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y))
            spearman = rank_xy / np.sqrt(rank_xx * rank_yy)
            r2 = 1 - squared_error / (xx - x * x)
        return {
            "pearson": np.where(x_varies & y_varies, pearson.clip(-1, 1), np.nan),
            "spearman": np.where(x_varies & y_varies, spearman, np.nan),
            "r2": np.where(x_varies, r2, np.nan),
            "rmse": np.sqrt(squared_error),
            "mae": absolute_error,
        }

    @staticmethod
    def _centred_ranks(among: _Below, times: np.ndarray) -> np.ndarray:
        """(R, n): twice the rank within the resample, equal values sharing their mean rank, less twice the mean."""
        below, up_to = among(times)
        return (below + up_to - times.sum(axis=1)[:, None]).astype(np.float64)


class _Below:
    """How many drawn records of a set lie below each record of another set, and how many not above it."""

    def __init__(self, values: np.ndarray, members: np.ndarray, asked: np.ndarray):
        """values (n,); `members` are the records to count, `asked` those to count for, both as indices."""
        self._order = members[np.argsort(values[members], kind="stable")]
        self._first = np.searchsorted(values[self._order], values[asked], "left")
        self._last = np.searchsorted(values[self._order], values[asked], "right")

    def __call__(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """times (R, n) -> below (R, asked), not above (R, asked)."""
        so_far = np.zeros((len(times), len(self._order) + 1), dtype=np.int64)
        np.cumsum(times[:, self._order], axis=1, out=so_far[:, 1:])
        return so_far[:, self._first], so_far[:, self._last]
