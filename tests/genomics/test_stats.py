"""Figures of labelled DNA, against counts on strings, and the picture, read off matplotlib's figure and the file."""

import json
import re
from collections import Counter
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from Bio.Seq import Seq
from Bio.SeqUtils import gc_fraction
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from polymamba.genomics.alphabet import tokenize
from polymamba.genomics.dataset import LabelledSequences
from polymamba.genomics.stats import describe_statistics, plot_statistics, statistics

pytestmark = pytest.mark.usefixtures("in_full")


def labelled(records: list[tuple[str, str]], classes: tuple[str, ...]) -> LabelledSequences:
    """From (sequence, class)."""
    n = len(records)
    labels = np.array([classes.index(name) for _, name in records], dtype=np.int64)
    tokens = [tokenize(sequence) for sequence, _ in records]
    return LabelledSequences([f"r{i}" for i in range(n)], tokens, labels, classes, np.full(n, "train"), ["x.fa"] * n)


def molecule(sequence: str) -> str:
    return min(sequence, str(Seq(sequence).reverse_complement()))


SEQUENCES = st.text("ACGTN", max_size=5)


@given(st.lists(st.tuples(SEQUENCES, st.sampled_from("ab")), max_size=14))
def test_rows_are_what_strings_say(records):
    figures = statistics(labelled(records, ("a", "b")))
    assert json.loads(json.dumps(figures)) == figures
    assert [row["class"] for row in figures["rows"]] == ["a", "b", "all"]
    for row in figures["rows"]:
        sequences = [s for s, name in records if row["class"] in (name, "all")]
        letters = Counter("".join(sequences))
        lengths = sorted(map(len, sequences), reverse=True)
        assert row["records"] == len(sequences)
        assert row["bases"] == sum(lengths)
        assert (row["shortest"], row["longest"]) == ((lengths[-1], lengths[0]) if lengths else (None, None))
        assert row["median"] == (np.median(lengths) if lengths else None)
        # The largest length such that sequences at least so long hold half of the bases.
        halves = [n for n in lengths if 2 * sum(m for m in lengths if m >= n) >= sum(lengths)]
        assert row["n50"] == (max(halves) if lengths else None)
        for letter, share in row["composition"].items():
            assert share == (letters[letter] / letters.total() if letters else None)
        called = "".join(sequences).replace("N", "")
        assert row["gc"] == (pytest.approx(gc_fraction(called)) if called else None)
        assert row["with_N"] == sum("N" in s for s in sequences)
        assert row["copies"] == len(sequences) - len(set(sequences))
        assert row["reverse_complements"] == len(set(sequences)) - len(set(map(molecule, sequences)))


@given(st.lists(st.tuples(SEQUENCES, st.sampled_from("abc")), max_size=14))
def test_conflicts_are_what_strings_say(records):
    conflicts = statistics(labelled(records, ("a", "b", "c")))["conflicts"]
    seen = set()
    for kind, group_of in (("identical", str), ("reverse_complement", molecule)):
        classes = {}
        for sequence, name in records:
            classes.setdefault(group_of(sequence), set()).add(name)
        concerned = {i for i, (s, _) in enumerate(records) if len(classes[group_of(s)]) > 1} - seen
        seen |= concerned
        found = conflicts[kind]
        assert found["records"] == len(concerned)
        assert found["groups"] == len({group_of(records[i][0]) for i in concerned})
        assert len(found["examples"]) == min(3, found["groups"])
        for i, j in found["examples"]:
            assert i in concerned
            assert group_of(records[i][0]) == group_of(records[j][0])
            assert records[i][1] != records[j][1]


def test_description():
    records = [("ACGTA", "a"), ("ACGTA", "a"), ("TACGT", "b"), ("ACGTA", "b"), ("GGNN", "b"), ("GGGCCCAAAT", "b")]
    data = labelled(records, ("a", "b", "none"))
    *table, identical, opposite = describe_statistics(statistics(data), data.names).splitlines()
    header = ["class", "records", "bases", "shortest", "median", "longest", "N50"]
    header += ["A %", "C %", "G %", "T %", "N %", "GC %", "with N", "copies", "rev. compl."]
    assert [re.split("  +", line) for line in table] == [
        header,
        ["a", "2", "10", "5", "5", "5", "5", "40.0", "20.0", "20.0", "20.0", "0.0", "40.0", "0", "1", "0"],
        ["b", "4", "24", "4", "5", "10", "5", "25.0", "20.8", "29.2", "16.7", "8.3", "54.5", "1", "0", "1"],
        ["none", "0", "0", *["-"] * 10, "0", "0", "0"],
        ["all", "6", "34", "4", "5", "10", "5", "29.4", "20.6", "26.5", "17.6", "5.9", "50.0", "1", "2", "1"],
    ]
    assert len({len(line) for line in table}) == 1
    assert identical == "same sequence, different labels: 1, of 3 records: r0 / r3"
    assert opposite == "opposite strands of one molecule, different labels: 1, of 1 records: r2 / r0"


