"""A few small pictures of three kinds that a small model can tell apart."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 40, 40)}


def picture(colour: str, seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """Noise around a colour, (width, height)."""
    rng = np.random.default_rng((seed, *COLOURS[colour]))
    pixels = rng.normal(COLOURS[colour], 25, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """CLASS/number.png, 12 of each class."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        (folder / colour).mkdir()
        for i in range(12):
            picture(colour, i).save(folder / colour / f"{i}.png")
    return folder
