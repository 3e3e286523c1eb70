"""Pictures of a run, as PNG files. Figures are made without pyplot: no window, no state shared between calls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VALID, _OTHERS = "#4878a8", "#d1603d", ("#3d8f5f", "#8a63a6", "#a67c2e", "#607080")
_POINTS = 1500  # more than this along a curve cannot be seen
_MOST_MARKED = 60  # points; with more of them a curve is a line only
_MOST_WRITTEN = 20  # classes; with more of them the numbers in the cells are left out


def plot_confusion(path: str | Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Counts (K, K), true classes in rows, each cell with its share of the row in percent, which also is its colour."""
    from matplotlib.figure import Figure

    matrix = np.asarray(matrix)
    classes = [name.replace("$", r"\$") for name in classes]  # a pair of them would begin a formula
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.divide(100.0 * matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    n, longest = len(classes), max(map(len, classes))
    side = min(14.0, 1.2 + 0.95 * n)  # inches
    figure = Figure(figsize=(side + 1.8, side + 0.4), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, shrink=0.8, label="% of the true class")
    axes.set(xlabel="predicted", ylabel="true", xticks=range(n), yticks=range(n))
    axes.set_xticklabels(classes, rotation=0 if longest * n < 36 else 90)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if n > _MOST_WRITTEN:
        axes.set_yticklabels(classes)
    else:
        axes.set_yticklabels(f"{name}\n(n = {total})" for name, total in zip(classes, totals[:, 0], strict=True))
        _write_cells(axes, matrix, share)
    _save(figure, path)


def _write_cells(axes: Axes, matrix: np.ndarray, share: np.ndarray) -> None:
    for row, column in np.ndindex(*matrix.shape):
        axes.text(
            *(column, row, f"{matrix[row, column]}\n{share[row, column]:.1f} %"),
            ha="center",
            va="center",
            color="white" if share[row, column] > 55 else "black",
            fontsize=10 if len(matrix) <= 8 else 7,
        )


def plot_curves(path: str | Path, log_records: Sequence[dict[str, Any]]) -> None:
    """Curves over steps: losses above, the other validation figures (accuracy, say) below if there are any.

    log_records  a dict a line of the log: `step`, and any of train_loss, valid_loss, valid_<figure>; other keys pass
    """
    from matplotlib.figure import Figure

    figures = list(dict.fromkeys(key for record in log_records for key in record if key.startswith("valid_")))
    figures = [key for key in figures if key != "valid_loss"]
    figure = Figure(figsize=(7.5, 6.5 if figures else 3.6), layout="constrained")
    panels = figure.subplots(2 if figures else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw(panels[0], log_records, "train_loss", "train", _TRAIN)
    _draw(panels[0], log_records, "valid_loss", "valid", _VALID)
    _ring_lowest(panels[0], log_records, "valid_loss")
    panels[0].set_ylabel("loss")
    for key, colour in zip(figures, cycle([_VALID, *_OTHERS])):
        _draw(panels[1], log_records, key, key.replace("_", " "), colour)
        panels[1].set_ylabel("validation")
    panels[-1].set_xlabel("step")
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.has_data():
            axes.legend(frameon=False)
    _save(figure, path)


def _points(log_records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of each record that has the key."""
    return [(record["step"], record[key]) for record in log_records if record.get(key) is not None]


def _draw(axes: Axes, log_records: Sequence[dict[str, Any]], key: str, label: str, colour: str) -> None:
    points = _points(log_records, key)
    if points:
        thinned = points[:: -(-len(points) // _POINTS)]
        marker = "o" if len(points) <= _MOST_MARKED else ""
        axes.plot(*zip(*thinned, strict=True), color=colour, label=label, marker=marker, markersize=3, linewidth=1.4)


def _ring_lowest(axes: Axes, log_records: Sequence[dict[str, Any]], key: str) -> None:
    points = _points(log_records, key)
    if points:
        step, value = min(points, key=lambda point: point[1])
        label = f"lowest: {value:.4g} at step {step}"
        axes.plot(step, value, "o", color=_VALID, markersize=9, fillstyle="none", linestyle="", label=label)


def _save(figure: Figure, path: str | Path) -> None:
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=130, bbox_inches="tight", pad_inches=0.15)
