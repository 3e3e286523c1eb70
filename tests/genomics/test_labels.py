"""Labels of variants, wherever they stand, and what is measured against them."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from polymamba.core.errors import InputError
from polymamba.genomics.labels import Labels, measure
from polymamba.genomics.reading.vcf import Variant


def variant(info: str, alternatives: str = "C,G") -> Variant:
    return Variant(["chr1", "5", ".", "a", alternatives, ".", ".", info], 9)


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        ("L=1,0", [True, False]),
        ("L=bad,.", [True, None]),
        ("X=1;L=1", [True, True]),
        ("L=0", [False, False]),
        ("L=.", [None, None]),
        ("LL=1", [None, None]),
        (".", [None, None]),
        ("L=1,1,0", [False, False]),  # one value, of the record, that is no positive one
    ],
)
def test_an_info_entry(info, wanted):
    assert Labels("L", None, ["1", "bad"]).of(variant(info)) == wanted


def test_a_flag():
    labels = Labels("L", None, [], is_flag=True)
    assert labels.of(variant("A=1;L")) == [True, True]
    assert labels.of(variant("A=1")) == [False, False]
    assert labels.of(variant("L", ".")) == []


def test_a_table(tmp_path):
    path = tmp_path / "labels.tsv"
    path.write_text("label\tchrom\tpos\tref\talt\nbad\tchr1\t5\tA\tc\ngood\tchr1\t5\tA\tT\n")
    labels = Labels(None, path, ["bad"])
    assert labels.of(variant(".")) == [True, None]
    assert labels.of(variant(".", "T")) == [False]
    path.write_text(path.read_text() + "good\tchr1\t5\ta\tC\n")
    with pytest.raises(InputError, match=r"labels.tsv, line 4: a second label of chr1:5:A:C; give each allele one"):
        Labels(None, path, ["bad"])
    path.write_text("label\tchrom\tpos\tref\n1\tchr1\t5\tA\n")
    with pytest.raises(InputError, match="no column for the alt"):
        Labels(None, path, ["bad"])


def test_figures_are_scikit_learns():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.3
    llrs = rng.normal(size=300).round(1) - truth
    found = measure(truth, llrs, 0)
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(truth, -llrs))
    assert found["auprc"]["value"] == pytest.approx(average_precision_score(truth, -llrs))
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]
    assert (found["n"], found["n_positive"]) == (300, truth.sum())
    assert measure(truth, llrs + 2 * truth, 0)["auroc"]["value"] < 0.5, "a wrong direction is not turned round"


@pytest.mark.parametrize("truth", [[], [True], [False, False]])
def test_one_kind_of_label(truth):
    with pytest.raises(InputError, match="both kinds are needed to measure; see --positive"):
        measure(np.array(truth, bool), np.zeros(len(truth)), 0)
