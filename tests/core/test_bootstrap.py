"""Figures of resamples, held as counts, against scikit-learn's and scipy's on the drawn records themselves."""

import numpy as np
import pytest
import scipy.signal
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as skm

from polymamba.core import bootstrap
from polymamba.core.bootstrap import (
    Ranking,
    Regression,
    Resampling,
    confusion_figures,
    label_figures,
    mean_defined,
    with_intervals,
)


def resamples(n: int, r: int = 12, seed: int = 1) -> tuple[list[np.ndarray], np.ndarray]:
    """The drawn records, r times n - 1 to n + 1, and how many times each was drawn, (r, n)."""
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(n, size=n + i % 3 - 1) for i in range(r)]
    return drawn, np.stack([np.bincount(row, minlength=n) for row in drawn])


@pytest.mark.parametrize("digits", [1, 12])  # with 1, most scores tie
@pytest.mark.parametrize(("n", "share"), [(2, 0.5), (7, 0.2), (41, 0.5), (150, 0.03), (151, 0.97)])
def test_ranking(n, share, digits):
    rng = np.random.default_rng(n)
    truth = rng.permutation(np.arange(n) < max(1, share * n))
    scores = (rng.random(n) + 0.4 * truth).round(digits)
    drawn, times = resamples(n)
    auroc, auprc = Ranking(truth, scores)(times)
    for i, row in enumerate(drawn):
        if truth[row].any() and not truth[row].all():
            assert auroc[i] == pytest.approx(skm.roc_auc_score(truth[row], scores[row]), abs=1e-12), i
            assert auprc[i] == pytest.approx(skm.average_precision_score(truth[row], scores[row]), abs=1e-12), i
        else:
            assert np.isnan([auroc[i], auprc[i]]).all(), i


@pytest.mark.parametrize(("n", "k"), [(5, 2), (31, 2), (41, 3), (150, 7)])
def test_confusion(n, k):
    labels, predicted = np.random.default_rng(n).integers(k, size=(2, n))
    drawn, times = resamples(n)
    found = confusion_figures(labels, predicted, k, times)
    for i, row in enumerate(drawn):
        pair = labels[row], predicted[row]
        assert found["accuracy"][i] == pytest.approx(skm.accuracy_score(*pair))
        recalls = skm.recall_score(*pair, labels=np.unique(pair[0]), average=None, zero_division=0)
        assert found["balanced_accuracy"][i] == pytest.approx(np.mean(recalls))
        assert found["macro_f1"][i] == pytest.approx(skm.f1_score(*pair, average="macro"))
        if len(np.unique(pair[0])) > 1:
            assert found["mcc"][i] == pytest.approx(skm.matthews_corrcoef(*pair), abs=1e-12)
        else:
            assert np.isnan(found["mcc"][i])


@pytest.mark.parametrize(("n", "k", "share"), [(5, 2, 0.3), (41, 3, 0.02), (150, 9, 0.4)])
def test_labels(n, k, share):
    truth, predicted = np.random.default_rng(n).random((2, n, k)) < share
    drawn, times = resamples(n)
    found = label_figures(truth, predicted, times)
    for i, row in enumerate(drawn):
        pair = truth[row], predicted[row]
        assert found["exact_match"][i] == pytest.approx(skm.accuracy_score(*pair))
        for name in ("micro", "macro"):
            expected = skm.f1_score(*pair, average=name, zero_division=np.nan)
            assert found[f"{name}_f1"][i] == pytest.approx(expected, nan_ok=True), (name, i)


@pytest.mark.parametrize("digits", [0, 12])  # with 0, most values tie
@pytest.mark.parametrize(("n", "offset"), [(3, 0), (41, 1e6), (150, -3)])
def test_regression(n, offset, digits):
    rng = np.random.default_rng(n)
    truth = rng.normal(size=n).round(digits) + offset
    predictions = (truth + rng.normal(size=n)).round(digits)
    drawn, times = resamples(n)
    found = Regression(truth, predictions)(times)
    for i, row in enumerate(drawn):
        pair = truth[row], predictions[row]
        assert found["rmse"][i] == pytest.approx(skm.root_mean_squared_error(*pair))
        assert found["mae"][i] == pytest.approx(skm.mean_absolute_error(*pair))
        if np.ptp(pair[0]) == 0:
            assert np.isnan(found["r2"][i])
        else:
            assert found["r2"][i] == pytest.approx(skm.r2_score(*pair), abs=1e-8)
        if np.ptp(pair[0]) == 0 or np.ptp(pair[1]) == 0:
            assert np.isnan([found["pearson"][i], found["spearman"][i]]).all()
        else:
            assert found["pearson"][i] == pytest.approx(scipy.stats.pearsonr(*pair).statistic, abs=1e-8)
            assert found["spearman"][i] == pytest.approx(scipy.stats.spearmanr(*pair).statistic, abs=1e-12)


