"""From records of variants to what a model is asked: which alleles can be scored, and why others cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..core.errors import InputError
from .alphabet import N, tokenize
from .reading.chromosomes import match_names
from .reading.genome import Genome
from .reading.vcf import Variant
from .variant_effects import Site, flank

REASONS = {
    "NO_CONTIG": "the genome has no such contig, or more than one",
    "OUTSIDE": "not within the contig",
    "REF_MISMATCH": "REF is not what the genome has there",
    "N_CONTEXT": "too much of the genome around it is N",
    "AMBIGUOUS": "N or another ambiguity code in an allele",
    "SYMBOLIC": "no bases, but <...>, * or a breakend",
    "TOO_LONG": "an allele is longer than half of the window",
    "SAME": "the allele is REF",
}
CHUNK = 4096  # records held at a time

_BASES = re.compile("[ACGTNURYSWKMBDHV]+", re.IGNORECASE)
_PLAIN = re.compile("[ACGTU]+", re.IGNORECASE)


class Question(NamedTuple):
    """What is asked of a record: a site with REF and those alleles that can be scored, if any."""

    site: Site | None
    reasons: list[str]  # of each alternative allele; "" for those of the site


class Asker:
    """Looks records up in a genome."""

    def __init__(self, genome: Genome, window: int, max_n: float):
        self.genome, self.flank, self.max_n = genome, flank(window), max_n
        self._numbers: dict[str, list[int]] = {}
        for i, contig in enumerate(genome.contigs):
            self._numbers.setdefault(contig.name, []).append(i)
        self.contig_of = lru_cache(maxsize=None)(self._contig_of)

    def _contig_of(self, name: str) -> int | None:
        """The number of the contig that a name means, as of match_names; None if it means none, or two files' ones."""
        try:
            match = match_names({name: ""}, self._numbers)[name]
        except InputError:
            return None
        return self._numbers[match][0] if len(self._numbers[match]) == 1 else None

    def question(self, variant: Variant) -> Question:
        alternatives = variant.alternatives
        site, reason = self._site(variant)
        if site is None:
            return Question(None, [reason] * len(alternatives))
        reasons = [self._reason(allele, variant.reference) for allele in alternatives]
        site.alleles.extend(tokenize(a) for a, reason in zip(alternatives, reasons, strict=True) if not reason)
        return Question(site if len(site.alleles) > 1 else None, reasons)

    def _site(self, variant: Variant) -> tuple[Site | None, str]:
        """The site of a record with REF alone; or why there is none."""
        reference, start = variant.reference, variant.position
        contig = self.contig_of(variant.chromosome)
        if contig is None:
            return None, "NO_CONTIG"
        end, length = start + len(reference), self.genome.contigs[contig].length
        if start < 0 or end > length:
            return None, "OUTSIDE"
        if len(reference) > self.flank:
            return None, "TOO_LONG"
        first = max(0, start - self.flank)
        tokens, _ = self.genome.tokens(contig, first, min(length, end + self.flank))
        there = tokens[start - first : end - first]
        if not _PLAIN.fullmatch(reference):
            return None, "AMBIGUOUS"
        if (there == N).any():
            return None, "N_CONTEXT"
        if not np.array_equal(there, tokenize(reference)):
            return None, "REF_MISMATCH"
        if np.mean(tokens == N) > self.max_n:
            return None, "N_CONTEXT"
        return Site(tokens[: start - first], tokens[end - first :], [there]), ""

    def _reason(self, allele: str, reference: str) -> str:
        if not _BASES.fullmatch(allele):
            return "SYMBOLIC"
        if not _PLAIN.fullmatch(allele):
            return "AMBIGUOUS"
        if allele.upper() == reference.upper():
            return "SAME"
        return "TOO_LONG" if len(allele) > self.flank else ""


class Scored(NamedTuple):
    """A record, and of each alternative allele its LLR, nan for those with a reason."""

    variant: Variant
    llrs: np.ndarray
    reasons: list[str]


def score_variants(
    variants: Iterator[Variant], asker: Asker, of_sites: Callable[[list[Site]], Sequence[np.ndarray]]
) -> Iterator[Scored]:
    """Every record in its order. of_sites: sites -> of each the LLR of its alleles but the first."""
    while chunk := list(islice(variants, CHUNK)):
        questions = [asker.question(variant) for variant in chunk]
        answers = iter(of_sites([question.site for question in questions if question.site is not None]))
        for variant, (site, reasons) in zip(chunk, questions, strict=True):
            found = np.full(len(reasons), np.nan)
            if site is not None:
                found[[not reason for reason in reasons]] = next(answers)
            yield Scored(variant, found, reasons)


def header_lines(tag: str, what: str) -> list[str]:
    """What a VCF header says of the entries of `info_entries`. what: how the LLRs were made, in words."""
    llr = f"ln P(allele) - ln P(REF) {what}".replace("\\", "/").replace('"', "'")
    why = "why the allele has no LLR: " + "; ".join(f"{name} ({words})" for name, words in REASONS.items())
    return [
        f'##INFO=<ID={tag}_LLR,Number=A,Type=Float,Description="{llr}">',
        f'##INFO=<ID={tag}_WHY,Number=A,Type=String,Description="{why}">',
    ]


def info_entries(tag: str, scored: Scored) -> list[str]:
    """INFO entries of a record: one where an allele was scored, one where an allele was not."""
    entries = []
    if not np.isnan(scored.llrs).all():
        entries.append(f"{tag}_LLR=" + ",".join("." if np.isnan(x) else f"{x:.6g}" for x in scored.llrs.tolist()))
    if any(scored.reasons):
        entries.append(f"{tag}_WHY=" + ",".join(reason or "." for reason in scored.reasons))
    return entries
