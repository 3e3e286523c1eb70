"""`polymamba audio plot`: waveform and spectrum of sound files."""

import numpy as np

from ...core.errors import InputError
from ...core.files import require_writable
from ...core.terminal import say
from ..commands import Plot
from ..corpus import find_sounds
from ..plots import plot_sounds
from ..reading import samples

MOST = 12  # sounds in a picture


def plot(args: Plot) -> None:
    """Each at its own rate."""
    if args.output.suffix.lower() != ".png":
        raise InputError(f"{args.output}: its ending must be .png")
    require_writable(args.output)
    sounds = find_sounds(args.files)
    if len(sounds) > MOST:
        say(f"{len(sounds)} sounds: the first {MOST} are drawn")
    waves = []
    for sound in sounds[:MOST]:
        n, pieces = round(args.seconds * sound.rate), []
        for block in samples(sound, sound.rate):
            pieces.append(block[: n - sum(map(len, pieces))])
            if sum(map(len, pieces)) >= n:
                break
        waves.append(np.concatenate(pieces))
    plot_sounds(args.output, waves, [s.rate for s in sounds[:MOST]], [s.path.name for s in sounds[:MOST]])