def test_an_outlier_that_is_not_drawn_does_no_harm():
    rng = np.random.default_rng(0)
    truth = np.append(rng.normal(size=40), 1e9)
    predictions = np.append(truth[:40] + rng.normal(size=40), -1e9)
    times = np.bincount(drawn := np.append(np.arange(40), 0), minlength=41)[None]
    found = Regression(truth, predictions)(times)["pearson"][0]
    assert found == pytest.approx(scipy.stats.pearsonr(truth[drawn], predictions[drawn]).statistic, abs=1e-9)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_regression_of_few_values(pairs):
    truth, predictions = np.array(pairs, dtype=float).T
    found = Regression(truth, predictions)(np.ones((1, len(truth)), dtype=int))
    if np.ptp(truth) == 0 or np.ptp(predictions) == 0:
        assert np.isnan(found["pearson"][0])
        assert np.isnan(found["spearman"][0])
    else:
        assert found["pearson"][0] == pytest.approx(scipy.stats.pearsonr(truth, predictions).statistic, abs=1e-9)
        assert found["spearman"][0] == pytest.approx(scipy.stats.spearmanr(truth, predictions).statistic, abs=1e-9)


def test_mean_defined():
    figures = np.array([[1.0, np.nan, 2.0], [np.nan, np.nan, np.nan]])
    assert mean_defined(figures).tolist() == pytest.approx([1.5, np.nan], nan_ok=True)
    assert np.isnan(mean_defined(np.empty((3, 0)))).all()


def mean_of(values):
    return lambda times: {"mean": times @ values / times.sum(axis=1)}


def each(n: int) -> Resampling:
    """Of n records that are one window each."""
    return Resampling(np.arange(n))


@pytest.mark.parametrize("batch", [1, 50, 50 * 7, 10**6])
def test_batches_are_of_no_account(monkeypatch, batch):
    values = np.random.default_rng(0).integers(100, size=50)
    expected = bootstrap.bootstrap(mean_of(values), each(50), 30, seed=0)["mean"]
    monkeypatch.setattr(bootstrap, "_BATCH", batch)
    assert bootstrap.bootstrap(mean_of(values), each(50), 30, seed=0)["mean"].tolist() == expected.tolist()
    assert expected.shape == (30,)


def test_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(0).exponential(size=80)
    found = with_intervals(mean_of(values), each(80), 4000, seed=0, confidence=0.9)["mean"]
    twin = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", confidence_level=0.9, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(twin.low, abs=0.02)
    assert found["high"] == pytest.approx(twin.high, abs=0.02)


@given(sizes=st.lists(st.integers(1, 6), min_size=10, max_size=20), seed=st.integers(0, 99))
def test_records_are_drawn_with_all_their_windows(sizes, seed):
    resampling = Resampling(np.repeat(np.arange(len(sizes)) * 7 % 97, sizes))
    times = resampling.times(np.random.default_rng(seed), 5)
    assert (resampling.n_records, resampling.block_length) == (len(sizes), None)
    assert times.shape == (5, sum(sizes))
    of_records = np.split(times, np.cumsum(sizes)[:-1], axis=1)
    assert all((windows == windows[:, :1]).all() for windows in of_records)
    assert (np.sum([windows[:, 0] for windows in of_records], axis=0) == len(sizes)).all()


@pytest.mark.parametrize("copies", [1, 2, 9])
def test_windows_that_say_the_same_narrow_no_interval(copies):
    values = np.random.default_rng(0).exponential(size=23)
    expected = with_intervals(mean_of(values), each(23), 200, seed=3, confidence=0.9)["mean"]
    windows = Resampling(np.repeat(np.arange(23), copies))
    found = with_intervals(mean_of(np.repeat(values, copies)), windows, 200, seed=3, confidence=0.9)["mean"]
    assert found == pytest.approx(expected)


@given(sizes=st.lists(st.integers(2, 40), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_of_few_records_blocks_are_drawn(sizes, seed):
    """Of each record, or of all with under 10 windows together, as many as there are, in runs on their circle."""
    resampling = Resampling(np.repeat(np.arange(len(sizes)), sizes))
    times = resampling.times(np.random.default_rng(seed), 7)
    assert resampling.n_records == len(sizes)
    of_records = np.split(times, np.cumsum(sizes)[:-1], axis=1)
    circles = [windows for windows in of_records if windows.shape[1] >= 10]
    if short := [windows for windows in of_records if windows.shape[1] < 10]:
        circles.append(np.concatenate(short, axis=1))
    longest = 0
    for windows in circles:
        m = windows.shape[1]
        longest = max(longest, length := round(m ** (1 / 3)))
        assert (windows.sum(axis=1) == m).all()
        begun = np.maximum(windows - np.roll(windows, 1, axis=1), 0).sum(axis=1)  # a run begins where more are drawn
        assert (begun <= -(-m // length)).all()
    assert resampling.block_length == longest


def test_blocks_keep_what_neighbours_share():
    """The mean of an AR(1) series varies as its long-run variance says, not as that of its values."""
    n, share = 4096, 0.5
    rng = np.random.default_rng(0)
    values = scipy.signal.lfilter([1.0], [1.0, -share], rng.normal(size=n))
    expected = 2 * scipy.stats.norm.ppf(0.975) / (1 - share) / np.sqrt(n)

    def width(resampling: Resampling) -> float:
        interval = with_intervals(mean_of(values), resampling, 1000, seed=0, confidence=0.95)["mean"]
        return interval["high"] - interval["low"]

    assert width(Resampling(np.arange(n) // (n // 2))) == pytest.approx(expected, rel=0.15)
    assert width(each(n)) == pytest.approx(expected * np.sqrt((1 - share) / (1 + share)), rel=0.1)


def test_no_resamples_no_interval():
    assert with_intervals(mean_of(np.arange(3)), each(3), 0, 0, 0.95) == {
        "mean": {"value": 1, "low": None, "high": None}
    }
