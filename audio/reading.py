"""Sound files as blocks of mono samples at the rate that is wanted.

    file -> libsndfile (soundfile) -> mono, or one channel -> resampled (torchaudio) -> float32 (n,) in [-1, 1]

A file is read, and resampled, in blocks: one of many hours needs no more memory than a short one. A sample at the new
rate depends on few samples around it, so blocks that overlap by those give what the whole would.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from soundfile import LibsndfileError

from ..core.errors import InputError

READABLE = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus"),
    *(".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64"),
)
FOREIGN = (".m4a", ".aac", ".mp4", ".m4b", ".wma", ".webm", ".mka", ".amr", ".ape", ".wv")
WRITABLE = (".wav", ".flac", ".ogg", ".mp3")
BLOCK = 1 << 20  # frames that are read at a time
MOST_PHASES = 20_000_000  # of a resampling filter: weights that would be computed for rates with no common factor


class Sound(NamedTuple):
    """What a file says of itself."""

    path: Path
    rate: int
    n_channels: int
    n_frames: int

    @property
    def seconds(self) -> float:
        return self.n_frames / self.rate


def inspect(path: Path) -> Sound:
    """Raises InputError for a file that libsndfile cannot read."""
    try:
        with soundfile.SoundFile(path) as file:
            return Sound(path, file.samplerate, file.channels, file.frames)
    except (LibsndfileError, OSError, RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from None


def samples(sound: Sound, rate: int, channel: int | None = None) -> Iterator[np.ndarray]:
    """Blocks float32 (n,) of the file at `rate`, of one channel, or of the mean of all (None).

    Raises InputError for what cannot be read, for samples that are no finite numbers, and for rates that have next to
    no common factor.
    """
    mono = _frames(sound, channel)
    return mono if sound.rate == rate else resampled(mono, sound.rate, rate, str(sound.path))


def _frames(sound: Sound, channel: int | None) -> Iterator[np.ndarray]:
    n_read = 0
    try:
        for block in soundfile.blocks(sound.path, BLOCK, dtype="float32", always_2d=True):
            mono = block.mean(1) if channel is None else np.ascontiguousarray(block[:, channel])
            if not np.isfinite(mono).all():
                at = (n_read + int(np.flatnonzero(~np.isfinite(mono))[0])) / sound.rate
                raise InputError(f"{sound.path}: the sample at {at:.3f} s is no finite number; repair or remove it")
            n_read += len(mono)
            yield mono
    except (LibsndfileError, OSError, RuntimeError) as error:
        raise _unreadable(sound.path, error) from None


def resampled(blocks: Iterator[np.ndarray], old: int, new: int, name: str) -> Iterator[np.ndarray]:
    """Blocks float32 (n,) at `old` Hz as blocks at `new` Hz: what torchaudio makes of the whole, in bounded memory."""
    from torchaudio.functional import resample

    common = math.gcd(old, new)
    old, new = old // common, new // common
    if old * new > MOST_PHASES:
        raise InputError(
            f"{name}: {old * common} Hz cannot be brought to {new * common} Hz, for they have no large common factor; "
            "convert it to a usual rate first, such as 16000, 22050, 44100 or 48000 Hz"
        )
    width = math.ceil(6 * old / min(old, new)) + old  # torchaudio's filter reaches 6 zero crossings of the lower rate
    margin = -(-width // old) * old  # whole steps of both rates
    size = max(BLOCK // old, 4 * margin // old) * old
    kept, before = np.empty(0, np.float32), 0  # of what is kept, so much was given out already
    for block in blocks:
        kept = np.concatenate((kept, block))
        while len(kept) > before + size + margin:
            out = resample(torch.from_numpy(kept[: before + size + margin]), old, new).numpy()
            yield out[before // old * new : (before + size) // old * new]
            kept, before = kept[before + size - margin :], margin
    if len(kept) > before:
        yield resample(torch.from_numpy(kept), old, new).numpy()[before // old * new :]


def _unreadable(path: Path, error: Exception) -> InputError:
    if path.suffix.lower() in FOREIGN:
        return InputError(
            f"{path}: {path.suffix[1:]} files cannot be read; convert it first, for example with "
            f"`ffmpeg -i {path.name} {path.stem}.flac`"
        )
    if not path.exists():
        return InputError(f"{path}: no such file")
    if path.is_dir():
        return InputError(f"{path}: a folder; a sound file is wanted here")
    if path.stat().st_size == 0:
        return InputError(f"{path}: an empty file, of no bytes")
    reason = " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
    return InputError(f"{path}: cannot be read as sound ({reason}); wav, flac, mp3 and ogg can")
