"""`polymamba vision eval`: how well does a model do on labelled images?"""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder
from ...core.terminal import say
from ..commands import Eval
from ..dataset import ImageSet
from ..sources import read_source
from .common import load_model, measure, report


def evaluate(args: Eval) -> None:
    """Measure the model on the part asked for, or on all images of data without parts."""
    require_new_folder(args.output)
    images = read_source(args.data)
    if (images.parts != "").any():
        if not (images.parts == args.part).any():
            there = ", ".join(sorted(set(images.parts) - {""}))
            raise InputError(f"{args.data}: no part {args.part!r}; there are {there}: choose one with --part")
        images = images.part(args.part)
    model, classes = load_model(args.run, args.compute)
    images = with_classes(images, classes)
    found = measure(model, images, args.batch_size, args.workers, args.compute)
    n_seen = count_seen(args.run, images)
    if n_seen:
        say(f"warning: {n_seen} of {len(images)} images stand in the model's own train or valid part: no fair measure")
    with new_folder(args.output) as beside:
        report(beside, model, images, found, args.compute.seed)


def count_seen(run: Path, images: ImageSet) -> int:
    """How many images the run's splits.tsv names as trained or validated on; copies under other names go unnoticed."""
    splits = run / "splits.tsv"
    if not splits.is_file():
        return 0
    with splits.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        seen = {os.path.abspath(row["image"] or "") for row in rows if row.get("part") in ("train", "valid")}
    return sum(os.path.abspath(name) in seen for name in images.names)


def with_classes(images: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    """With the model's classes in its order. Raises InputError for a class that it does not know."""
    number = {name: i for i, name in enumerate(classes)}
    present = [images.classes[k] for k in np.unique(images.labels)]
    unknown = [name for name in present if name not in number]
    if unknown:
        known = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
        raise InputError(f"class {unknown[0]!r} of the images is none of the model's: {known}")
    to_ours = np.array([number.get(name, -1) for name in images.classes])
    return replace(images, labels=to_ours[images.labels], classes=classes)
