"""From an RGB image to what a model sees, by timm's transforms; what a model wants is in its pretrained_cfg."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from .config import Augmentation
from .images import bounded
from .model import ImageModel

Transform = Callable[[Image.Image], Tensor]  # RGB -> (3, H, W) float, normalised


def data_config(model: ImageModel) -> dict[str, Any]:
    """input_size, interpolation, mean, std, crop_pct of a model: its own, else timm's for ImageNet."""
    size = getattr(model.config, "img_size", (224, 224))
    known = {k: v for k, v in model.pretrained_cfg.items() if v is not None}
    return {
        "input_size": tuple(known.get("input_size", (3, *size))),
        "interpolation": known.get("interpolation", "bicubic"),
        "mean": tuple(known.get("mean", IMAGENET_DEFAULT_MEAN)),
        "std": tuple(known.get("std", IMAGENET_DEFAULT_STD)),
        "crop_pct": known.get("crop_pct", 0.875),
    }


def eval_transform(config: dict[str, Any]) -> Transform:
    """Resize the shorter side to size / crop_pct, take the middle."""
    resize: Any = create_transform(**config, is_training=False)
    return lambda image: resize(bounded(image))


def train_transform(config: dict[str, Any], augment: Augmentation) -> Transform:
    """A random crop, resized; mirrored, recoloured, partly erased as `augment` says."""
    given = {k: v for k, v in config.items() if k != "crop_pct"}
    transform: Any = create_transform(
        **given,
        is_training=True,
        scale=(augment.scale, 1.0),
        hflip=augment.flip,
        color_jitter=augment.jitter,
        auto_augment=augment.auto_augment or None,
        re_prob=augment.erase,
        re_mode="pixel",
    )
    return transform


def shorter_side(config: dict[str, Any]) -> int:
    """Pixels of the shorter side that an image may be decoded down to without a loss that shows."""
    return 2 * round(max(config["input_size"][1:]) / config["crop_pct"])


def centre_view(image: Image.Image, config: dict[str, Any]) -> Image.Image:
    """What of an image `eval_transform` shows the model, at the same size, before it is normalised."""
    steps: Any = create_transform(**config, is_training=False)
    for step in steps.transforms:
        if type(step).__name__ in ("MaybeToTensor", "ToTensor", "Normalize"):
            break
        image = step(bounded(image))
    return image


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within it, the random numbers of Python, numpy and torch's CPU follow from `numbers`; after it, from before.

    timm's transforms draw from all three.
    """
    python, of_numpy = random.getstate(), np.random.get_state()
    words = np.random.SeedSequence(numbers).generate_state(2)
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))
            torch.manual_seed(int(words[0]) << 32 | int(words[1]))
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
