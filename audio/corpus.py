"""From sound files to a divided corpus of codes on disk, which training reads by position.

    files -> `find_sounds` -> `divide`: which recording is of which part -> `open_corpus`: decoded once, then mapped

FOLDER/<fingerprint>/           of the files, their contents and parts, the rate and the codec (core/made_once.py)
    train.bin valid.bin test.bin    the recordings' codes, end to end, a byte each
    train.npy valid.npy test.npy    float32: the mean square of each BLOCK of these, for the silence gate
    lengths.npy                     int64: codes of each recording

A recording is a file, or a channel of one with --channels split, or a stretch of either with --split-by time.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..core.errors import InputError
from ..core.files import save_tsv, sha256, written_whole
from ..core.inputs import PARTS, find_files, named_part, part_called
from ..core.made_once import made_once
from ..core.terminal import progress_bar, say
from .codec import encode, values
from .config import Dividing
from .reading import FOREIGN, READABLE, Sound, inspect, samples

LAYOUT = 2  # raised whenever what is made of the same recordings would be other files
BLOCK = 256  # codes


class Recording(NamedTuple):
    """What of a file is one sequence."""

    path: str
    part: str  # one of PARTS
    label: str  # of its folder; "" for none
    channel: int  # -1: the mean of all
    start: float  # where it begins and ends, as shares of the file
    end: float
    sha256: str  # of the file


@dataclass(frozen=True, eq=False)
class Recordings:
    """The recordings of one part as one array of codes."""

    codes: np.ndarray  # uint8 (n,)
    starts: np.ndarray  # int64 (recordings + 1,): where each begins; the last is n
    labels: list[str]
    power: np.ndarray  # float32: the mean square of each BLOCK of codes
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def recording(self, i: int) -> np.ndarray:
        return self.codes[self.starts[i] : self.starts[i + 1]]

    def loudness(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """RMS of stretches of codes, to the nearest blocks: arrays of the same shape."""
        total = np.concatenate([[0.0], np.cumsum(self.power, dtype=np.float64)])
        first, last = start // BLOCK, np.minimum(-(-end // BLOCK), len(self.power))
        return np.sqrt((total[last] - total[first]) / np.maximum(last - first, 1))


def find_sounds(words: Sequence[Path], leave_out: Path | None = None) -> list[Sound]:
    """The sound files that `words` name, and those in the folders that they name: sorted, each once.

    Of a folder's files those count whose endings say sound; the others are counted aloud. Files of no length are
    passed over, which is said. Raises InputError for a file that cannot be read, and if none remain.
    """
    named = {word.absolute() for word in words if word.is_file()}
    files = find_files(words, leave_out)
    sounds = [f for f in files if f.suffix.lower() in (*READABLE, *FOREIGN) or f.absolute() in named]
    if not sounds:
        where = str(words[0]) if len(words) == 1 else f"{words[0]} and {len(words) - 1} more"
        raise InputError(f"{where}: no sound files in it; wav, flac, mp3 and ogg can be read")
    if len(sounds) < len(files):
        say(f"{len(files) - len(sounds)} files passed over whose endings are none of sound files")
    with progress_bar("looking at files", len(sounds), "files") as advance:
        found = []
        for path in sounds:
            found.append(inspect(path))
            advance(1)
    filled = [sound for sound in found if sound.n_frames]
    if not filled:
        raise InputError(f"{found[0].path}: a sound of 0 seconds; give files with at least one sample")
    if len(filled) < len(found):
        say(f"{len(found) - len(filled)} files of 0 seconds passed over")
    return filled


def folder_labels(sounds: Sequence[Sound]) -> list[str]:
    """Of each file the name of its folder, "" where that names a part (train/x.wav), or for all if there is but one."""
    names = ["" if part_called(s.path.parent.name) else s.path.parent.name for s in sounds]
    return names if len(set(names) - {""}) > 1 else [""] * len(names)


def divide(sounds: Sequence[Sound], dividing: Dividing, seed: int) -> list[Recording]:
    """Each recording's part.

    A path names a part by a folder above the file, or by the file's name: train/a.wav, valid.wav. Of the others'
    recordings valid and test are taken, unless they were named: of each label as large a share, in an order that the
    seed and the contents give; the same ones wherever the files lie, and copies of a file together.
    Raises InputError if too few are left.
    """
    labels = folder_labels(sounds)
    recordings = []
    with progress_bar("checksums", len(sounds), "files") as advance:
        for sound, label in zip(sounds, labels, strict=True):
            channels = range(sound.n_channels) if dividing.channels == "split" else [-1]
            digest = sha256(sound.path)
            part = named_part(sound.path) or "train"
            recordings += [Recording(str(sound.path), part, label, channel, 0.0, 1.0, digest) for channel in channels]
            advance(1)
    many = Counter(sound.n_channels for sound in sounds if sound.n_channels > 1)
    how = "each channel a recording" if dividing.channels == "split" else "their channels averaged"
    for n_channels, n in sorted(many.items()):
        say(f"{n} files of {n_channels} channels: {how}")
    named = {r.part for r in recordings}
    wanted = {"valid": dividing.valid_fraction, "test": dividing.test_fraction}
    wanted = {part: share for part, share in wanted.items() if part not in named and share > 0}
    if wanted:
        cut = _cut_each if dividing.split_by == "time" else _draw
        recordings = cut(recordings, wanted, seed)
    if not any(r.part == "train" for r in recordings):
        raise InputError("no recording is left for the train part; their paths name only valid and test")
    return sorted(recordings)


def _draw(recordings: list[Recording], wanted: dict[str, float], seed: int) -> list[Recording]:
    """Let some files of train change to the wanted parts: of each label its share, and one at least in all."""
    label_of = {r.sha256: r.label for r in recordings if r.part == "train"}
    if len(label_of) <= len(wanted):
        raise InputError(
            f"{len(label_of)} different files cannot be divided into train and {' and '.join(wanted)}; give more "
            "files, name paths (train/..., valid/...), or hold out the end of each with --split-by time"
        )
    order = sorted(label_of, key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())
    rank, count = {}, Counter(label_of.values())
    seen: Counter[str] = Counter()
    for digest in order:  # each label's files at even distances from 0 to 1
        rank[digest] = (seen[label_of[digest]] + 0.5) / count[label_of[digest]]
        seen[label_of[digest]] += 1
    order.sort(key=lambda digest: rank[digest])
    part_of: dict[str, str] = {}
    for i, (part, share) in enumerate(wanted.items()):
        n = max(1, round(share * len(label_of)))
        n = min(n, len(order) - (len(wanted) - i))  # leave one for each part to come
        part_of |= dict.fromkeys(order[:n], part)
        order = order[n:]
    return [r._replace(part=part_of.get(r.sha256, r.part)) if r.part == "train" else r for r in recordings]


def _cut_each(recordings: list[Recording], wanted: dict[str, float], seed: int) -> list[Recording]:
    """Let the end of each recording of train change to the wanted parts, valid before test. Nothing is drawn."""
    result = []
    for r in recordings:
        if r.part != "train":
            result.append(r)
            continue
        start = 0.0
        for part, share in {"train": 1 - sum(wanted.values()), **wanted}.items():
            end = 1.0 if part == list(wanted)[-1] else start + share
            result.append(r._replace(part=part, start=start, end=end))
            start = end
    return result


def open_corpus(folder: Path, recordings: Sequence[Recording], rate: int, codec: str) -> dict[str, Recordings]:
    """The parts of a corpus from the cache in `folder`; decoded there first if it is not.

    A cache that was damaged is built anew, which is said: see `made_once`. Raises InputError for sound that cannot be
    read, and for a file that changed meanwhile; OSError if the cache cannot be written.
    """
    what = {"layout": LAYOUT, "rate": rate, "codec": codec, "recordings": [r._asdict() for r in recordings]}
    cache = made_once(folder, what, lambda beside: _build(beside, recordings, rate, codec))
    lengths = np.load(cache / "lengths.npy")
    return {part: _opened(cache, part, recordings, lengths) for part in PARTS}


def _opened(cache: Path, part: str, recordings: Sequence[Recording], lengths: np.ndarray) -> Recordings:
    mine = [(r, n) for r, n in zip(recordings, lengths, strict=True) if r.part == part and n]
    starts = np.cumsum([0, *(n for _, n in mine)], dtype=np.int64)
    codes = np.memmap(cache / f"{part}.bin", np.uint8, "r") if starts[-1] else np.empty(0, np.uint8)
    return Recordings(
        codes, starts, [r.label for r, _ in mine], np.load(cache / f"{part}.npy"), [r.path for r, _ in mine]
    )


def _build(folder: Path, recordings: Sequence[Recording], rate: int, codec: str) -> None:
    lengths, n_clipped = np.zeros(len(recordings), np.int64), 0
    sounds = {r.path: inspect(Path(r.path)) for r in recordings}
    seconds = sum(sounds[r.path].seconds * (r.end - r.start) for r in recordings)
    with progress_bar("decoding", round(seconds), "s") as advance:
        for part in PARTS:
            with written_whole(folder / f"{part}.bin") as unfinished, unfinished.open("wb") as file:
                writer = _PartWriter(file, codec)
                for i, r in enumerate(recordings):
                    if r.part != part:
                        continue
                    for block in _stretch(sounds[r.path], r, rate):
                        n_clipped += int((np.abs(block) >= 0.99996).sum())  # the largest values of 16 bits
                        writer.write(block)
                        lengths[i] += len(block)
                    advance(sounds[r.path].seconds * (r.end - r.start))
            np.save(folder / f"{part}.npy", writer.power())
    np.save(folder / "lengths.npy", lengths)
    for r in recordings:
        if sha256(r.path) != r.sha256:
            raise InputError(f"{r.path}: changed while it was read; start again when it is no longer written to")
    if not any(n for n, r in zip(lengths, recordings, strict=True) if r.part == "train"):
        raise InputError("the train part has no samples; give longer recordings")
    if n_clipped > 1e-4 * lengths.sum():
        say(f"{n_clipped / lengths.sum():.2%} of all samples are at full scale: these recordings are clipped")


def _stretch(sound: Sound, r: Recording, rate: int):
    """Blocks of the samples of a recording."""
    channel = None if r.channel < 0 else r.channel
    blocks = samples(sound, rate, channel)
    if (r.start, r.end) == (0.0, 1.0):
        yield from blocks
        return
    n = -(-sound.n_frames * rate // sound.rate)
    first, last, at = round(r.start * n), round(r.end * n), 0
    for block in blocks:
        part = block[max(first - at, 0) : max(last - at, 0)]
        at += len(block)
        if len(part):
            yield part
        if at >= last:
            return


class _PartWriter:
    """Writes codes, and the mean square of each BLOCK of them."""

    def __init__(self, file: BinaryIO, codec: str):
        self.file, self.codec = file, codec
        self.squares = values(codec).numpy() ** 2
        self.sums, self.rest = [np.empty(0)], np.empty(0, np.uint8)

    def write(self, block: np.ndarray) -> None:
        codes = encode(block, self.codec)
        self.file.write(codes.data)
        self.rest = np.concatenate((self.rest, codes))
        self._sum(len(self.rest) // BLOCK * BLOCK)

    def power(self) -> np.ndarray:
        """float32 (blocks,)."""
        last = [self.squares[self.rest].mean(keepdims=True)] if len(self.rest) else []
        return np.concatenate([*self.sums, *last]).astype(np.float32)

    def _sum(self, n: int) -> None:
        if n:
            self.sums.append(self.squares[self.rest[:n]].reshape(-1, BLOCK).mean(1))
            self.rest = self.rest[n:]


def describe(recordings: Sequence[Recording], parts: dict[str, Recordings], rate: int) -> str:
    """Recordings and time of each part as a table, and what two parts have in common."""
    lines = [f"{p:<6}{len(parts[p]):>9,} recordings {parts[p].starts[-1] / rate:>12,.1f} s" for p in PARTS]
    for part in PARTS[1:]:
        earlier = {r.sha256 for r in recordings if PARTS.index(r.part) < PARTS.index(part) and r.end == 1.0}
        if copies := sum(r.sha256 in earlier for r in recordings if r.part == part and r.start == 0.0):
            lines.append(f"{copies} recordings of {part} are copies of recordings in an earlier part")
    return "\n".join(lines)


def write_splits_tsv(path: Path, recordings: Sequence[Recording]) -> None:
    """Which recording went to which part."""
    save_tsv(path, Recording._fields, recordings, errors="surrogateescape")
