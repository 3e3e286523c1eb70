"""`polymamba vision predict`: what do images show? Unreadable ones are reported, and the others go on."""

import csv
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np
import torch

from ...core.device import autocast
from ...core.errors import InputError
from ...core.files import require_writable, write_json, written_whole
from ...core.terminal import progress_bar, say
from ..commands import Predict
from ..images import Item
from ..inference import batches, for_batches, probabilities
from ..model import ImageModel
from ..sources import find_images
from ..transforms import data_config
from .common import load_model

Row = dict[str, Any]  # image, classes: [(name, probability)], error


def predict(args: Predict) -> None:
    """A row for each image, in the order given."""
    suffix = ".tsv" if args.output is None else args.output.suffix.lower()
    if suffix not in (".csv", ".tsv", ".json"):
        raise InputError(f"{args.output}: name it .csv, .tsv or .json, which says what is written")
    if args.output is not None:
        require_writable(args.output)
    items, names = find_images(args.images)
    model, classes = load_model(args.run, args.compute)
    top = min(args.top_k, len(classes))
    n_unreadable = 0

    def counted() -> Iterator[Row]:
        nonlocal n_unreadable
        for row in _rows(model, classes, items, names, args):
            n_unreadable += bool(row["error"])
            yield row

    if args.output is None:
        _write_table(sys.stdout, counted(), top, "\t")
    elif suffix == ".json":
        write_json(args.output, [_as_json(row) for row in counted()])
    else:
        with (
            written_whole(args.output) as beside,
            beside.open("w", encoding="utf-8", errors="replace", newline="") as file,
        ):
            _write_table(file, counted(), top, "," if suffix == ".csv" else "\t")
    if n_unreadable:
        say(f"{n_unreadable} of {len(names)} images could not be read: see the column error")


def _rows(
    model: ImageModel, classes: tuple[str, ...], items: Sequence[Item], names: list[str], args: Predict
) -> Iterator[Row]:
    call, done = for_batches(model, model), 0
    options: Any = {"workers": args.workers, "bear_unreadable": True}
    with progress_bar("predict", len(names), "images") as advance:
        for x, problems in batches(items, names, data_config(model), args.batch_size, **options):
            with torch.no_grad(), autocast(args.compute):
                found = probabilities(call(x))
            for row, problem in zip(found, problems, strict=True):
                best = np.argsort(-row, kind="stable")[: args.top_k]
                likeliest = [] if problem else [(classes[k], float(row[k])) for k in best]
                yield {"image": names[done], "classes": likeliest, "error": problem}
                done += 1
            advance(len(x))


def _write_table(file: TextIO, rows: Iterator[Row], top: int, delimiter: str) -> None:
    """Columns image, class_1, probability_1, class_2, ..., error."""
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    ranks = [word for i in range(1, top + 1) for word in (f"class_{i}", f"probability_{i}")]
    writer.writerow(["image", *ranks, "error"])
    for row in rows:
        cells = [word for name, p in row["classes"] for word in (name, f"{p:.6f}")] or [""] * (2 * top)
        writer.writerow([row["image"], *cells, row["error"]])
        file.flush()


def _as_json(row: Row) -> Row:
    if row["error"]:
        return {"image": row["image"], "error": row["error"]}
    classes = [{"class": name, "probability": round(p, 6)} for name, p in row["classes"]]
    return {"image": row["image"], "classes": classes}
