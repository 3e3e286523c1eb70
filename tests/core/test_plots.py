"""Pictures: what they show is read off matplotlib's figure, that they are sound off the file."""

import sys

import matplotlib.image
import numpy as np
import pytest

from polymamba.core import plots
from polymamba.core.plots import plot_confusion, plot_curves

LOG = [
    {"step": 10, "epoch": 1, "train_loss": 1.0, "lr": 1e-3},
    {"step": 20, "epoch": 1, "train_loss": 0.8, "lr": 2e-3},
    {"step": 20, "epoch": 1, "valid_loss": 0.9, "valid_accuracy": 0.5, "valid_mcc": None, "seconds": 1.5},
    {"step": 40, "epoch": 2, "valid_loss": 0.7, "valid_accuracy": 0.6},
    {"step": 60, "epoch": 3, "valid_loss": 0.75, "valid_accuracy": 0.65},
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


@pytest.mark.parametrize(
    "classes", [("a", "b"), ("EI", "IE", "N"), [f"{'long' * 5}_{i}" for i in range(30)], ("$x_$", "$")]
)
def test_confusion(tmp_path, figures, classes):
    n = len(classes)
    matrix = np.arange(n * n).reshape(n, n) * (np.arange(n) < n - 1)[:, None]  # no record of the last class
    plot_confusion(tmp_path / "confusion.png", matrix, classes)
    picture = matplotlib.image.imread(tmp_path / "confusion.png")
    assert min(picture.shape[:2]) > 200
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]
    axes = figures[0].axes[0]
    assert [label.get_text().replace("\\", "") for label in axes.get_xticklabels()] == list(classes)
    if n <= 20:
        texts = [text.get_text().split("\n") for text in axes.texts]
        assert [int(count) for count, _ in texts] == matrix.ravel().tolist()
        shares = np.array([float(share.removesuffix(" %")) for _, share in texts]).reshape(n, n)
        assert shares.sum(1) == pytest.approx([100.0] * (n - 1) + [0], abs=0.2)


def test_curves(tmp_path, figures):
    plot_curves(tmp_path / "curves.png", LOG)
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[0] > 400
    losses, validation = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for axes in (losses, validation) for line in axes.lines}
    assert drawn == {
        "train": [[10, 1.0], [20, 0.8]],
        "valid": [[20, 0.9], [40, 0.7], [60, 0.75]],
        "lowest: 0.7 at step 40": [[40, 0.7]],
        "valid accuracy": [[20, 0.5], [40, 0.6], [60, 0.65]],
    }


@pytest.mark.parametrize("log", [[], LOG[:2], LOG[3:4], [{"step": 1}]])
def test_curves_with_little_to_show(tmp_path, log):
    plot_curves(tmp_path / "curves.png", log)
    assert matplotlib.image.imread(tmp_path / "curves.png").size > 0


def test_long_curves_are_thinned(tmp_path, figures):
    plot_curves(tmp_path / "curves.png", [{"step": i, "train_loss": 1 / (i + 1)} for i in range(100_000)])
    assert 1000 <= len(figures[0].axes[0].lines[0].get_xydata()) <= 1500


def test_pyplot_is_left_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plot_curves(tmp_path / "curves.png", LOG)
    assert ("matplotlib.pyplot" in sys.modules) == before
