"""Files that are either whole or not there."""

import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from .errors import InputError

_BESIDE = re.compile(r"\..+\.writing-\d+")


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to, beside `path`, that is renamed to it on success and removed on failure.

    Whatever happens meanwhile - an exception, a full disk, a kill - `path` holds its old content or the new one.
    Raises OSError that names `path` if it cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # of a folder that is none, which was said already
            beside.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether this is what a killed `written_whole` left beside a file."""
    return _BESIDE.fullmatch(path.name) is not None


def write_text(path: str | os.PathLike, text: str) -> None:
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tsv(file: TextIO, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)


def save_tsv(
    path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence[Any]], *, errors: str = "strict"
) -> None:
    """errors: what becomes of names that are no text, as of `open`."""
    with written_whole(path) as beside, beside.open("w", encoding="utf-8", errors=errors, newline="") as file:
        write_tsv(file, header, rows)


def require_new_folder(path: Path) -> None:
    """Raises InputError unless `path` is free, or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty folder; name a new one")
    require_writable(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, beside `path`, that is renamed to it on success and removed on failure.

    `path` is free, or an empty folder: see `require_new_folder`.
    """
    beside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)  # of a process of this number that was killed
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{path}: cannot be made ({error.strerror})") from error
    try:
        yield beside
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_writable(path: Path) -> None:
    """Raises InputError if it can be seen beforehand that `path`, or its folder, cannot be made: before long work."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        problem = "is no folder" if not above.is_dir() else "is a folder that you may not write to"
        raise InputError(f"{path}: cannot be made, for {above} {problem}")


def sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
