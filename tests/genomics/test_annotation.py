"""Labels of single bases from region files, and figures that add up."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.core.metrics import classification_metrics, multilabel_metrics, regression_metrics
from polymamba.genomics.annotation import Annotation, read_annotation
from polymamba.genomics.annotation_metrics import MOST_UNITS, BaseFigures
from polymamba.genomics.reading.genome import Genome

LENGTHS = {"chr1": 120, "chr2": 50}


@pytest.fixture(scope="module")
def fasta(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    path.write_text("".join(f">{name}\n{'ACGTN' * (n // 5)}\n" for name, n in LENGTHS.items()))
    return path


def read(fasta: Path, files: dict[str, str], target="multiclass", classes=(), **options) -> Annotation:
    for name, text in files.items():
        (fasta.parent / name).write_text(text)
    with Genome([fasta]) as genome:
        return read_annotation([fasta.parent / name for name in files], genome, target, classes, **options)


def refusal(*args, **options) -> str:
    with pytest.raises(InputError) as error:
        read(*args, **options)
    return str(error.value)


regions = st.lists(
    st.tuples(st.sampled_from(["1", "chr2"]), st.integers(0, 49), st.integers(1, 20), st.sampled_from("abc")),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(regions=regions, start=st.integers(0, 40), size=st.integers(1, 10))
def test_labels_are_those_of_the_regions(fasta, regions, start, size):
    spans = [(name, at, min(at + n, 50), label) for name, at, n, label in regions]
    bed = "".join("\t".join(map(str, row)) + "\n" for row in spans)
    there = sorted({label for *_, label in spans})
    both = read(fasta, {"r.bed": bed}, "multilabel")
    ranked = read(fasta, {"r.bed": bed}, "multiclass", there[::-1])
    assert both.classes == tuple(there)
    assert ranked.classes == ("none", *there[::-1])
    for contig, name in enumerate(LENGTHS):
        of_base = [
            {label for chromosome, first, end, label in spans if chromosome[-1] == name[-1] and first <= at < end}
            for at in range(start, start + size)
        ]
        assert both.of(contig, start, start + size).tolist() == [[k in labels for k in there] for labels in of_base]
        found = [ranked.classes[k] for k in ranked.of(contig, start, start + size)]
        assert found == [max(labels, default="none") for labels in of_base]


def test_values_of_a_bedgraph(fasta):
    text = "track type=bedGraph name=x\nchr1\t3\t5\t-1.5\nchr1\t5\t6\t2\nchr9\t0\t9\t7\n"
    found = read(fasta, {"v.bedgraph": text}, "regression")
    assert found.n_skipped == 1
    np.testing.assert_equal(found.of(0, 2, 8), [np.nan, -1.5, -1.5, 2, np.nan, np.nan])
    assert np.isnan(found.of(1, 0, 50)).all()
    assert "overlaps the region of line 1" in refusal(fasta, {"v.bdg": "chr1 0 9 1\nchr1 8 10 2\n"}, "regression")
    assert "'x' is no finite number" in refusal(fasta, {"v.bdg": "chr1 0 9 x\n"}, "regression")


def test_classes_are_features_or_files(fasta):
    gff = "chr1\t.\texon\t3\t4\t.\t-\t.\tID=1\nchr1\t.\tgene\t1\t9\t.\t-\t.\tID=2\n"
    found = read(fasta, {"a.gff": gff}, "multiclass", ("exon", "gene"), stranded=True)
    assert found.classes == ("none", "exon(+)", "exon(-)", "gene(+)", "gene(-)")
    assert found.of(0, 0, 10).tolist() == [4, 4, 2, 2, 4, 4, 4, 4, 4, 0]
    of_files = read(fasta, {"donors.bed": "chr1 0 1\n", "acceptors.bed": "chr1 4 5\n"})
    assert of_files.classes == ("none", "acceptors", "donors")
    assert of_files.of(0, 0, 6).tolist() == [2, 0, 0, 0, 1, 0]


def test_errors(fasta):
    assert "overlaps 'a' of line 1; say by --classes" in refusal(fasta, {"r.bed": "chr1 0 9 a\nchr1 8 10 b\n"})
    assert "line 2: ends at 121" in refusal(fasta, {"r.bed": "chr1 0 9 a\nchr1 8 121 a\n"})
    assert "no region is on a chromosome of the genome; they are on chr7" in refusal(fasta, {"r.bed": "chr7 0 9 a\n"})
    assert "no strand" in refusal(fasta, {"r.bed": "chr1 0 9 a\n"}, stranded=True)


# Figures


def units(rng: np.random.Generator, n: int) -> list[slice]:
    edges = np.unique(np.concatenate(([0, n], rng.integers(n, size=9))))
    return [slice(a, b) for a, b in pairwise(edges)]


def test_figures_equal_those_of_all_bases():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=4000)
    p = rng.dirichlet([0.5] * 3, 4000) * 0.5 + 0.5 * np.eye(3)[np.where(rng.random(4000) < 0.4, labels, 0)]
    figures = BaseFigures(("none", "a", "b"), "multiclass")
    for part in units(rng, 4000):
        figures.add(0, p[part], labels[part])
    found = figures.metrics(0, n_bootstrap=20)
    expected = classification_metrics(labels, p, ("none", "a", "b"), n_bootstrap=2)
    for name in ("accuracy", "balanced_accuracy", "mcc", "macro_f1", "auroc", "auprc"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"], abs=3e-3 if name[:2] == "au" else 1e-12)
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["confusion"] == expected["confusion"]
    assert found["support"] == expected["support"]
    for name, row in expected["per_class"].items():
        assert found["per_class"][name] == pytest.approx(row, abs=3e-3)


def test_figures_of_labels():
    rng = np.random.default_rng(1)
    truth = rng.random((3000, 2)) < (0.3, 0.05)
    p = np.clip(rng.random((3000, 2)) * 0.7 + 0.3 * truth, 0, 1)
    figures = BaseFigures(("a", "b"), "multilabel")
    for part in units(rng, 3000):
        figures.add(0, p[part], truth[part])
    found, expected = figures.metrics(0, n_bootstrap=5), multilabel_metrics(truth, p, ("a", "b"), n_bootstrap=2)
    for name in ("exact_match", "micro_f1", "macro_f1", "auroc", "auprc"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"], abs=5e-3 if name[:2] == "au" else 1e-12)
    assert found["per_label"]["b"]["recall"] == pytest.approx(expected["per_label"]["b"]["recall"])


def test_figures_of_values():
    rng = np.random.default_rng(2)
    truth = rng.normal(3, 2, 500)
    p = truth + rng.normal(0, 1, 500)
    figures = BaseFigures(("value",), "regression")
    for part in units(rng, 500):
        figures.add(0, p[part, None], truth[part])
    found, expected = figures.metrics(0, n_bootstrap=5), regression_metrics(truth, p, n_bootstrap=2)
    for name in ("pearson", "r2", "rmse", "mae"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"]), name


def test_many_units_are_joined_and_lose_nothing():
    rng = np.random.default_rng(3)
    figures = BaseFigures(("none", "a"), "multiclass")
    n = 3 * MOST_UNITS + 7
    labels = rng.integers(2, size=(n, 2))
    for i, of_unit in enumerate(labels):
        figures.add(i * 3 // n, np.array([[0.6, 0.4]] * 2), of_unit)
    found = figures.metrics(0, n_bootstrap=2)
    assert found["bases"] == 2 * n
    assert found["n"] <= MOST_UNITS
    assert found["n_records"] == 3
    assert found["confusion"] == [[int((labels == 0).sum()), 0], [int((labels == 1).sum()), 0]]
