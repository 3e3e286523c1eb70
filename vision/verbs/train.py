"""`polymamba vision train`: from labelled images to a run folder with a tested model."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ...core.device import pick_device
from ...core.errors import InputError
from ...core.files import write_json
from ...core.inputs import PARTS
from ...core.processes import from_first, is_first
from ...core.run_folder import RunFolder
from ...core.terminal import progress_bar, say
from ...core.train import settings_of, train_model
from ..commands import Train
from ..config import INPUT_SIZES, VimConfig, preset_config
from ..dataset import ImageSet, divide
from ..images import read_image
from ..model import ImageModel, load_image_model
from ..sources import read_source
from ..training import TrainImages
from ..transforms import data_config
from ..vim import Vim
from ..vmamba import VMamba
from .common import load_model, measure, report


def train(args: Train) -> None:
    """Train, then test on the test part with the best epoch's model."""
    torch.manual_seed(args.compute.seed)
    config, augment = args.training(), args.augmentation()
    given = readable(read_source(args.data), skip=args.skip_unreadable)
    parts, n_copies = from_first(lambda: _parts(divide(given, args.dividing, args.compute.seed)))
    images = replace(given, parts=parts)
    model = _model(args, images)  # before the folder is taken: what is wrong with the settings shows here
    run = RunFolder(args.output, _settings(args, images), images.files, resume=args.resume)
    say(images.describe())
    if n_copies:
        say(f"warning: {n_copies} images of valid and test also stand in train")
    if is_first():
        images.write_splits(run / "splits.tsv")
        write_json(run / "labels.json", dict(enumerate(images.classes)))

    n_parameters = sum(p.numel() for p in model.parameters())
    size = "x".join(map(str, data_config(model)["input_size"][1:]))
    say(f"{type(model).__name__}: {n_parameters:,} parameters, {size} pixels; training on {pick_device(args.compute)}")
    task = TrainImages(
        *(images.part("train"), images.part("valid"), config, augment, data_config(model), args.compute.seed)
    )
    train_model(model, task, config, args.compute, run, resume=args.resume)

    if not is_first():
        return
    test = images.part("test")
    if not len(test):
        say("no test part: nothing is held out to measure the model on")
        return
    best, _ = load_model(run.path, args.compute)
    found = measure(best, test, config.batch_size, config.workers, args.compute)
    report(run.path, best, test, found, args.compute.seed)


def _parts(divided: tuple[ImageSet, int]) -> tuple[np.ndarray, int]:
    return divided[0].parts, divided[1]


def readable(images: ImageSet, *, skip: bool) -> ImageSet:
    """All images are read once, so that a damaged one is told now and not in the night.

    Raises InputError for the first that cannot be read; with skip it is left out, and said.
    """
    problems = from_first(lambda: _problems(images))
    if not problems:
        return images
    first = problems[min(problems)]
    if not skip:
        more = f"; {len(problems) - 1} more cannot be read" if len(problems) > 1 else ""
        raise InputError(f"{first}{more}; --skip-unreadable leaves them out")
    say(f"{len(problems)} images left out that cannot be read; the first: {first}")
    return images.subset(np.array([i for i in range(len(images)) if i not in problems], dtype=np.int64))


def _problems(images: ImageSet) -> dict[int, str]:
    """What is wrong with those that cannot be read, by their places."""
    problems: dict[int, str] = {}

    def check(i: int) -> None:
        try:
            read_image(images.items[i], images.names[i], enough=64)
        except InputError as error:
            problems[i] = str(error)

    with progress_bar("checking", len(images), "images") as advance, ThreadPoolExecutor(8) as pool:
        for _ in pool.map(check, range(len(images))):
            advance(1)
    return problems


def _model(args: Train, images: ImageSet) -> ImageModel:
    """A fresh one, or --init's, with a head for these classes; it says what it wants to see."""
    changes: dict[str, Any] = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    if args.init is None:
        size = args.size or INPUT_SIZES[args.model]
        config = preset_config(args.model, num_classes=len(images.classes), **changes)
        if isinstance(config, VimConfig):
            config = replace(config, img_size=(size, size))
        model = Vim(config) if isinstance(config, VimConfig) else VMamba(config)
        cfg: dict[str, Any] = {"architecture": args.model, "crop_pct": 0.875 if size >= 128 else 1.0}
    else:
        model = load_image_model(args.init)
        cfg = dict(model.pretrained_cfg)
        names = cfg.get("label_names")
        if model.num_classes != len(images.classes) or (names and tuple(names) != images.classes):
            say(f"a fresh head for {len(images.classes)} classes")
            model.reset_classifier(len(images.classes), model.config.global_pool)
        size = args.size or max(data_config(model)["input_size"][1:])
        if isinstance(model, Vim):
            model.set_input_size(size)
        if changes:
            fresh = type(model)(replace(model.config, **changes))
            fresh.load_state_dict(model.state_dict())
            model = fresh
    model.pretrained_cfg = {**cfg, "input_size": (3, size, size), "label_names": list(images.classes)}
    model.pretrained_cfg = {**model.pretrained_cfg, **data_config(model)}
    return model


def _settings(args: Train, images: ImageSet) -> dict[str, Any]:
    """What determines the result."""
    return {
        "data": str(args.data),
        "images_sha256": images.digest(),
        "classes": list(images.classes),
        "parts": {part: int((images.parts == part).sum()) for part in PARTS},
        "recipe": args.recipe,
        "model": args.model if args.init is None else str(args.init),
        "size": args.size,
        "drop_path": args.drop_path,
        "skip_unreadable": args.skip_unreadable,
        **asdict(args.dividing),
        **settings_of(args.training(), args.compute, same_kernels=True),
        **asdict(args.augmentation()),
    }
