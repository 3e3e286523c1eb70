"""Which files the user means, and which part of a data set a path names."""

import os
from collections.abc import Sequence
from pathlib import Path

from .errors import InputError

PARTS = ("train", "valid", "test")
PART_OF = dict(zip(PARTS, PARTS, strict=True)) | {"val": "valid", "validation": "valid"}


def require_files(words: Sequence[Path]) -> None:
    """Raises ValueError if nothing was named."""
    if not words:
        raise ValueError("no files; name at least one file or folder")


def require_at_least_1(**values: int | None) -> None:
    """Raises ValueError for a value below 1, by its name; None is left out."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def require_shares(**values: float) -> None:
    """Raises ValueError for a value outside 0 to 1, by its name."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it is a share from 0 to 1")


def require_fractions(valid: float, test: float) -> None:
    """Raises ValueError unless validation and test parts of these shares leave something to train on."""
    if not (valid > 0 and test >= 0 and valid + test < 1):
        raise ValueError(
            f"valid_fraction is {valid}, test_fraction {test}; the first must be above 0, the second not negative, "
            "their sum below 1"
        )


def part_called(name: str) -> str | None:
    """The part that a file or folder of this name is, if any; not dev: many a folder above is called so."""
    return PART_OF.get(name)


def named_part(path: Path) -> str | None:
    """The part that a path names: the nearest of its file name up to the ending and the folders above it."""
    names = (path.name.split(".")[0], *reversed(path.parent.parts))
    return next(filter(None, map(part_called, names)), None)


def find_files(words: Sequence[Path], leave_out: Path | None = None) -> list[Path]:
    """The files that `words` name, and those in the folders they name, at any depth: sorted, each once.

    Hidden files and folders in a folder are passed over, and so is the folder `leave_out`; links are followed.
    Raises InputError for what does not exist, cannot be read, or is no ordinary file, and for folders without a file.
    """
    found: dict[Path, Path] = {}  # the file itself -> the first name under which it was seen
    for word in words:
        if not word.exists():
            raise InputError(f"{word}: no such file or folder")
        files = _files_below(word, leave_out) if word.is_dir() else [word]
        if not files:
            raise InputError(f"{word}: a folder without files (hidden ones do not count)")
        for file in files:
            _require_readable(file)
            found.setdefault(file.resolve(), file)
    return sorted(found.values())


def _files_below(folder: Path, leave_out: Path | None) -> list[Path]:
    files: list[Path] = []
    seen = set() if leave_out is None else {leave_out.resolve()}

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if Path(root).resolve() in seen:  # a link may lead back
            folders.clear()
            continue
        seen.add(Path(root).resolve())
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return files


def _require_readable(file: Path) -> None:
    if not file.exists():
        raise InputError(f"{file}: a link to nothing; remove it, or leave its folder out")
    if not file.is_file():
        raise InputError(f"{file}: no ordinary file")
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