def test_other_kinds_of_labels(tmp_path, figures):
    """A record may have several labels at once, or a number."""
    data = labelled([("ACG", "a"), ("ACG", "a"), ("TTTT", "b")], ("a", "b"))
    many = replace(data, labels=np.array([[1, 1], [1, 0], [0, 0]], dtype=bool), target="multilabel")
    number = replace(data, labels=np.array([0.5, 0.5000001, 2.0]), classes=("expression",), target="regression")
    assert [(row["class"], row["records"]) for row in statistics(many)["rows"]] == [("a", 2), ("b", 1), ("all", 3)]
    assert [(row["class"], row["records"]) for row in statistics(number)["rows"]] == [("all", 3)]
    for other in (many, number):
        conflict = statistics(other)["conflicts"]["identical"]
        assert conflict == {"groups": 1, "records": 2, "examples": [[0, 1]]}
        plot_statistics(tmp_path / "statistics.png", other)
    titles = [[title for axes in figure.axes if (title := axes.get_title(loc="left"))] for figure in figures]
    assert titles == [["Bases by position: a", "Bases by position: b"], ["Bases by position: all"]]


# Picture


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), save(figure, *a, **k)))
    return saved


def drawn(axes) -> dict[str, list[float]]:
    return {line.get_label(): np.round(line.get_ydata(), 6).tolist() for line in axes.lines}


def test_picture_of_equal_lengths(tmp_path, figures):
    records = [("ACGT", "x$a$"), ("AAGT", "x$a$"), ("ANGT", "x$a$"), ("TTTT", "b")]
    plot_statistics(tmp_path / "statistics.png", labelled(records, ("x$a$", "b", "none")))
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.png"]
    assert min(matplotlib.image.imread(tmp_path / "statistics.png").shape[:2]) > 500
    lengths, gc, first, second = figures[0].axes
    assert [bar.get_height() for bar in lengths.patches] == [3, 1]
    assert "4 bases" in lengths.get_xlabel()
    assert len(gc.patches) == 4
    third = round(100 / 3, 6)
    assert drawn(first) == {
        "A": [100, third, 0, 0],
        "C": [0, third, 0, 0],
        "G": [0, 0, 100, 0],
        "T": [0, 0, 0, 100],
        "N": [0, third, 0, 0],
    }
    assert drawn(second) == {"A": [0] * 4, "C": [0] * 4, "G": [0] * 4, "T": [100] * 4}
    assert first.get_title(loc="left") == r"Bases by position: x\$a\$"


def test_picture_of_both_ends(tmp_path, figures):
    records = [("A" + "C" * 60 + "G", "a"), ("ACG", "a"), ("T" * 90, "b")]
    plot_statistics(tmp_path / "statistics.png", labelled(records, ("a", "b")))
    lengths, _, start, end, _, _ = figures[0].axes
    assert lengths.get_xscale() == "log"
    assert drawn(start)["A"] == [100] + [0] * 49
    assert drawn(start)["C"] == [0, 100, 50] + [100] * 47
    assert drawn(end)["G"] == [0] * 49 + [100]
    assert drawn(end)["A"] == [0] * 47 + [50, 0, 0]
    assert [start.lines[0].get_xdata()[0], end.lines[0].get_xdata()[-1]] == [1, -1]


def test_histograms_hold_every_record(tmp_path, figures):
    rng = np.random.default_rng(0)
    records = [("".join(rng.choice(list("ACGT"), n)), "ab"[n % 2]) for n in rng.integers(50, 500, 300)]
    plot_statistics(tmp_path / "statistics.png", labelled(records, ("a", "b")))
    lengths, gc = figures[0].axes[:2]
    for axes, totals in ((lengths, list(Counter(name for _, name in sorted(records)).values())), (gc, [100, 100])):
        outlines = [patch.get_xy()[:, 1] for patch in axes.patches if not patch.get_fill()]
        edges = [patch.get_xy()[:, 0] for patch in axes.patches if not patch.get_fill()]
        assert len(outlines) == 2
        assert sorted(outline[1::2].sum() for outline in outlines) == pytest.approx(sorted(totals))
        assert all(np.ptp(edge) > 0 for edge in edges)


@pytest.mark.parametrize(
    "records",
    [
        [("", "a")],
        [("N" * 7, "a"), ("", "b")],
        [("ACGT" * 300, "a"), ("TTTT" * 300, "b")],
        [("ACGT" * (i + 1), f"{'long name ' * 3}{i}") for i in range(6)],
        [("ACGT", str(i)) for i in range(30)],
    ],
)
def test_picture_of_odd_data(tmp_path, figures, records):
    classes = tuple(dict.fromkeys(name for _, name in records))
    plot_statistics(tmp_path / "statistics.png", labelled(records, classes))
    assert matplotlib.image.imread(tmp_path / "statistics.png").size > 0
    titles = [title for axes in figures[0].axes if (title := axes.get_title(loc="left"))]
    assert len(titles) == (1 if len(classes) > 6 else len(classes))
