"""Pictures of what language models say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.plots import plain, save_figure

_MODEL, _OTHER = "#4878a8", "#d1603d"


def plot_perplexity(path: Path, rows: Sequence[Sequence[Any]], window: int) -> None:
    """Bits per base over the context; rows are (context, bits, perplexity, change, low, high, ...).

    The interval is that of the change from the shortest context: all are of the same bases.
    """
    from matplotlib.figure import Figure

    contexts, bits, low, high = (np.array([float(row[i]) for row in rows]) for i in (0, 1, 4, 5))
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    label = "95 % interval of the change from the shortest context"
    axes.fill_between(contexts, bits[0] + low, bits[0] + high, color=_MODEL, alpha=0.2, linewidth=0, label=label)
    axes.plot(contexts, bits, color=_MODEL, marker="o", markersize=4, label="model")
    axes.axvline(window, color=_OTHER, linestyle="--", linewidth=1, label="window in training")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{int(c):,}" for c in contexts], rotation=45)
    axes.set(xlabel="bases of context", ylabel="bits per base")
    axes.ticklabel_format(axis="y", useOffset=False)  # contexts may differ in the fourth digit
    right = axes.secondary_yaxis("right", functions=(np.exp2, lambda y: np.log2(np.maximum(y, 1e-9))))
    right.set_ylabel("perplexity")
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_mutagenesis(path: Path, effects: np.ndarray, reference: str, first: int, name: str) -> None:
    """LLR of every base (rows A, C, G, T) at every place, and below their mean over the three changes.

    effects (n, 4), nan for the base that stands there and where nothing is known; first: the first place, from 1
    """
    from matplotlib.figure import Figure

    n = len(effects)
    figure = Figure(figsize=(min(24.0, 3 + 0.16 * n), 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    reach = float(np.nanmax(np.abs(effects))) if np.isfinite(effects).any() else 1.0
    image = above.imshow(
        effects.T,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-reach,
        vmax=reach,
        extent=(first - 0.5, first + n - 0.5, 3.5, -0.5),
    )
    above.set_facecolor("#e6e6e6")
    above.set_yticks(range(4), "ACGT")
    figure.colorbar(image, ax=above, label="LLR", pad=0.01)
    known = np.isfinite(effects).any(1)
    means = np.full(n, np.nan)
    means[known] = np.nanmean(effects[known], axis=1)
    below.bar(first + np.arange(n), means, width=1.0, color=_MODEL)
    below.axhline(0, color="#888888", linewidth=0.8)
    below.set(xlabel=f"position on {plain(name)}", ylabel="mean LLR", xlim=(first - 0.5, first + n - 0.5))
    below.ticklabel_format(axis="x", style="plain", useOffset=False)
    if n <= 120:
        for i, base in enumerate(reference):
            above.text(first + i, -0.75, base, ha="center", va="bottom", fontsize=7)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
