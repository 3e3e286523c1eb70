"""The picture of a model's routing: how evenly its experts are used, and which tokens go to which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .plots import plain, save_figure
from .routing import LayerRouting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_LAYERS = 3  # whose tokens are shown: the first, the middle one and the last
SHOWN_TOKENS = 56  # the most frequent ones


def plot_routing(path: str | Path, layers: Sequence[LayerRouting], name_of: Callable[[int], str]) -> None:
    """Above, for each layer the experts' shares in multiples of the even one, from the most to the least used; below,
    for some layers, where each frequent token goes. There is one layer at least."""
    from matplotlib.figure import Figure

    shown = [layers[i] for i in sorted({0, (len(layers) - 1) // 2, len(layers) - 1})][:SHOWN_LAYERS]
    total = sum(routing.counts.sum(1) for routing in layers)
    frequent = np.sort(np.argsort(-total, kind="stable")[: min(SHOWN_TOKENS, np.count_nonzero(total))])
    width = max(4.6, 0.11 * layers[0].counts.shape[1] + 1)
    figure = Figure(figsize=(width * len(shown) + 1.2, 3.2 + 0.15 * len(frequent) + 1), layout="constrained")
    rows = figure.add_gridspec(2, len(shown), height_ratios=(3.2, 0.15 * len(frequent) + 1))
    _draw_load(figure.add_subplot(rows[0, :]), layers)
    image, panels = None, []
    for column, routing in enumerate(shown):
        axes = figure.add_subplot(rows[1, column])
        share = routing.of_token()[frequent]
        # experts in the order of the tokens that they take, so that those which share tokens stand together
        centre = (share * np.arange(len(frequent))[:, None]).sum(0) / np.maximum(share.sum(0), 1e-9)
        order = np.argsort(centre, kind="stable")
        image = axes.imshow(share[:, order], cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(frequent)), [plain(name_of(int(token))) for token in frequent], fontsize=6)
        step = -(-len(order) // 24)
        axes.set_xticks(range(0, len(order), step), [str(e) for e in order[::step]], fontsize=6)
        axes.set_title(f"layer {routing.layer}: the token alone tells {routing.explained:.2f} bits", fontsize=9)
        axes.set_xlabel("expert", fontsize=8)
        panels.append(axes)
    assert image is not None
    figure.colorbar(image, ax=panels, shrink=0.6, label="share of the token's occurrences")
    save_figure(figure, path)


def _draw_load(axes: Axes, layers: Sequence[LayerRouting]) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0, 0.85, len(layers)))
    for routing, colour in zip(layers, colours, strict=True):
        times = np.sort(routing.share / routing.even_share)[::-1]
        figures = f"least {times[-1]:.2f}, router's entropy {routing.router_entropy:.2f} bits"
        axes.plot(range(1, len(times) + 1), times, "o-", color=colour, markersize=3, linewidth=1.2)
        axes.plot([], [], color=colour, label=f"layer {routing.layer}: {figures}")
    axes.axhline(1, color="#888888", linestyle="--", linewidth=1)
    axes.axhline(0.25, color="#d1603d", linestyle=":", linewidth=1.2, label="a quarter of the even share")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="experts, from the most to the least used", ylabel="times the even share")
    axes.set_title(
        f"{layers[0].counts.shape[1]} experts: an even choice has {np.log2(layers[0].counts.shape[1]):.2f} bits",
        fontsize=9,
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, ncols=1 + len(layers) // 6)
