"""Labels of variants, and how well scores tell them apart: no threshold is chosen, no direction is turned round.

A variant is expected to be positive (harmful, say) where its allele is less likely than the reference: the score is
-LLR, as it is. Variants without a label, or without a score, do not count; how many these are is said.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ..core.bootstrap import Ranking, Resampling, with_intervals
from ..core.errors import InputError
from .reading.tables import read_table
from .reading.vcf import Variant

NO_LABEL = "."
_COLUMNS = {
    "chrom": ("chrom", "chr", "chromosome"),
    "pos": ("pos", "position"),
    "ref": ("ref", "reference"),
    "alt": ("alt", "alternative", "alternate"),
    "label": ("label", "class", "target"),
}


class Labels:
    """The label of each allele: True, False, or None without one.

    field      an INFO entry, with a value for the record or one for each allele
    is_flag    that has no value: True where it stands, and else False
    table      a TSV or CSV table with columns chrom, pos (from 1), ref, alt and label
    positive   which values mean True
    """

    def __init__(self, field: str | None, table: Path | None, positive: Collection[str], *, is_flag: bool = False):
        self.field, self.positive, self.is_flag = field, set(positive), is_flag
        self.rows: dict[tuple[str, str, str, str], str] = {}
        if table is not None:
            for line, cells in read_table(table, _COLUMNS, required=_COLUMNS):
                key = cells["chrom"], cells["pos"], cells["ref"].upper(), cells["alt"].upper()
                if self.rows.setdefault(key, cells["label"]) != cells["label"]:
                    raise InputError(f"{table}, line {line}: a second label of {':'.join(key)}; give each allele one")

    def of(self, variant: Variant) -> list[bool | None]:
        alternatives = variant.alternatives
        if self.field is None:
            place = variant.chromosome, variant.cells[1], variant.reference.upper()
            words = [self.rows.get((*place, allele.upper()), NO_LABEL) for allele in alternatives]
            return [self._meaning(word) for word in words]
        value = variant.info(self.field)
        if self.is_flag:
            return [value is not None] * len(alternatives)
        words = [NO_LABEL] if value is None else value.split(",")
        if len(words) != len(alternatives):  # of the record
            words = [value or NO_LABEL] * len(alternatives)
        return [self._meaning(word) for word in words]

    def _meaning(self, word: str) -> bool | None:
        return None if word == NO_LABEL else word in self.positive


def measure(truth: np.ndarray, llrs: np.ndarray, seed: int) -> dict[str, Any]:
    """AUROC and AUPRC of -LLR (n,) against labels bool (n,), with intervals over alleles.

    Raises InputError unless both kinds of labels are there.
    """
    n_positive = int(truth.sum())
    if not 0 < n_positive < len(truth):
        raise InputError(
            f"labels: of {len(truth)} scored alleles with a label {n_positive} are positive; both kinds are needed to "
            "measure; see --positive"
        )
    ranking = Ranking(truth, -llrs)

    def figures(times: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(("auroc", "auprc"), ranking(times), strict=True))

    found = with_intervals(figures, Resampling(np.arange(len(truth))), 1000, seed, 0.95)
    return {"n": len(truth), "n_positive": n_positive, "confidence": 0.95, **found}
