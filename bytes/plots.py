"""Pictures of an evaluation."""

from pathlib import Path

from ..core.files import written_whole
from .evaluation import Score


def plot_positions(path: Path, score: Score, order0: float, xz: float) -> None:
    """Bits per byte against the position in the document, an octave a point, with what to compare them with."""
    from matplotlib.figure import Figure

    rows = score.by_position()
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [row["from"] for row in rows], [row["bits_per_byte"] for row in rows], "o-", color="#4878a8", label="model"
    )
    axes.axhline(score.bits_per_byte, color="#4878a8", linestyle=":", label=f"model, mean: {score.bits_per_byte:.3f}")
    axes.axhline(xz, color="#d1603d", linestyle="--", label=f"xz -9: {xz:.3f}")
    axes.axhline(order0, color="#888888", linestyle="--", label=f"order 0: {order0:.3f}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="byte of the document (each point: from there to twice there)", ylabel="bits per byte")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with written_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=130)
