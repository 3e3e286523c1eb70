"""Figures of one class a record against scikit-learn's, intervals against theory and scipy's.

Several labels and numbers: test_other_metrics.py; windows of records: test_metrics_of_windows.py; single resamples:
test_bootstrap.py.
"""

import json
import warnings

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as skm

from polymamba.core.metrics import (
    classification_metrics,
    format_table,
    multilabel_metrics,
    write_confusion_tsv,
)

CLASSES = ("EI", "IE", "N", "x")


def predictions(n: int, k: int, seed: int = 0, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) with every class, and probabilities (n, k) that know something; rounded, so that scores tie."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    scores = rng.random((n, k)) + 0.5 * np.eye(k)[labels]
    return labels, (scores / scores.sum(1, keepdims=True)).round(digits)


def by_scikit_learn(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """The figures of a set in which every class of `labels` can be ranked."""
    predicted = probabilities.argmax(1)
    present = np.unique(labels)
    return {
        "accuracy": skm.accuracy_score(labels, predicted),
        "balanced_accuracy": skm.recall_score(labels, predicted, labels=present, average="macro", zero_division=0),
        "mcc": skm.matthews_corrcoef(labels, predicted),
        "macro_f1": skm.f1_score(labels, predicted, average="macro"),
        "auroc": np.mean([skm.roc_auc_score(labels == c, probabilities[:, c]) for c in present]),
        "auprc": np.mean([skm.average_precision_score(labels == c, probabilities[:, c]) for c in present]),
    }


@pytest.mark.parametrize(("n", "k"), [(4, 2), (31, 2), (30, 3), (257, 4)])
def test_values_equal_scikit_learn(n, k):
    labels, probabilities = predictions(n, k)
    found = classification_metrics(labels, probabilities, CLASSES[:k], n_bootstrap=20)
    for name, expected in by_scikit_learn(labels, probabilities).items():
        assert found[name]["value"] == pytest.approx(expected, abs=1e-12), name
    assert found["confusion"] == skm.confusion_matrix(labels, probabilities.argmax(1)).tolist()
    assert found["support"] == {name: int((labels == c).sum()) for c, name in enumerate(CLASSES[:k])}
    report = skm.classification_report(labels, probabilities.argmax(1), output_dict=True, zero_division=0)
    for c, name in enumerate(CLASSES[:k]):
        row = found["per_class"][name]
        assert (row["precision"] or 0) == pytest.approx(report[str(c)]["precision"])
        assert row["recall"] == pytest.approx(report[str(c)]["recall"])
        assert row["f1"] == pytest.approx(report[str(c)]["f1-score"])


def test_labels_of_small_integers():
    names = [str(c) for c in range(20)]
    labels, probabilities = predictions(100, 20)
    found = classification_metrics(labels.astype(np.uint8), probabilities, names, n_bootstrap=20)
    assert found == classification_metrics(labels, probabilities, names, n_bootstrap=20)


def test_two_classes_give_the_usual_auroc():
    labels, probabilities = predictions(40, 2)
    probabilities[:, 0] = 1 - probabilities[:, 1]
    found = classification_metrics(labels, probabilities, ("no", "yes"), n_bootstrap=5)
    assert found["auroc"]["value"] == pytest.approx(skm.roc_auc_score(labels, probabilities[:, 1]))
    assert found["per_class"]["yes"]["auprc"] == skm.average_precision_score(labels, probabilities[:, 1])


def test_interval_of_accuracy_is_the_binomial_one():
    labels = np.zeros(1000, dtype=int)
    labels[500:] = 1
    probabilities = np.eye(2)[np.where(np.arange(1000) % 10 == 0, 1 - labels, labels)]
    found = classification_metrics(labels, probabilities, ("a", "b"), n_bootstrap=2000)["accuracy"]
    low, high = scipy.stats.binom(1000, 0.9).interval(0.95)
    assert found["value"] == 0.9
    assert found["low"] == pytest.approx(low / 1000, abs=0.003)
    assert found["high"] == pytest.approx(high / 1000, abs=0.003)


def test_interval_agrees_with_scipy():
    labels, probabilities = predictions(60, 3, digits=3)

    def auroc(records):
        return by_scikit_learn(labels[records], probabilities[records])["auroc"]

    found = classification_metrics(labels, probabilities, CLASSES[:3], n_bootstrap=2000)["auroc"]
    twin = scipy.stats.bootstrap(
        (np.arange(60),), auroc, vectorized=False, n_resamples=100, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found["low"] == pytest.approx(twin.low, abs=0.04)
    assert found["high"] == pytest.approx(twin.high, abs=0.04)


def test_seed_decides_and_confidence_widens():
    labels, probabilities = predictions(90, 3)

    def interval(**options):
        found = classification_metrics(labels, probabilities, CLASSES[:3], n_bootstrap=300, **options)["mcc"]
        return found["low"], found["high"]

    assert interval(seed=1) == interval(seed=1) != interval(seed=2)
    assert interval(confidence=0.5)[0] > interval(confidence=0.99)[0]


UNDEFINED = {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("n", [1, 6])
def test_one_class_in_the_labels(n):
    _, probabilities = predictions(n, 3)
    with warnings.catch_warnings(action="error"):
        found = classification_metrics(np.ones(n, dtype=int), probabilities, CLASSES[:3], n_bootstrap=50)
    assert found["mcc"] == found["auroc"] == found["auprc"] == UNDEFINED
    assert found["accuracy"]["value"] == np.mean(probabilities.argmax(1) == 1)
    assert found["per_class"]["EI"]["recall"] is None


def test_class_without_records_is_left_out_of_the_means():
    labels, probabilities = predictions(40, 4)
    labels[labels == 3] = 0
    with warnings.catch_warnings(action="error"):
        found = classification_metrics(labels, probabilities, CLASSES, n_bootstrap=200)
    expected = by_scikit_learn(labels, probabilities)
    assert found["auroc"]["value"] == pytest.approx(expected["auroc"])
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]
    assert found["per_class"]["x"] | {"precision": 0} == {
        "support": 0, "precision": 0, "recall": None, "f1": 0, "auroc": None, "auprc": None
    }  # fmt: skip


def test_rare_class_missing_from_most_resamples():
    labels = np.zeros(50, dtype=int)
    labels[0] = 1
    probabilities = np.tile([0.6, 0.4], (50, 1))
    probabilities[0] = [0.1, 0.9]
    with warnings.catch_warnings(action="error"):
        found = classification_metrics(labels, probabilities, ("common", "rare"), n_bootstrap=100)
    assert found["auroc"] == {"value": 1, "low": 1, "high": 1}


def test_predicting_one_class_only():
    labels, _ = predictions(30, 3)
    with warnings.catch_warnings(action="error"):
        found = classification_metrics(labels, np.tile([0.2, 0.2, 0.6], (30, 1)), CLASSES[:3], n_bootstrap=50)
    assert found["mcc"] == {"value": 0, "low": 0, "high": 0}
    assert found["auroc"]["value"] == 0.5


def test_result_is_json():
    labels, probabilities = predictions(30, 3)
    found = classification_metrics(labels, probabilities, CLASSES[:3], n_bootstrap=10)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        (np.empty(0, dtype=int), np.empty((0, 2)), "no records"),
        (np.array([0, 1]), np.ones((2, 3)), r"should be \(n,\) and \(n, 2\)"),
        (np.array([0, 2]), np.ones((2, 2)), "integers from 0 to 1"),
        (np.array([0, -1]), np.ones((2, 2)), "integers from 0 to 1"),
        (np.array([0.0, 1.0]), np.ones((2, 2)), "integers from 0 to 1"),
        (np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 1]]), "record 1 are not finite"),
    ],
)
def test_bad_arguments(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(labels, probabilities, ("a", "b"))


@pytest.mark.parametrize(("classes", "message"), [(("a", "a"), "'a' is named twice"), ((), "no classes to measure")])
def test_bad_names(classes, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array([0, 1]), np.eye(2), classes)
    with pytest.raises(ValueError, match=message):
        multilabel_metrics(np.eye(2, dtype=int), np.eye(2), classes)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.1])
