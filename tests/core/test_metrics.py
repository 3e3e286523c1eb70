"""Figures against scikit-learn's and scipy's, intervals against theory; single resamples: test_bootstrap.py."""

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
    regression_metrics,
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


@pytest.mark.parametrize("n_records", [4, 12, 60])
def test_windows_of_records(n_records):
    """Values are of all windows alike; intervals of those that repeat their record, of all kinds, are the records'."""
    records = np.arange(60) * n_records // 60
    labels, probabilities = predictions(60, 3)
    kinds = {
        "class": (classification_metrics, (labels, probabilities), [CLASSES[:3]]),
        "label": (multilabel_metrics, flags(60, 3), [CLASSES[:3]]),
        "value": (regression_metrics, (probabilities[:, 0], probabilities[:, 1]), []),
    }
    for name, (measure, data, rest) in kinds.items():
        found = measure(*data, *rest, records=records, n_bootstrap=50)
        plain = measure(*data, *rest, n_bootstrap=50)
        assert (found["n"], found["n_records"], plain["n_records"]) == (60, n_records, 60), name
        assert found["block_length"] == (2 if n_records == 4 else None), name  # 15^(1/3)
        intervals = [key for key, value in plain.items() if isinstance(value, dict) and "low" in value]
        assert [found[key]["value"] for key in intervals] == [plain[key]["value"] for key in intervals], name
        assert (found == plain) == (n_records == 60), name
        if n_records == 12:
            first = [part[::5] for part in data]
            repeated = measure(*[np.repeat(part, 5, axis=0) for part in first], *rest, records=records, n_bootstrap=50)
            of_records = measure(*first, *rest, n_bootstrap=50)
            for key in intervals:
                assert repeated[key] == pytest.approx(of_records[key]), (name, key)


def test_the_table_says_what_intervals_are_over():
    labels, probabilities = predictions(60, 3)

    def last_lines(n_records: int) -> list[str]:
        records = np.arange(60) % n_records
        found = classification_metrics(labels, probabilities, CLASSES[:3], records=np.sort(records), n_bootstrap=5)
        return format_table(found).splitlines()[7:]

    (line,) = last_lines(60)
    assert line.startswith("60 records: ")
    windows, over = last_lines(12)
    assert windows.startswith("60 windows of 12 records: ")
    assert over == "the intervals are over records, each with all its windows"
    windows, over, meaning = last_lines(3)
    assert windows.startswith("60 windows of 3 records: ")
    assert "blocks of up to 3 windows" in over
    assert "nothing of other records" in meaning


@pytest.mark.parametrize("shape", [(3,), (4, 1)])
def test_records_of_another_number(shape):
    with pytest.raises(ValueError, match=r"should be \(4,\)"):
        regression_metrics(np.arange(4), np.arange(4), records=np.zeros(shape, dtype=int))


def test_confusion_tsv(tmp_path):
    write_confusion_tsv(tmp_path / "confusion.tsv", np.array([[5, 1], [0, 7]]), ("donor", "none"))
    assert (tmp_path / "confusion.tsv").read_text() == "true\\predicted\tdonor\tnone\ndonor\t5\t1\nnone\t0\t7\n"
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.tsv"]
