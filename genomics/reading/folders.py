"""A folder of sequence files -> which file is of which class and part, by names alone.

    donor.fa  acceptor.fa.gz              one file a class
    donor/*.fa  acceptor/*.fa             one folder a class
    train/...  valid/...  test/...        either of them, below the parts of a split

Hidden files and documents (README, .txt, ...) are passed over. Any other file that is not named as a sequence file is
refused, so that no class is left out in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ...core.errors import InputError
from ...core.inputs import PARTS
from ..config import PART_OF
from .files import SEQUENCE_ENDINGS, data_entries, files_in, stem_of


class LabelledFile(NamedTuple):
    """A sequence file, and what its records are."""

    split: str  # one of PARTS
    label: str  # class name
    path: Path


def files_in_folder(path: str | Path) -> list[LabelledFile]:
    """The files of a data folder, sorted by part, class and name; all of the train part if it has no parts.

    Raises InputError if the folder is not laid out in one of the three ways, or has a part or class without a file.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}")
    parts = _parts(path) or {"train": path}
    return [
        LabelledFile(part, label, file)
        for part in PARTS
        if part in parts
        for label, files in _classes(parts[part]).items()
        for file in files
    ]


def _parts(path: Path) -> dict[str, Path]:
    """Part -> its folder directly below `path`; {} if no folder is named like a part."""
    parts: dict[str, Path] = {}
    others = []
    for entry in data_entries(path):
        part = PART_OF.get(entry.name.lower()) if entry.is_dir() else None
        if part is None:
            others.append(entry)
        elif part in parts:
            raise InputError(f"{path}: folders {parts[part].name} and {entry.name} both name the {part} part")
        else:
            parts[part] = entry
    if parts and others:
        beside = next(iter(parts.values())).name
        raise InputError(f"{others[0]}: lies beside folder {beside}; put it into a part or move it away")
    return parts


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its files, from the files and folders directly in `folder`."""
    classes: dict[str, list[Path]] = {}
    for entry in data_entries(folder):
        label = entry.name if entry.is_dir() else stem_of(entry)
        if label.lower() in PART_OF:
            raise InputError(f"{entry}: named as a part of a split, not as a class; parts are folders of classes")
        if label in classes:
            raise InputError(f"{entry}: a second file or folder for class {label!r} in {folder}")
        classes[label] = files_in(entry) if entry.is_dir() else [entry]
    if not classes:
        raise InputError(f"{folder}: holds no sequence file ({SEQUENCE_ENDINGS})")
    return classes