def test_threshold_of_the_second_class(threshold):
    labels, probabilities = predictions(41, 2)
    found = classification_metrics(labels, probabilities, ("no", "yes"), threshold=threshold, n_bootstrap=50)
    predicted = probabilities[:, 1] >= threshold
    assert found["threshold"] == threshold
    assert found["confusion"] == skm.confusion_matrix(labels, predicted).tolist()
    assert found["accuracy"]["value"] == pytest.approx(skm.accuracy_score(labels, predicted))
    assert found["mcc"]["value"] == pytest.approx(skm.matthews_corrcoef(labels, predicted), abs=1e-12)
    assert found["per_class"]["yes"]["recall"] == pytest.approx(skm.recall_score(labels, predicted))
    free = classification_metrics(labels, probabilities, ("no", "yes"), n_bootstrap=50)
    assert free["threshold"] is None
    assert found["auroc"] == free["auroc"]  # ranks know no threshold


def test_threshold_is_for_two_classes():
    with pytest.raises(ValueError, match="between two classes"):
        classification_metrics(*predictions(30, 3), CLASSES[:3], threshold=0.5)


def test_table():
    labels, probabilities = predictions(30, 3)
    found = classification_metrics(labels, probabilities, CLASSES[:3], n_bootstrap=50)
    found |= {"accuracy": {"value": 0.95, "low": 0.9, "high": 1.0}, "mcc": UNDEFINED}
    lines = format_table(found).splitlines()
    assert lines[0].split(maxsplit=1) == ["value", "95 % interval"]
    assert lines[1] == "accuracy            0.9500   0.9000 to 1.0000"
    assert lines[3].split() == ["MCC", "-"]
    assert [line.split()[0] for line in (lines[2], *lines[4:7])] == ["balanced", "macro-F1", "AUROC", "AUPRC"]
    assert lines[7] == "30 records: EI 10, IE 10, N 10"


def test_confusion_tsv(tmp_path):
    write_confusion_tsv(tmp_path / "confusion.tsv", np.array([[5, 1], [0, 7]]), ("donor", "none"))
    assert (tmp_path / "confusion.tsv").read_text() == "true\\predicted\tdonor\tnone\ndonor\t5\t1\nnone\t0\t7\n"
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.tsv"]
