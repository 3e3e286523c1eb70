"""Pictures of an evaluation."""

from pathlib import Path

from ..core.plots import save_figure
from .evaluation import Score


def plot_positions(path: Path, score: Score, order0: float, xz: float) -> None:
    """Bits per byte against the position in the document, an octave a step, with what to compare them with."""
    from matplotlib.figure import Figure

    rows = score.by_position()
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    values, end = [row["bits_per_byte"] for row in rows], 2 ** len(rows)
    axes.stairs(values, [*(row["from"] for row in rows), end], baseline=None, lw=1.8, color="#4878a8", label="model")
    axes.axhline(score.bits_per_byte, color="#4878a8", linestyle=":", label=f"model, mean: {score.bits_per_byte:.3f}")
    axes.axhline(xz, color="#d1603d", linestyle="--", label=f"xz -9: {xz:.3f}")
    axes.axhline(order0, color="#888888", linestyle="--", label=f"order 0: {order0:.3f}")
    axes.set_xscale("log", base=2)
    ticks = [16**k for k in range(len(rows) // 4 + 1)]  # 1 16 256 4K 64K 1M
    axes.set_xticks(ticks, [size_name(tick) for tick in ticks])
    axes.set(xlabel="byte of the document (a step reaches from n to 2n)", ylabel="bits per byte", xlim=(1, end))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def size_name(n: int) -> str:
    """A power of 2 in short: 4096 -> 4K, 2^20 -> 1M."""
    power = (n.bit_length() - 1) // 10
    return f"{n >> 10 * power}{'KMGTPE'[power - 1] if power else ''}"
