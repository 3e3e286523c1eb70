"""`polymamba vision eval`: how well does a model do on labelled images?"""

from dataclasses import replace

import numpy as np

from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder
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
    with new_folder(args.output) as beside:
        report(beside, model, images, found, args.compute.seed)


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
