"""What labelled DNA is made of: lengths, bases, copies and contradictory labels, as figures, a table and a picture.

Lengths are in bases. Composition counts both strands' letters as given, not either strand; the GC share leaves N out.
Letter case is not known here: soft-masking is lost when sequences become tokens (alphabet.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.plots import plain, save_figure
from .alphabet import VOCAB_SIZE, A, C, G, N, T
from .dataset import LabelledSequences
from .splits import group_numbers, sequence_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

_LETTERS = {"A": A, "C": C, "G": G, "T": T, "N": N}
_EXAMPLES = 3


# Figures


def statistics(data: LabelledSequences) -> dict[str, Any]:
    """A row of figures for each class and one for all, and the labels that contradict each other; JSON-safe.

    rows       class, records, bases, shortest, median, longest; n50: sequences of this length or longer hold half of
               the bases; composition: share of A, C, G, T, N in the bases; gc: share of G and C in those that are no N;
               with_N: records with an N; copies: records beyond the first of each sequence; reverse_complements:
               distinct sequences beyond the first of each molecule. What has no value (the gc of no bases) is None
    conflicts  identical, reverse_complement: sequences, and molecules read from opposite strands, that have several
               labels: how many `groups`, of how many `records`, and up to three `examples`, two records each
    """
    exact = group_numbers([ids.tobytes() for ids in data.tokens])
    molecules = group_numbers(sequence_keys(data.tokens))
    counts = _letter_counts(data.tokens)
    chosen = [*data.members().items(), ("all", np.ones(len(data.tokens), dtype=bool))]
    rows = [
        {
            "class": name,
            **_lengths(counts[mask].sum(axis=1)),
            **_bases(counts[mask]),
            **_copies(exact[mask], molecules[mask]),
        }
        for name, mask in chosen
    ]
    labels = np.unique(data.labels, axis=0, return_inverse=True)[1].ravel()  # of whatever kind, numbered
    return {"rows": rows, "conflicts": _conflicts(exact, molecules, labels)}


def _letter_counts(tokens: Sequence[np.ndarray]) -> np.ndarray:
    """How many A, C, G, T, N each sequence holds, int64 (n, 5)."""
    counts = np.zeros((len(tokens), len(_LETTERS)), dtype=np.int64)
    for row, ids in zip(counts, tokens, strict=True):
        row[:] = np.bincount(ids, minlength=VOCAB_SIZE)[list(_LETTERS.values())]
    return counts


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    if not len(lengths):
        return {"records": 0, "bases": 0, "shortest": None, "median": None, "longest": None, "n50": None}
    longest_first = np.sort(lengths)[::-1]
    covered = np.cumsum(longest_first)
    return {
        "records": len(lengths),
        "bases": int(covered[-1]),
        "shortest": int(longest_first[-1]),
        "median": float(np.median(lengths)),
        "longest": int(longest_first[0]),
        "n50": int(longest_first[np.searchsorted(covered, covered[-1] / 2)]),
    }


def _bases(counts: np.ndarray) -> dict[str, Any]:
    """`counts` (n, 5), from `_letter_counts`."""
    total = counts.sum(axis=0)
    of = dict(zip(_LETTERS, total.tolist(), strict=True))
    return {
        "composition": {letter: _share(n, sum(of.values())) for letter, n in of.items()},
        "gc": _share(of["G"] + of["C"], sum(of.values()) - of["N"]),
        "with_N": int((counts[:, -1] > 0).sum()),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _copies(exact: np.ndarray, molecules: np.ndarray) -> dict[str, int]:
    distinct = len(np.unique(exact))
    return {"copies": len(exact) - distinct, "reverse_complements": distinct - len(np.unique(molecules))}


def _conflicts(exact: np.ndarray, molecules: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, Any]]:
    """A record is counted once: as identical if its very sequence has another label elsewhere."""
    identical = _has_several_labels(exact, labels)
    either = _has_several_labels(molecules, labels) & ~identical
    return {
        "identical": _conflict(exact, labels, identical),
        "reverse_complement": _conflict(molecules, labels, either),
    }


def _has_several_labels(groups: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the group of each record holds records with different labels, bool (n,)."""
    of_group = np.unique(np.stack([groups, labels], axis=1), axis=0)[:, 0]
    return np.bincount(of_group, minlength=len(groups))[groups] > 1


