"""Pictures of a run, as PNG files. Figures are made without pyplot: no window, no state shared between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .files import written_whole
from .thresholds import one_against_rest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _VALID, _OTHERS = "#4878a8", "#d1603d", ("#3d8f5f", "#8a63a6", "#a67c2e", "#607080")
_POINTS = 1500  # more than this along a curve cannot be seen
_MOST_MARKED = 60  # points; with more of them a curve is a line only
_MOST_WRITTEN = 20  # classes; with more of them the numbers in the cells are left out
_MOST_INSIDE = 6  # lines of a legend; with more of them it stands beside the axes
_LONGEST_INSIDE = 24  # characters of a class's name; with more of them too
_COLUMN = 26  # lines of a legend in one column beside the axes
_MOST_DOTS = 3000  # records; more of them are counted in hexagons
_GREY = "#888888"

_Curve = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, float]]  # truth, scores -> x, y, area


def plot_confusion(path: str | Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Counts (K, K), true classes in rows, each cell with its share of the row in percent, which also is its colour."""
    from matplotlib.figure import Figure

    matrix = np.asarray(matrix)
    classes = [plain(name) for name in classes]
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
    save_figure(figure, path, tight=True)


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
    save_figure(figure, path, tight=True)


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


def plot_roc(path: str | Path, truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> None:
    """ROC curves of probabilities (n, K), each class against the rest, with AUROC in the legend.

    truth  class indices (n,), or flags (n, K) for labels that are independent; of two classes only the second is drawn
    """

    def curve(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        from sklearn.metrics import auc, roc_curve

        false_rate, true_rate, _ = roc_curve(truth, scores)
        return false_rate, true_rate, float(auc(false_rate, true_rate))

    figure, axes = _unit_square("false positive rate", "true positive rate")
    _draw_against_rest(axes, truth, probabilities, classes, curve)
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, zorder=1, label="0.500  chance")
    _add_legend(axes, "AUROC", "lower right", max(map(len, classes)))
    save_figure(figure, path, tight=True)


def plot_precision_recall(
    path: str | Path, truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> None:
    """Precision over recall as in `plot_roc`, with AUPRC (average precision); dotted, the class's share: chance."""

    def curve(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        from sklearn.metrics import average_precision_score, precision_recall_curve

        precision, recall, _ = precision_recall_curve(truth, scores)
        return recall, precision, float(average_precision_score(truth, scores))

    figure, axes = _unit_square("recall", "precision")
    # steps, as the area under them is the average precision
    drawn = _draw_against_rest(axes, truth, probabilities, classes, curve, drawstyle="steps-post")
    for share, colour in drawn:
        axes.axhline(share, color=colour, linestyle=":", linewidth=1, alpha=0.7, zorder=1)
    label = f"{drawn[0][0]:.3f}  chance" if len(drawn) == 1 else "chance: share of the class"
    axes.plot([], [], color=_GREY, linestyle=":", label=label)
    _add_legend(axes, "AUPRC", "lower left", max(map(len, classes)))
    save_figure(figure, path, tight=True)


def _draw_against_rest(
    axes: Axes, truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], curve: _Curve, **line: Any
) -> list[tuple[float, Any]]:
    """One line a class; a class of all or of no records is named without one. -> (share, colour) of those drawn."""
    probabilities = np.asarray(probabilities)
    flags = one_against_rest(truth, len(classes))  # (n, K)
    if probabilities.shape != flags.shape:
        raise ValueError(f"probabilities {probabilities.shape} should be {flags.shape}, for each record and class")
    first = 1 if np.ndim(truth) == 1 and len(classes) == 2 else 0  # the first of two classes mirrors the second
    drawn = []
    for k, name in enumerate(classes[first:], start=first):
        tens, unit = divmod(k - first, 10)
        style = {"color": f"C{unit}", "linestyle": ("-", "--", "-.", ":")[tens % 4], **line}
        # the area comes first: figures in a column, and a label that began with "_" would not be shown
        if not 0 < flags[:, k].sum() < len(flags):
            axes.plot([], [], label=f"    –    {plain(name)}", linestyle="")
            continue
        x, y, area = curve(flags[:, k], probabilities[:, k])
        axes.plot(x, y, label=f"{area:.3f}  {plain(name)}", linewidth=1.6, **style)
        drawn.append((flags[:, k].mean(), style["color"]))
    return drawn


def _unit_square(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6))  # fixed; the saved picture grows by a legend beside it
    axes = figure.add_subplot()
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel, aspect="equal")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _add_legend(axes: Axes, title: str, corner: Literal["lower left", "lower right"], longest: int) -> None:
    n = len(axes.get_legend_handles_labels()[1])
    if n <= _MOST_INSIDE and longest <= _LONGEST_INSIDE:
        axes.legend(title=title, loc=corner, alignment="left")
    else:
        columns = -(-n // _COLUMN)
        axes.legend(
            title=title, loc="upper left", bbox_to_anchor=(1.02, 1), ncols=columns, alignment="left", frameon=False
        )


def plot_regression(path: str | Path, truth: np.ndarray, predictions: np.ndarray, name: str) -> None:
    """Predictions (n,) over truth (n,) of the quantity `name`: dots, or counts in hexagons if there are many."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    truth, predictions = np.asarray(truth, dtype=np.float64), np.asarray(predictions, dtype=np.float64)
    low, high = min(truth.min(), predictions.min()), max(truth.max(), predictions.max())
    margin = 0.04 * (high - low) or 0.5
    low, high = low - margin, high + margin
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.add_subplot()
    if len(truth) <= _MOST_DOTS:
        axes.scatter(truth, predictions, s=14, color=_TRAIN, alpha=0.6 if len(truth) < 500 else 0.35, linewidths=0)
    else:
        extent = (low, high, low, high)
        blues = ListedColormap(colormaps["Blues"](np.linspace(0.25, 1, 256)))  # a single record is seen, too
        bins = axes.hexbin(truth, predictions, gridsize=55, bins="log", mincnt=1, extent=extent, cmap=blues)
        figure.colorbar(bins, ax=axes, shrink=0.8, label="records")
    axes.plot([low, high], [low, high], color=_VALID, linestyle="--", linewidth=1.2)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel=f"true {plain(name)}", ylabel=f"predicted {plain(name)}")
    axes.spines[["top", "right"]].set_visible(False)
    varies = np.ptp(truth) > 0 and np.ptp(predictions) > 0
    r = f"{np.corrcoef(truth, predictions)[0, 1]:.3f}" if varies else "–"
    frame = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    axes.text(0.03, 0.97, f"r = {r}\nn = {len(truth):,}", transform=axes.transAxes, va="top", bbox=frame)
    save_figure(figure, path, tight=True)


def plain(name: str) -> str:
    """A name as matplotlib writes it as it is."""
    return name.replace("$", r"\$")  # a pair of them would begin a formula


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 130, tight: bool = False) -> None:
    """As PNG, whole or not at all. tight: cut or widened to what is drawn."""
    cut: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.15} if tight else {}
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=dpi, **cut)
