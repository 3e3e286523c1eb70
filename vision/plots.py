"""Pictures of images and of a model's certainty, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.plots import plain, save_figure

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = 6  # of a contact sheet
DPI = 120


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 15) -> tuple[float, list[dict]]:
    """Expected calibration error (Guo et al. 2017, equation 3) and the bins: from, to, n, confidence, accuracy.

    The mean over bins of equal width, weighted by their images, of |accuracy - mean probability of the chosen class|.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    which = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    bins, error = [], 0.0
    for k in range(n_bins):
        inside = which == k
        if inside.any():
            mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
            error += float(inside.mean()) * abs(mean - accuracy)
            edges = {"from": k / n_bins, "to": (k + 1) / n_bins}
            bins.append({**edges, "n": int(inside.sum()), "confidence": mean, "accuracy": accuracy})
    return error, bins


def plot_calibration(path: str | Path, bins: Sequence[dict], error: float) -> None:
    """Accuracy over confidence, and below how many images each bin holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1, label="as sure as right")
    places = [row["confidence"] for row in bins]
    upper.plot(places, [row["accuracy"] for row in bins], "o-", color="#4878a8", label=f"model (error {error:.3f})")
    upper.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    upper.legend(loc="upper left", frameon=False)
    middles = [(row["from"] + row["to"]) / 2 for row in bins]
    lower.bar(middles, [row["n"] for row in bins], width=0.06, color="#4878a8")
    lower.set(xlabel="probability of the chosen class", ylabel="images")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=DPI)


def contact_sheet(path: str | Path, images: Sequence[Image.Image], captions: Sequence[str], title: str) -> None:
    """Images in rows, each with a caption below it; a note alone if there are none."""
    from matplotlib.figure import Figure

    columns = max(1, min(COLUMNS, len(images)))
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(2.1 * max(columns, 3), 2.5 * rows + 0.4), layout="constrained")
    figure.suptitle(title if images else f"{title}: none", fontsize=11)
    for axes, image, caption in zip(figure.subplots(rows, columns, squeeze=False).flat, images, captions, strict=False):
        axes.imshow(np.asarray(image), interpolation="nearest" if max(image.size) < 128 else "antialiased")
        axes.set_title(plain(caption), fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    save_figure(figure, path, dpi=DPI)


def plot_gradcam(path: str | Path, rows: Sequence[tuple[Image.Image, np.ndarray, str]]) -> None:
    """(image as the model saw it, map (H, W) from 0 to 1, caption) of each: the image, and the map laid over it."""
    from matplotlib.figure import Figure

    per_row = 4
    n_rows = max(1, -(-len(rows) // per_row))
    figure = Figure(figsize=(3.4 * per_row, 2.1 * n_rows), layout="constrained")
    axes = figure.subplots(n_rows, 2 * per_row, squeeze=False).reshape(-1, 2)
    for (left, right), (image, cam, caption) in zip(axes, rows, strict=False):
        smooth = "nearest" if max(image.size) < 128 else "antialiased"
        left.imshow(np.asarray(image), interpolation=smooth)
        right.imshow(np.asarray(image.convert("L")), cmap="gray", interpolation=smooth)
        right.imshow(cam, cmap="inferno", alpha=0.6, vmin=0, vmax=1, interpolation="bilinear")
        left.set_title(plain(caption), fontsize=8, loc="left")
    for one in figure.axes:
        one.set_axis_off()
    save_figure(figure, path, dpi=DPI)


def plot_receptive_field(path: str | Path, field: np.ndarray, n_images: int) -> None:
    """field (H, W), in logarithmic colours over four decades: far influence is small."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    top = float(field.max()) or 1.0
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(np.maximum(field / top, 1e-4), cmap="inferno", norm=LogNorm(1e-4, 1))
    figure.colorbar(drawn, ax=axes, shrink=0.85, label="influence on the middle cell / largest")
    axes.set_title(f"effective receptive field, mean of {n_images} images", fontsize=10)
    axes.set(xlabel="pixel", ylabel="pixel")
    save_figure(figure, path, dpi=DPI)


def plot_scan_order(path: str | Path, orders: Sequence[tuple[str, np.ndarray]]) -> None:
    """A line through the cells of each direction, from dark (first) to bright (last); a gap where a token stands."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(orders), 3.6), layout="constrained")
    for axes, (name, cells) in zip(figure.subplots(1, len(orders), squeeze=False)[0], orders, strict=True):
        places = cells[:, ::-1]  # x, y
        segments = np.stack((places[:-1], places[1:]), 1)
        lines = LineCollection(list(segments), array=np.arange(len(segments)), cmap="viridis", linewidths=1.4)
        axes.add_collection(lines)
        there = ~np.isnan(places[:, 0])
        colours = colormaps["viridis"](np.linspace(0, 1, len(places)))
        axes.scatter(*places[there].T, s=14, color=colours[there], zorder=2)
        for i in np.flatnonzero(~there):
            beside = places[i - 1] if i else places[i + 1]
            axes.plot(*beside, "s", markersize=9, fillstyle="none", color="#d1603d")
            axes.annotate(
                "class token\nhere", beside, fontsize=7, color="#d1603d", xytext=(4, 6), textcoords="offset points"
            )
        top = np.nanmax(cells, axis=0)
        axes.set(xlim=(-0.7, top[1] + 0.7), ylim=(top[0] + 0.7, -0.7), aspect="equal", title=name)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    save_figure(figure, path, dpi=DPI)
