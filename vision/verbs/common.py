"""What the verbs share: the model of a folder with its class names, and the report on labelled images."""

from pathlib import Path
from typing import Any

import numpy as np

from ...core.config import ComputeConfig
from ...core.device import autocast, pick_device
from ...core.errors import InputError
from ...core.files import save_tsv, write_json
from ...core.metrics import classification_metrics, format_table, write_confusion_tsv
from ...core.plots import plot_confusion
from ...core.terminal import progress_bar
from ..dataset import ImageSet
from ..images import read_image
from ..inference import predict
from ..model import ImageModel, load_image_model
from ..plots import calibration_error, contact_sheet, plot_calibration
from ..transforms import centre_view, data_config

WORST = 24  # mistakes on the contact sheet
MOST_DRAWN = 100  # classes; a confusion matrix of more is a table only


def load_model(run: Path, compute: ComputeConfig) -> tuple[ImageModel, tuple[str, ...]]:
    """The model on the device, and its classes in the order of the logits."""
    model = load_image_model(run)
    if not model.num_classes:
        raise InputError(f"{run}: a model without a head has no classes to tell apart; `train --init` gives it one")
    return model.to(pick_device(compute)), class_names(model)


def class_names(model: ImageModel) -> tuple[str, ...]:
    """The model's own, else ImageNet's for 1,000 classes, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    if names is not None and len(names) == model.num_classes:
        return tuple(map(str, names))
    if model.num_classes == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return tuple(info.index_to_description(i) for i in range(1000))
    return tuple(map(str, range(model.num_classes)))


def measure(model: ImageModel, images: ImageSet, batch_size: int, workers: int, compute: ComputeConfig) -> np.ndarray:
    """Probabilities (n, K) in the precision asked for, under a progress bar."""
    with autocast(compute), progress_bar("test", len(images), "images") as advance:
        return predict(model, images, batch_size, workers=workers, advance=advance)


def report(folder: Path, model: ImageModel, images: ImageSet, found: np.ndarray, seed: int) -> dict[str, Any]:
    """Figures on stdout and in the folder, pictures, and every prediction beside the truth. found: (n, K)."""
    classes, labels = images.classes, images.labels
    metrics = classification_metrics(labels, found, classes, seed=seed)
    order = np.argsort(-found, axis=1, kind="stable")
    error, bins = calibration_error(found, labels)
    metrics["top5_accuracy"] = float((order[:, :5] == labels[:, None]).any(axis=1).mean())
    metrics["calibration_error"] = error
    metrics["calibration"] = bins
    write_json(folder / "metrics.json", metrics)
    matrix = np.array(metrics["confusion"])
    write_confusion_tsv(folder / "confusion.tsv", matrix, classes)
    if len(classes) <= MOST_DRAWN:
        plot_confusion(folder / "confusion.png", matrix, classes)
    plot_calibration(folder / "calibration.png", bins, error)
    _write_predictions(folder / "predictions.tsv", images, found, order)
    _draw_mistakes(folder / "mistakes.png", model, images, found)
    print(format_table(metrics))
    if len(classes) > 5:
        print(f"top-5 accuracy {metrics['top5_accuracy']:.4f}")
    print(f"calibration error {error:.4f}")
    return metrics


def _write_predictions(path: Path, images: ImageSet, found: np.ndarray, order: np.ndarray) -> None:
    rows = []
    for name, label, chosen, p in zip(images.names, images.labels, order[:, 0], found, strict=True):
        rows.append([name, images.classes[label], images.classes[chosen], f"{p[chosen]:.6f}", f"{p[label]:.6f}"])
    save_tsv(path, ["image", "true", "predicted", "probability", "of_true"], rows, errors="replace")


def _draw_mistakes(path: Path, model: ImageModel, images: ImageSet, found: np.ndarray) -> None:
    """The wrong images of which the model was surest, as it saw them."""
    chosen, view = found.argmax(axis=1), data_config(model)
    wrong = np.flatnonzero(chosen != images.labels)
    worst = wrong[np.argsort(-found[wrong, chosen[wrong]], kind="stable")][:WORST]
    pictures = [centre_view(read_image(images.items[i], images.names[i]), view) for i in worst.tolist()]
    captions = [
        f"{images.classes[images.labels[i]]}, taken for {images.classes[chosen[i]]}\n({found[i, chosen[i]]:.0%})"
        for i in worst
    ]
    contact_sheet(path, pictures, captions, f"{len(wrong)} of {len(images)} wrong; the surest mistakes")
