"""Labelled images, whatever holds them, and their division into train, valid and test.

n images, K classes. Parts that the source names stay as they are; what is missing is set aside from train, by class,
images of the same content staying together.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core import inputs
from ..core.errors import InputError
from ..core.files import save_tsv, sha256
from ..core.inputs import PARTS
from .config import Dividing
from .images import Item

PART_OF = inputs.PART_OF | {"training": "train", "dev": "valid", "testing": "test", "t10k": "test"}


@dataclass(frozen=True)
class ImageSet:
    """Images with a name and a class each."""

    items: Sequence[Item]  # what read_image takes
    names: list[str]  # (n,): a path, or file and number
    labels: np.ndarray  # (n,) int64, indices into the classes
    classes: tuple[str, ...]
    parts: np.ndarray  # (n,) str: train, valid, test, or "" where the source does not say
    files: tuple[Path, ...] = ()  # that all images are in; () if each image is a file

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, chosen: np.ndarray) -> "ImageSet":
        """Of the images at these places."""
        names = [self.names[i] for i in chosen]
        items = Chosen(self.items, chosen)
        return replace(self, items=items, names=names, labels=self.labels[chosen], parts=self.parts[chosen])

    def part(self, name: str) -> "ImageSet":
        return self.subset(np.flatnonzero(self.parts == name))

    def describe(self) -> str:
        counts = [f"{part} {int((self.parts == part).sum()):,}" for part in PARTS if (self.parts == part).any()]
        return f"{len(self):,} images of {len(self.classes)} classes: {', '.join(counts)}"

    def digest(self) -> str:
        """Of names, labels, parts and sizes of files: what a resumed run must find unchanged."""
        digest = hashlib.sha256()
        for item, name, label, part in zip(self.items, self.names, self.labels, self.parts, strict=True):
            size = item.stat().st_size if isinstance(item, Path) else len(item)
            digest.update(f"{name}\t{self.classes[label]}\t{part}\t{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def write_splits(self, path: Path) -> None:
        rows = ([n, self.classes[label], p] for n, label, p in zip(self.names, self.labels, self.parts, strict=True))
        save_tsv(path, ["image", "class", "part"], rows, errors="replace")


class Joined(Sequence):
    """Several sequences, one after another, none of them copied."""

    def __init__(self, sequences: Sequence[Sequence[Any] | np.ndarray]):
        self.sequences, self.ends = sequences, np.cumsum([len(s) for s in sequences])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        which = int(np.searchsorted(self.ends, i, side="right"))
        return self.sequences[which][int(i - (self.ends[which - 1] if which else 0))]


class Chosen(Sequence):
    """Some of a sequence, none of it copied."""

    def __init__(self, items: Sequence[Any], chosen: np.ndarray):
        self.items, self.chosen = items, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: Any) -> Any:
        return self.items[int(self.chosen[i])]


def contents(images: ImageSet) -> np.ndarray:
    """(n,) numbers, the same for images of the same bytes. Of files only those of equal size are read."""
    sizes = [item.stat().st_size if isinstance(item, Path) else 0 for item in images.items]
    once = {size for size, count in zip(*np.unique(sizes, return_counts=True), strict=True) if count == 1}
    keys: dict[Any, int] = {}
    found = np.empty(len(images), dtype=np.int64)
    for i, (item, size) in enumerate(zip(images.items, sizes, strict=True)):
        if isinstance(item, Path):
            key: Any = (size, i) if size in once else sha256(item)
        else:
            key = hashlib.sha256(item if isinstance(item, bytes) else np.ascontiguousarray(item).tobytes()).digest()
        found[i] = keys.setdefault(key, len(keys))
    return found


def divide(images: ImageSet, dividing: Dividing, seed: int) -> tuple[ImageSet, int]:
    """Every image with a part, and how many of valid and test also stand in train, by content.

    Raises InputError if train or valid would hold nothing, or a class none of train.
    """
    parts = np.where(images.parts == "", "train", images.parts)
    same = contents(images)
    rng = np.random.default_rng(seed)
    for part, share in (("valid", dividing.valid_fraction), ("test", dividing.test_fraction)):
        if not share or (images.parts == part).any():
            continue
        rest = 1 - dividing.valid_fraction if part == "test" and not (images.parts == "valid").any() else 1.0
        for label in range(len(images.classes)):
            _set_aside(
                parts, part, share / rest, np.flatnonzero((parts == "train") & (images.labels == label)), same, rng
            )
    for part in ("train", "valid"):
        if not (parts == part).any():
            raise InputError(f"no image is left for the {part} part: too few images, or see --{part}-fraction")
    for label, name in enumerate(images.classes):
        if not (parts[images.labels == label] == "train").any():
            raise InputError(f"class {name!r}: no image in the train part")
    copies = int(np.isin(same[parts != "train"], same[parts == "train"]).sum())
    return replace(images, parts=parts), copies


def _set_aside(
    parts: np.ndarray, part: str, share: float, among: np.ndarray, same: np.ndarray, rng: np.random.Generator
) -> None:
    """Move that share of the images `among` from train to `part`, at least one of two or more; copies together."""
    groups = [among[same[among] == content] for content in rng.permutation(np.unique(same[among]))]
    wanted = max(round(share * len(among)), 1) if len(groups) > 1 else 0
    for group in groups[:-1]:  # one stays
        if wanted < len(group):
            continue
        parts[group] = part
        wanted -= len(group)
