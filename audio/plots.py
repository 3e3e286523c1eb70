"""Pictures of sound: waveform and spectrum over time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.signal import ShortTimeFFT
from scipy.signal.windows import hann

from ..core.plots import plain, save_figure

FLOOR = -90.0  # dB below full scale: black
_COLUMNS = 1200  # of a spectrum: more cannot be seen


def plot_sounds(path: Path, waves: Sequence[np.ndarray], rates: Sequence[int], names: Sequence[str]) -> None:
    """Waveform over spectrogram of each sound, float32 (n,) at its rate."""
    n_columns = min(len(waves), 3)
    n_rows = -(-len(waves) // n_columns)
    figure = Figure(figsize=(6.2 * n_columns, 3.6 * n_rows), layout="constrained")
    panels = figure.subplots(2 * n_rows, n_columns, squeeze=False, height_ratios=[1, 2.4] * n_rows)
    for i, (wave, rate, name) in enumerate(zip(waves, rates, names, strict=True)):
        row, column = divmod(i, n_columns)
        above, below = panels[2 * row, column], panels[2 * row + 1, column]
        draw_wave(above, wave, rate)
        above.set_title(plain(name), fontsize=10)
        draw_spectrum(below, wave, rate)
        if column == 0:
            below.set_ylabel("kHz")
    for i in range(len(waves), n_rows * n_columns):
        row, column = divmod(i, n_columns)
        panels[2 * row, column].set_axis_off()
        panels[2 * row + 1, column].set_axis_off()
    save_figure(figure, path, dpi=110)


def draw_wave(axes: Axes, wave: np.ndarray, rate: int) -> None:
    """Smallest and largest value of each of so many stretches as can be seen."""
    n = max(1, len(wave) // (2 * _COLUMNS))
    pieces = np.pad(wave, (0, -len(wave) % n), mode="edge").reshape(-1, n)
    at = np.arange(len(pieces)) * n / rate
    axes.fill_between(at, pieces.min(1), pieces.max(1), color="#4878a8", linewidth=0.6)
    peak = max(float(np.abs(wave).max(initial=0)), 1e-3)
    axes.set(xlim=(0, max(len(wave), 2) / rate), ylim=(-1.05 * peak, 1.05 * peak), xticks=[], yticks=[-peak, 0, peak])
    axes.set_yticklabels([f"-{peak:.2g}", "0", f"{peak:.2g}"])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw_spectrum(axes: Axes, wave: np.ndarray, rate: int) -> None:
    """Decibels, of magnitudes in windows of some 32 ms, of a wave (n,) at `rate` Hz: seconds across, kHz upwards."""
    width = max(16, 1 << round(np.log2(0.032 * rate)))
    wave = np.pad(wave.astype(np.float64), (0, max(0, width - len(wave))))
    hop = max(width // 4, len(wave) // _COLUMNS)
    transform = ShortTimeFFT(hann(width), hop, rate, scale_to="magnitude")
    decibels = 20 * np.log10(np.abs(transform.stft(wave)) + 1e-9)
    seconds = len(wave) / rate
    first, last = transform.lower_border_end[1], transform.p_max(len(wave))
    decibels = decibels[:, max(first, 0) : last]
    axes.imshow(
        decibels, origin="lower", aspect="auto", cmap="magma", vmin=FLOOR, vmax=-10, extent=(0, seconds, 0, rate / 2000)
    )
    axes.set_xlabel("s")
