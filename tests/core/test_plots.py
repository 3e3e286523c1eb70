"""Pictures: what they show is read off matplotlib's figure, that they are sound off the file."""

import sys

import matplotlib.figure
import matplotlib.image
import matplotlib.lines
import numpy as np
import pytest
from sklearn import metrics as skm

from polymamba.core import plots
from polymamba.core.plots import plot_confusion, plot_curves, plot_precision_recall, plot_regression, plot_roc

pytestmark = pytest.mark.usefixtures("in_full")

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
    saved, save = [], plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda figure, path, **how: (saved.append(figure), save(figure, path, **how))
    )
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


PLOTS = {"auroc": plot_roc, "auprc": plot_precision_recall}
AREAS = {"auroc": skm.roc_auc_score, "auprc": skm.average_precision_score}


def area_under(line: matplotlib.lines.Line2D) -> float:
    """The area under a drawn curve: straight between its points, or in steps where it is drawn so."""
    x, y = line.get_xydata().T
    return abs(np.trapezoid(y, x) if line.get_drawstyle() == "default" else (np.diff(x) * y[:-1]).sum())


def legend_of(figure: matplotlib.figure.Figure) -> list[str]:
    return [text.get_text().replace("\\$", "$") for text in figure.axes[0].get_legend().get_texts()]


def n_colours(picture: np.ndarray) -> int:
    """picture: float (H, W, 4)."""
    return len(np.unique((255 * picture).astype(np.uint8).view(np.uint32)))


def is_outside(figure: matplotlib.figure.Figure) -> bool:
    axes = figure.axes[0]
    return axes.get_legend().get_window_extent().x0 > axes.get_window_extent().x1


@pytest.mark.parametrize("kind", PLOTS)
@pytest.mark.parametrize(("k", "independent"), [(2, False), (2, True), (3, False), (7, True), (20, False)])
def test_one_curve_a_class(tmp_path, figures, kind, k, independent):
    rng = np.random.default_rng(k)
    truth = rng.random((101, k)) < 0.3 if independent else np.arange(101) % k
    flags = truth if independent else np.eye(k, dtype=bool)[truth]
    probabilities = (0.4 * flags + 0.6 * rng.random((101, k))).round(2)
    names = ["_odd$", "b$", *(f"class {i}" for i in range(2, k))]
    PLOTS[kind](tmp_path / "curves.png", truth, probabilities, names)
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert min(picture.shape[:2]) > 500
    assert n_colours(picture) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]

    shown = range(k) if k > 2 or independent else [1]
    expected = [AREAS[kind](flags[:, c], probabilities[:, c]) for c in shown]
    *labels, chance = legend_of(figures[0])
    assert labels == [f"{area:.3f}  {names[c]}" for area, c in zip(expected, shown, strict=True)]
    assert "chance" in chance
    lines = figures[0].axes[0].lines[: len(expected)]
    assert [area_under(line) for line in lines] == pytest.approx(expected)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(expected)
    assert is_outside(figures[0]) == (k > 6)


@pytest.mark.parametrize("kind", PLOTS)
def test_class_without_both_values_is_named_but_not_drawn(tmp_path, figures, kind):
    truth = np.array([[0, 1, 0], [1, 1, 0], [0, 1, 0]])
    PLOTS[kind](tmp_path / "curves.png", truth, np.eye(3), ["some", "all", "none"])
    labels = [label.split() for label in legend_of(figures[0])[:3]]
    assert [label[1] for label in labels] == ["some", "all", "none"]
    assert [label[0] for label in labels[1:]] == ["–", "–"]
    assert [len(line.get_xdata()) > 0 for line in figures[0].axes[0].lines[:3]] == [True, False, False]


@pytest.mark.parametrize("kind", PLOTS)
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (3,)])
def test_curves_of_other_shapes_are_refused(tmp_path, kind, shape):
    with pytest.raises(ValueError, match=r"should be \(3, 2\)"):
        PLOTS[kind](tmp_path / "curves.png", np.array([0, 1, 1]), np.ones(shape), ["a", "b"])
    assert list(tmp_path.iterdir()) == []


def test_chance_in_precision_recall_is_the_share_of_the_class(tmp_path, figures):
    truth = np.array([0, 0, 0, 1])
    plot_precision_recall(tmp_path / "curves.png", truth, np.eye(2)[truth], ["no", "yes"])
    assert legend_of(figures[0]) == ["1.000  yes", "0.250  chance"]
    assert list(figures[0].axes[0].lines[1].get_ydata()) == [0.25, 0.25]


def test_long_names_stand_beside_the_axes(tmp_path, figures):
    plot_roc(tmp_path / "roc.png", np.array([0, 1]), np.eye(2), ["a", "long" * 10])
    assert is_outside(figures[0])


@pytest.mark.parametrize("n", [1, 2, 300, 4001])
def test_regression(tmp_path, figures, n):
    rng = np.random.default_rng(n)
    truth = rng.normal(size=n)
    predictions = truth + rng.normal(size=n)
    plot_regression(tmp_path / "regression.png", truth, predictions, "half life ($h$)")
    picture = matplotlib.image.imread(tmp_path / "regression.png")
    assert min(picture.shape[:2]) > 500
    assert n_colours(picture) > 20
    axes = figures[0].axes[0]
    r = f"{np.corrcoef(truth, predictions)[0, 1]:.3f}" if n > 1 else "–"
    assert axes.texts[0].get_text() == f"r = {r}\nn = {n:,}"
    assert axes.get_xlabel().replace("\\", "") == "true half life ($h$)"
    assert axes.get_xlim() == axes.get_ylim()
    points = axes.collections[0]
    if n <= 3000:
        assert points.get_offsets().tolist() == np.stack([truth, predictions], axis=1).tolist()
    else:
        assert points.get_array().sum() == n
    identity = axes.lines[0].get_xydata()
    assert identity[:, 0].tolist() == identity[:, 1].tolist() == list(axes.get_xlim())


@pytest.mark.parametrize(("truth", "predictions"), [([1, 2, 3], [2, 2, 2]), ([2, 2], [1, 3]), ([0, 0], [0, 0])])
def test_regression_of_constants_has_no_r(tmp_path, figures, truth, predictions):
    plot_regression(tmp_path / "regression.png", truth, predictions, "x")
    assert figures[0].axes[0].texts[0].get_text().startswith("r = –")


def test_pyplot_is_left_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    plot_curves(tmp_path / "curves.png", LOG)
    assert ("matplotlib.pyplot" in sys.modules) == before
