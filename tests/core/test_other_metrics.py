"""Figures of several labels a record, and of numbers, against scikit-learn's and scipy's."""

import json
import warnings

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as skm

from polymamba.core.metrics import format_table, multilabel_metrics, regression_metrics

CLASSES = ("EI", "IE", "N", "x")
UNDEFINED = {"value": None, "low": None, "high": None}


def flags(n: int, k: int, share: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Truth (n, k) and probabilities (n, k) that know something; rounded, so that they tie."""
    rng = np.random.default_rng(n)
    truth = rng.random((n, k)) < share
    return truth, (0.3 * truth + 0.7 * rng.random((n, k))).round(2)


@pytest.mark.parametrize("kind", [bool, int])
@pytest.mark.parametrize(("n", "k"), [(13, 1), (41, 3), (150, 4)])
def test_multilabel_equals_scikit_learn(n, k, kind):
    truth, probabilities = flags(n, k)
    thresholds = np.linspace(0.3, 0.6, k)
    predicted = probabilities >= thresholds
    found = multilabel_metrics(truth.astype(kind), probabilities, CLASSES[:k], thresholds=thresholds, n_bootstrap=30)
    assert {name: found[name]["value"] for name in ("exact_match", "micro_f1", "macro_f1", "auroc", "auprc")} == {
        "exact_match": pytest.approx((truth == predicted).all(1).mean()),
        "micro_f1": pytest.approx(skm.f1_score(truth.ravel(), predicted.ravel())),
        "macro_f1": pytest.approx(np.mean([skm.f1_score(truth[:, c], predicted[:, c]) for c in range(k)])),
        "auroc": pytest.approx(skm.roc_auc_score(truth, probabilities, average="macro")),
        "auprc": pytest.approx(skm.average_precision_score(truth, probabilities, average="macro")),
    }
    for c, name in enumerate(CLASSES[:k]):
        columns = truth[:, c], predicted[:, c]
        assert found["per_label"][name] == {
            "support": found["support"][name],
            "precision": pytest.approx(skm.precision_score(*columns)),
            "recall": pytest.approx(skm.recall_score(*columns)),
            "f1": pytest.approx(skm.f1_score(*columns)),
            "auroc": pytest.approx(skm.roc_auc_score(truth[:, c], probabilities[:, c])),
            "auprc": pytest.approx(skm.average_precision_score(truth[:, c], probabilities[:, c])),
            "threshold": thresholds[c],
        }
        (tn, fp), (fn, tp) = skm.confusion_matrix(*columns, labels=[False, True]).tolist()
        assert found["confusion"][name] == {"tp": tp, "fp": fp, "fn": fn, "tn": tn}
        assert found["support"][name] == tp + fn
    assert found["labels"] == list(CLASSES[:k])


def test_labels_of_one_value_are_left_out_of_the_mean_areas():
    truth, probabilities = flags(40, 4)
    truth[:, 1], truth[:, 2], probabilities[:, 1] = False, True, 0.1
    with warnings.catch_warnings(action="error"):
        found = multilabel_metrics(truth, probabilities, CLASSES, n_bootstrap=200)
    expected = np.mean([skm.roc_auc_score(truth[:, c], probabilities[:, c]) for c in (0, 3)])
    assert found["auroc"]["value"] == pytest.approx(expected)
    assert found["auroc"]["low"] < expected < found["auroc"]["high"]
    assert found["per_label"]["IE"] == {
        "support": 0, "precision": None, "recall": None, "f1": None, "auroc": None, "auprc": None, "threshold": 0.5
    }  # fmt: skip
    assert found["per_label"]["N"]["recall"] == pytest.approx(np.mean(probabilities[:, 2] >= 0.5))
    assert found["per_label"]["N"]["auroc"] is None
    kept = [skm.f1_score(truth[:, c], probabilities[:, c] >= 0.5) for c in (0, 2, 3)]
    assert found["macro_f1"]["value"] == pytest.approx(np.mean(kept))  # label 1 is neither there nor predicted


def test_many_rare_labels_have_an_interval():
    truth = np.eye(40, dtype=bool)  # no resample of 40 records holds all of them
    probabilities = (0.6 * truth + 0.4 * np.random.default_rng(0).random((40, 40))).round(3)
    found = multilabel_metrics(truth, probabilities, [str(k) for k in range(40)], n_bootstrap=50)
    assert found["auroc"] == {"value": 1, "low": 1, "high": 1}


def test_no_label_at_all():
    with warnings.catch_warnings(action="error"):
        found = multilabel_metrics(np.zeros((5, 2), dtype=int), np.zeros((5, 2)), ("a", "b"), n_bootstrap=20)
    assert found["exact_match"] == {"value": 1, "low": 1, "high": 1}
    assert found["micro_f1"] == found["macro_f1"] == found["auroc"] == found["auprc"] == UNDEFINED


@pytest.mark.parametrize(
    ("truth", "probabilities", "thresholds", "message"),
    [
        (np.empty((0, 2), dtype=int), np.empty((0, 2)), None, "no records"),
        (np.array([0, 1]), np.ones((2, 2)), None, r"truth \(2,\) and probabilities \(2, 2\) should both be \(n, 2\)"),
        (np.eye(3, dtype=int), np.eye(3), None, r"should both be \(n, 2\)"),
        (np.eye(2), np.eye(2), None, "bool or integers"),
        (np.full((2, 2), 2), np.eye(2), None, "flags must be 0 or 1"),
        (np.full((2, 2), -1), np.eye(2), None, "flags must be 0 or 1"),
        (np.eye(2, dtype=int), np.array([[0, 1], [3.5, -2]]), None, "record 1 has a probability outside 0 to 1"),
        (np.eye(2, dtype=int), np.array([[0, np.nan], [0, 1]]), None, "record 0 has a probability outside 0 to 1"),
        (np.eye(2, dtype=int), np.eye(2), [0.5], "should be 2 finite numbers"),
        (np.eye(2, dtype=int), np.eye(2), [0.5, np.nan], "should be 2 finite numbers"),
    ],
)
def test_bad_multilabel_arguments(truth, probabilities, thresholds, message):
    with pytest.raises(ValueError, match=message):
        multilabel_metrics(truth, probabilities, ("a", "b"), thresholds=thresholds)


@pytest.mark.parametrize("digits", [0, 12])
@pytest.mark.parametrize("n", [7, 150])
def test_regression_equals_scipy_and_scikit_learn(n, digits):
    rng = np.random.default_rng(n)
    truth = rng.normal(size=n).round(digits)
    pair = truth, (truth + rng.normal(size=n)).round(digits)
    found = regression_metrics(*pair, n_bootstrap=300)
    expected = {
        "pearson": scipy.stats.pearsonr(*pair).statistic,
        "spearman": scipy.stats.spearmanr(*pair).statistic,
        "r2": skm.r2_score(*pair),
        "rmse": skm.root_mean_squared_error(*pair),
        "mae": skm.mean_absolute_error(*pair),
    }
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-12), name
        assert found[name]["low"] < value < found[name]["high"], name
    assert found["n"] == n


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("constant", ["truth", "predictions", "both"])
def test_constant_values(n, constant):
    varied = np.arange(float(n))
    truth = varied if constant == "predictions" else np.full(n, 0.1)
    predictions = varied if constant == "truth" else np.full(n, 0.3)
    with warnings.catch_warnings(action="error"):
        found = regression_metrics(truth, predictions, n_bootstrap=50)
    assert found["pearson"] == found["spearman"] == UNDEFINED
    assert found["rmse"]["value"] == pytest.approx(np.sqrt(np.mean((truth - predictions) ** 2)))
    if constant == "predictions" and n > 1:
        assert found["r2"]["value"] == pytest.approx(skm.r2_score(truth, predictions))
    else:
        assert found["r2"] == UNDEFINED


@pytest.mark.parametrize(
    ("truth", "predictions", "message"),
    [
        ([], [], "no records"),
        ([1, 2], [1], r"truth \(2,\) and predictions \(1,\) should both be \(n,\)"),
        ([[1], [2]], [[1], [2]], "should both be"),
        ([1, np.nan], [1, 2], "the truth of record 1 is not finite"),
        ([1, 2], [np.inf, 2], "the prediction of record 0 is not finite"),
    ],
)
def test_bad_regression_arguments(truth, predictions, message):
    with pytest.raises(ValueError, match=message):
        regression_metrics(np.array(truth), np.array(predictions))


def test_all_kinds_are_json():
    for found in (
        multilabel_metrics(*flags(30, 3), CLASSES[:3], n_bootstrap=10),
        multilabel_metrics(np.ones((3, 1), dtype=bool), np.ones((3, 1)), ("a",), n_bootstrap=10),
        regression_metrics(np.arange(5), np.arange(5)[::-1], n_bootstrap=10),
        regression_metrics(np.ones(3), np.ones(3), n_bootstrap=10),
    ):
        assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_tables_of_the_other_kinds():
    found = multilabel_metrics(*flags(30, 2), ("a", "b"), n_bootstrap=10, confidence=0.9)
    lines = format_table(found | {"exact_match": {"value": 0.5, "low": 0.25, "high": 0.75}}).splitlines()
    assert lines[0] == "               value   90 % interval"
    assert lines[1] == "exact match   0.5000   0.2500 to 0.7500"
    assert [line.split()[0] for line in lines[2:6]] == ["micro-F1", "macro-F1", "AUROC", "AUPRC"]
    assert lines[6] == f"30 records: a {found['support']['a']}, b {found['support']['b']}"

    found = regression_metrics(np.array([1.0, 3.0]), np.array([2e-6, 4.0]), n_bootstrap=0)
    lines = format_table(found | {"pearson": UNDEFINED, "mae": {"value": 2e-6, "low": 1e-6, "high": 3e-6}}).splitlines()
    assert [line.rsplit(maxsplit=1)[0] for line in lines[2:5]] == ["Spearman rho", "R2", "RMSE"]
    assert lines[1] == f"{'Pearson r':14}      -"
    assert lines[5] == f"{'MAE':14}  2e-06   1e-06 to 3e-06"
    assert lines[6] == "2 records"