def _conflict(groups: np.ndarray, labels: np.ndarray, concerned: np.ndarray) -> dict[str, Any]:
    records = np.flatnonzero(concerned)
    ids, first = np.unique(groups[records], return_index=True)
    examples = []
    for record in sorted(records[first].tolist())[:_EXAMPLES]:
        others = np.flatnonzero((groups == groups[record]) & (labels != labels[record]))
        examples.append([record, int(others[0])])
    return {"groups": len(ids), "records": len(records), "examples": examples}


def describe_statistics(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    """The figures of `statistics` as a table to print, with `names` (n) of the records in its examples."""
    table = [["class", "records", "bases", "shortest", "median", "longest", "N50", *(f"{x} %" for x in _LETTERS)]]
    table[0] += ["GC %", "with N", "copies", "rev. compl."]
    for row in figures["rows"]:
        lengths = [row[key] for key in ("records", "bases", "shortest", "median", "longest", "n50")]
        shares = [*row["composition"].values(), row["gc"]]
        table.append(
            [
                row["class"],
                *("-" if n is None else f"{n:.10g}" for n in lengths),
                *("-" if share is None else f"{100 * share:.1f}" for share in shares),
                *(str(row[key]) for key in ("with_N", "copies", "reverse_complements")),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    for kind, what in (("identical", "same sequence"), ("reverse_complement", "opposite strands of one molecule")):
        found = figures["conflicts"][kind]
        if found["groups"]:
            shown = ", ".join(f"{names[one]} / {names[other]}" for one, other in found["examples"])
            lines.append(f"{what}, different labels: {found['groups']}, of {found['records']} records: {shown}")
    return "\n".join(lines)


# Picture

_CLASS_COLOURS = ("#4878a8", "#d1603d", "#3d8f5f", "#8a63a6", "#a67c2e", "#607080")
_BASE_COLOURS = {"A": "#3d8f5f", "C": "#4878a8", "G": "#d9a02b", "T": "#c8442f", "N": "#9a9a9a"}  # as in sequence logos
_WIDE = 20  # longest by shortest: from here on lengths are drawn on a logarithmic scale
_WINDOW = 1000  # bases; sequences of one length up to this are drawn along all of it
_END = 50  # bases drawn at either end of other ones
_BINS = 40


def plot_statistics(path: str | Path, data: LabelledSequences) -> None:
    """Draw lengths and GC shares by class, and the frequency of each base by position, as a PNG file.

    Positions run along the whole sequence if all have one length, of 1,000 bases at most; else along the first and the
    last 50 bases. Beyond six classes they are drawn as one.
    """
    from matplotlib.figure import Figure

    groups = {name: [data.tokens[i] for i in np.flatnonzero(mask)] for name, mask in data.members().items()}
    groups = {name: tokens for name, tokens in groups.items() if tokens}
    if not 0 < len(groups) <= len(_CLASS_COLOURS):
        groups = {"all": data.tokens}
    groups = {plain(name): tokens for name, tokens in groups.items()}

    heights = (3.4, 0.3 + 1.9 * len(groups))  # inches
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    rows = figure.add_gridspec(2, 1, height_ratios=heights)
    top = figure.add_subfigure(rows[0])
    lengths, gc = top.subplots(1, 2)
    _draw_lengths(lengths, {name: np.array([len(ids) for ids in tokens]) for name, tokens in groups.items()})
    _draw_gc(gc, groups)
    top.legend(
        *gc.get_legend_handles_labels(),
        loc="outside upper center",
        ncols=min(3, len(groups)),
        frameon=False,
        fontsize=9,
    )
    _draw_positions(figure.add_subfigure(rows[1]), groups)
    save_figure(figure, path, tight=True)


def _draw_lengths(axes: Axes, lengths: Mapping[str, np.ndarray]) -> None:
    """Records of each class by length; if all have one length, bars of how many records each class has."""
    shortest, longest = min(map(np.min, lengths.values())), max(map(np.max, lengths.values()))
    axes.set(title="Lengths", ylabel="records")
    axes.spines[["top", "right"]].set_visible(False)
    if shortest == longest:
        bars = axes.bar(list(lengths), list(map(len, lengths.values())), width=0.6, color=_CLASS_COLOURS)
        axes.bar_label(bars, fontsize=9)
        axes.set_xticks([])  # the colours say which class it is: long names would overlap
        axes.set_xlabel(f"all sequences have {longest:,} bases")
        return
    if longest >= _WIDE * max(1, shortest):
        edges = np.geomspace(max(1, shortest), longest + 1, _BINS + 1)
        axes.set_xscale("log")
    else:
        step = -(-(longest - shortest + 1) // _BINS)  # whole bases: else some bins hold more lengths than others
        edges = np.arange(shortest, longest + step + 1, step) - 0.5
    _draw_histogram(axes, lengths, edges)
    axes.set_xlabel("length (bases)")


def _draw_gc(axes: Axes, groups: Mapping[str, Sequence[np.ndarray]]) -> None:
    """How the GC shares of each class's sequences are distributed, in percent of the class's records."""
    shares = {name: _gc_percent(_letter_counts(tokens)) for name, tokens in groups.items()}
    weights = {name: np.full(len(gc), 100 / max(1, len(gc))) for name, gc in shares.items()}
    lengths = {len(ids) for tokens in groups.values() for ids in tokens}
    finest = max(1, *lengths) if len(lengths) == 1 else _BINS  # GC counts are whole numbers; so are the bins' widths
    step = -(-finest // _BINS)
    _draw_histogram(axes, shares, (np.arange(0, finest + step + 1, step) - 0.5) * 100 / finest, weights)
    axes.set(title="GC share", xlabel="G and C in the bases of a sequence (%)", ylabel="% of the class's records")
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)


def _gc_percent(counts: np.ndarray) -> np.ndarray:
    """The GC share of each sequence, from `_letter_counts` (n, 5); sequences of nothing but N are left out."""
    strong, called = counts[:, 1] + counts[:, 2], counts[:, :4].sum(axis=1)
    return 100 * strong[called > 0] / called[called > 0]


def _draw_histogram(
    axes: Axes,
    values: Mapping[str, np.ndarray],
    edges: np.ndarray,
    weights: Mapping[str, np.ndarray] | None = None,
) -> None:
    for (name, given), colour in zip(values.items(), _CLASS_COLOURS, strict=False):
        style = {"bins": edges, "weights": weights and weights[name], "color": colour}
        axes.hist(given, **style, histtype="stepfilled", alpha=0.15)
        axes.hist(given, **style, histtype="step", linewidth=1.4, label=name)


def _draw_positions(figure: SubFigure, groups: Mapping[str, Sequence[np.ndarray]]) -> None:
    """A row of panels for each class: the share of each base at each position, from the start, or at either end."""
    lengths = {len(ids) for tokens in groups.values() for ids in tokens}
    whole = len(lengths) == 1 and max(lengths) <= _WINDOW
    width = max(1, *lengths) if whole else _END
    panels = figure.subplots(len(groups), 1 if whole else 2, sharex="col", sharey=True, squeeze=False)
    for row, (name, tokens) in zip(panels, groups.items(), strict=True):
        for axes, from_end in zip(row, (False, True), strict=False):
            _draw_bases(axes, _position_shares(tokens, width, from_end=from_end), from_end=from_end)
        row[0].set_title(f"Bases by position: {name}", loc="left", fontsize=9)
        row[0].set_ylabel("% of records", fontsize=9)
    panels[-1, 0].set_xlabel("position (1 is the first base)")
    if not whole:
        panels[-1, 1].set_xlabel("position (−1 is the last base)")
    handles = {line.get_label(): line for axes in panels.flat for line in axes.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)


def _position_shares(tokens: Sequence[np.ndarray], width: int, *, from_end: bool) -> np.ndarray:
    """In percent of the sequences that reach so far, how many have each letter at each of `width` positions (5, width).

    Counted from the first base, or, from_end, up to the last one. NaN where no sequence reaches.
    """
    counts = np.zeros((VOCAB_SIZE, width), dtype=np.int64)
    for ids in tokens:
        end = ids[-width:] if from_end else ids[:width]
        at = np.arange(width - len(end), width) if from_end else np.arange(len(end))
        counts[end, at] += 1
    letters = counts[list(_LETTERS.values())]
    reached = letters.sum(axis=0)
    return np.divide(100.0 * letters, reached, out=np.full(letters.shape, np.nan), where=reached > 0)


def _draw_bases(axes: Axes, shares: np.ndarray, *, from_end: bool) -> None:
    """`shares` (5, width), from `_position_shares`; N is drawn only where there is one."""
    width = shares.shape[1]
    positions = np.arange(-width, 0) if from_end else np.arange(1, width + 1)
    for (letter, colour), share in zip(_BASE_COLOURS.items(), shares, strict=True):
        if letter != "N" or np.nanmax(share, initial=0) > 0:
            axes.plot(positions, share, color=colour, label=letter, linewidth=1.3)
    axes.set_xlim(positions[0] - 0.5, positions[-1] + 0.5)
    axes.set_ylim(0, None)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
