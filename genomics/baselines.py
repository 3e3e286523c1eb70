"""What counting makes of DNA, in bits per base: what a language model's figures are to be compared with.

order n   a base from the n before it: counts in the train part, interpolated with order n - 1 and so on down to order 0
          after Witten and Bell (1991), a context's weight for it being how many bases differ after it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .alphabet import A, T
from .parts import Stretch
from .reading.genome import Genome

ORDER = 11  # its 4^12 counts take 134 MB
_PIECE = 1 << 24  # bases counted at a time: the table is gone over once for each


def order_bits(
    genome: Genome,
    train: Sequence[Stretch],
    test: Sequence[Stretch],
    order: int = ORDER,
    *,
    advance: Callable[[int], object] = lambda n: None,
) -> list[float]:
    """Bits per base of the test stretches by the models of orders 0, 1, ..., `order`.

    At a stretch's start, and after an N, a base is predicted from the fewer ones that stand before it there.
    """
    counts = np.zeros(4 ** (order + 1), dtype=np.int64)
    for codes, n_known in _pieces(genome, train, order, advance):
        counts += np.bincount(_grams(codes, np.flatnonzero(n_known > order), order), minlength=len(counts))
    tables = _probabilities(counts, order)
    bits, n_bases = np.zeros(order + 1), 0
    for codes, n_known in _pieces(genome, test, order, advance):
        p = np.empty(len(codes))
        scored = n_known > 0
        for n, table in enumerate(tables):
            known = np.flatnonzero(n_known > n)
            p[known] = table[_grams(codes, known, n)]
            bits[n] -= np.log2(p[scored]).sum()
        n_bases += int(scored.sum())
    return (bits / max(n_bases, 1)).tolist()


def _pieces(
    genome: Genome, stretches: Sequence[Stretch], order: int, advance: Callable[[int], object]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes 0 to 3 of the bases, int64 (n,), and how many known ones end with each, itself included; 0 for N.

    Pieces of a stretch overlap by `order` bases, which count as unknown where they come again, but are context.
    """
    for stretch in stretches:
        for start in range(stretch.start, stretch.end, _PIECE):
            before = min(order, start - stretch.start)
            tokens, _ = genome.tokens(stretch.contig, start - before, min(start + _PIECE, stretch.end))
            places = np.arange(len(tokens))
            unknown = (tokens < A) | (tokens > T)
            n_known = places - np.maximum.accumulate(np.where(unknown, places, -1))
            n_known[:before] = 0
            yield np.where(unknown, 0, tokens.astype(np.int64) - A), n_known
            advance(len(tokens) - before)


def _grams(codes: np.ndarray, places: np.ndarray, n: int) -> np.ndarray:
    """The bases at these places with the n before each, as numbers in base 4."""
    grams = np.zeros(len(places), dtype=np.int64)
    for i in range(n, -1, -1):
        grams = grams * 4 + codes[places - i]
    return grams


def _probabilities(counts: np.ndarray, order: int) -> list[np.ndarray]:
    """For each order n from 0, the probability of each base after each context, (4^(n + 1),); counts are of `order`."""
    table = np.full((1, 4), 0.25)
    tables = []
    for n in range(order + 1):
        of_order = counts.reshape(4 ** (order - n), 4**n, 4).sum(0)  # whatever stood farther back
        seen, different = of_order.sum(1, keepdims=True), (of_order > 0).sum(1, keepdims=True)
        # A context without its first base is the row of the lower order: row number modulo 4^(n - 1).
        lower = np.tile(table, (4**n // len(table), 1))
        with np.errstate(invalid="ignore"):
            table = np.where(seen > 0, (of_order + different * lower) / (seen + different), lower)
        tables.append(table.ravel())
    return tables
