"""Files that are either whole or not there."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path to write to, beside `path`, that is renamed to it on success and removed on failure.

    Whatever happens meanwhile - an exception, a full disk, a kill - `path` holds its old content or the new one.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    with written_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def require_new_folder(path: Path) -> None:
    """Raises InputError unless `path` is free, or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty folder")


def sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
