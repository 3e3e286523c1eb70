"""What the verbs share: the model of a run folder, and sound files as codes at its rate."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from ...core.config import ComputeConfig
from ...core.device import autocast, pick_device
from ...core.errors import InputError
from ...core.terminal import progress_bar, say
from ..codec import encode
from ..config import AudioConfig
from ..corpus import find_sounds, folder_labels
from ..model import AudioClassifier, AudioModel
from ..reading import Sound, samples
from ..scoring import check_causality


def load_model(run: Path, compute: ComputeConfig) -> AudioModel:
    return AudioModel.from_pretrained(run).to(pick_device(compute))


def load_causal_model(run: Path, compute: ComputeConfig) -> AudioModel:
    """A model to be measured. Raises InputError if it sees the future."""
    model = load_model(run, compute)
    with autocast(compute):
        check_causality(model)
    return model


def load_classifier(run: Path, compute: ComputeConfig) -> AudioClassifier:
    return AudioClassifier.from_pretrained(run).to(pick_device(compute))


def read_codes(words: Sequence[Path], config: AudioConfig) -> tuple[list[Sound], list[np.ndarray], list[str]]:
    """The sound files that `words` name, their codes as the model wants them, and their folders' names.

    The codes stand in a nameless file, so that hours of sound need no more memory than seconds. What was resampled or
    mixed is said.
    """
    sounds = find_sounds(words)
    tell_changes(sounds, config.sample_rate)
    starts = []
    with TemporaryFile() as file, progress_bar("reading", sum(sound.seconds for sound in sounds), "s") as advance:
        for sound in sounds:
            starts.append(file.tell())
            for block in samples(sound, config.sample_rate):
                file.write(encode(block, config.codec).data)
            if file.tell() == starts[-1]:
                raise InputError(f"{sound.path}: too short to have a sample at {config.sample_rate} Hz")
            advance(sound.seconds)
        file.flush()
        codes = np.memmap(file, np.uint8, "r")
    return sounds, np.split(codes, starts[1:]), folder_labels(sounds)


def tell_changes(sounds: Sequence[Sound], rate: int) -> None:
    """Say which files will not be read as they are."""
    others = [sound for sound in sounds if sound.rate != rate]
    if others:
        rates = ", ".join(f"{r}" for r in sorted({sound.rate for sound in others}))
        which = str(others[0].path) if len(others) == 1 else f"{len(others)} files"
        say(f"{which} of {rates} Hz: resampled to {rate} Hz")
    wide = [sound for sound in sounds if sound.n_channels > 1]
    if wide:
        which = str(wide[0].path) if len(wide) == 1 else f"{len(wide)} files"
        say(f"{which} of {max(s.n_channels for s in wide)} channels: averaged to mono")
