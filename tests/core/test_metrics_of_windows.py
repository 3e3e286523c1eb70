"""Figures of windows, of which several are of one record: intervals are over records, and that is said."""

import numpy as np
import pytest

from polymamba.core.metrics import classification_metrics, format_table, multilabel_metrics, regression_metrics

CLASSES = ("EI", "IE", "N")
LABELS = np.random.default_rng(0).permutation(np.arange(60) % 3)
PROBABILITIES = np.random.default_rng(1).dirichlet(np.ones(3), 60).round(2)
FLAGS = np.random.default_rng(2).random((60, 3)) < 0.3


@pytest.mark.parametrize("n_records", [4, 12, 60])
def test_windows_of_records(n_records):
    """Values are of all windows alike; intervals of those that repeat their record, of all kinds, are the records'."""
    records = np.arange(60) * n_records // 60
    kinds = {
        "class": (classification_metrics, (LABELS, PROBABILITIES), [CLASSES]),
        "label": (multilabel_metrics, (FLAGS, PROBABILITIES), [CLASSES]),
        "value": (regression_metrics, (PROBABILITIES[:, 0], PROBABILITIES[:, 1]), []),
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
    def last_lines(n_records: int) -> list[str]:
        records = np.arange(60) % n_records
        found = classification_metrics(LABELS, PROBABILITIES, CLASSES, records=np.sort(records), n_bootstrap=5)
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
