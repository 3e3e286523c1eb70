"""Thresholds against a search through all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as skm

from polymamba.core.thresholds import best_thresholds, decide, one_against_rest


def f1_at(truth: np.ndarray, scores: np.ndarray, threshold: float) -> float:
    return skm.f1_score(truth, scores >= threshold, zero_division=0)


def highest_f1(truth: np.ndarray, scores: np.ndarray) -> float:
    return max(f1_at(truth, scores, threshold) for threshold in scores)  # F1 changes at scores only


probability = st.one_of(st.sampled_from([0.0, 0.25, 0.5, np.nextafter(0.5, 1), 1.0]), st.floats(0, 1))


@given(st.lists(st.tuples(st.booleans(), probability), min_size=1, max_size=12))
def test_no_threshold_has_a_higher_f1(records):
    truth, scores = np.array(records).T
    truth = truth.astype(bool)
    (threshold,) = best_thresholds(truth[:, None], scores[:, None])
    if truth.all() or not truth.any():
        assert threshold == 0.5
    else:
        assert 0 <= threshold <= 1
        assert f1_at(truth, scores, threshold) == highest_f1(truth, scores)


@pytest.mark.parametrize(("n", "k"), [(31, 2), (200, 3)])
def test_classes_against_the_rest_and_labels(n, k):
    rng = np.random.default_rng(n)
    labels = rng.integers(k, size=n)
    probabilities = (rng.random((n, k)) * 0.6 + 0.4 * np.eye(k)[labels]).round(2)
    found = best_thresholds(labels, probabilities)
    assert found.shape == (k,)
    for c in range(k):
        assert f1_at(labels == c, probabilities[:, c], found[c]) == highest_f1(labels == c, probabilities[:, c])
    assert best_thresholds(np.eye(k, dtype=int)[labels], probabilities).tolist() == found.tolist()


@pytest.mark.parametrize(
    ("truth", "scores", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0.5),  # the middle of 0.2 to 0.8
        ([0, 1, 1], [0.2, 0.2, 0.6], 0.1),  # all: the middle of 0 to 0.2
        # F1 is 2/3 from 0.9 down to 0.8 and from 0.5 down to 0.1: the wider one is taken
        ([1, 0, 0, 1, 0], [0.9, 0.8, 0.8, 0.5, 0.1], 0.3),
        ([1, 0, 0, 1, 0], [0.9, 0.2, 0.2, 0.15, 0.1], 0.55),
        ([1, 1, 0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5], 0.25),
        ([0, 1], [0.0, 0.0], 0.0),
        ([0, 0], [0.1, 0.2], 0.5),
        ([1, 1], [0.1, 0.2], 0.5),
    ],
)
def test_middle_of_the_widest_plateau(truth, scores, expected):
    assert best_thresholds(np.array(truth)[:, None], np.array(scores)[:, None]) == pytest.approx([expected])


def test_of_equally_wide_plateaus_the_highest():
    truth, scores = np.array([1, 0, 0, 1, 0]), np.array([0.75, 0.5, 0.5, 0.25, 0.0])
    assert best_thresholds(truth[:, None], scores[:, None]) == [0.625]


def test_decide():
    probabilities = np.array([[0.5, 0.5], [0.8, 0.2], [0.3, 0.7]])
    assert decide(probabilities).tolist() == [0, 0, 1]
    assert decide(probabilities, 0.5).tolist() == [1, 0, 1]
    assert decide(probabilities, 0.2).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="between two classes; these are 3"):
        decide(np.ones((2, 3)) / 3, 0.5)
    with pytest.raises(ValueError, match="threshold nan must be a finite number"):
        decide(probabilities, np.nan)


def test_one_against_rest():
    assert one_against_rest([0, 2], 3).tolist() == [[True, False, False], [False, False, True]]
    assert one_against_rest([[0, 1], [1, 1]], 2).tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize(
    ("truth", "probabilities", "message"),
    [
        ([0, 1], [0.1, 0.2], r"probabilities \(2,\) should be \(n, K\)"),
        ([0, 2], [[0.1, 0.9], [0.5, 0.5]], "integers from 0 to 1"),
        ([0.0, 1.0], [[0.1, 0.9], [0.5, 0.5]], "truth is float64; it must be bool or integers"),
        ([[0, 2], [0, 1]], [[0.1, 0.9], [0.5, 0.5]], "flags must be 0 or 1"),
        ([[0], [1]], [[0.1, 0.9], [0.5, 0.5]], r"truth \(2, 1\) should be class indices \(n,\) or flags \(n, 2\)"),
        ([True, False], [[0.1, 0.9], [0.5, 0.5]], r"truth \(2,\) should be"),
        ([0, 1, 1], [[0.1, 0.9], [0.5, 0.5]], "truth has 3 records, probabilities have 2"),
        ([0, 1], [[0.1, 0.9], [0.5, 1.5]], r"record 1 has a probability outside 0 to 1: \[0.5, 1.5\]"),
        ([0, 1], [[np.nan, 0.9], [0.5, 0.5]], "record 0 has a probability outside 0 to 1"),
    ],
)
def test_bad_arguments(truth, probabilities, message):
    with pytest.raises(ValueError, match=message):
        best_thresholds(np.array(truth), np.array(probabilities))
