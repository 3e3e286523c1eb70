"""Words of a command line -> files of sequences; and which files in a folder are such by their names."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...core.errors import InputError

SEQUENCE_ENDINGS = ".fa .fasta .fna .ffn .fas .fq .fastq .gb .gbk .gbff .genbank .embl, also with .gz or .bgz"
_SEQUENCE_FILE = re.compile(
    r"(.+)\.(fa|fasta|fna|ffn|fas|fq|fastq|gb|gbk|gbff|genbank|embl)(\.gz|\.bgz)?", re.IGNORECASE
)
_DOCUMENT = re.compile(r"(README|LICEN[CS]E).*|.*\.(txt|md|tsv|json|fai|gzi)", re.IGNORECASE)


def find_files(word: str | Path) -> list[Path]:
    """The sequence files that `word` stands for, sorted: a file, a folder, a glob pattern (`**` too), or "-" (stdin).

    A folder stands for the files in it, which must all be named as sequences (SEQUENCE_ENDINGS); a pattern for every
    file that it matches. Both pass over hidden files and documents (README, .txt, .fai, ...).
    Raises InputError if there is no such file, or a folder holds anything else.
    """
    path = Path(word)
    if path.is_dir():
        return files_in(path)
    if str(word) == "-" or path.exists():
        return [path]
    if not glob.has_magic(str(word)):
        raise InputError(f"{word}: no such file or folder")
    found = {Path(match) for match in glob.iglob(str(word), recursive=True)}
    files = sorted(file for file in found if not file.is_dir() and not _DOCUMENT.fullmatch(file.name))
    if not files:
        beside = " but documents or folders" if found else ""
        raise InputError(f"{word}: matches nothing{beside}; give a file, a folder or a pattern such as 'data/**/*.fa'")
    return files


def files_of(words: Sequence[str | Path]) -> list[Path]:
    """The sequence files that these words stand for. Raises InputError for a file given twice."""
    return given_once(path for word in words for path in find_files(word))


def given_once(paths: Iterable[Path]) -> list[Path]:
    """The paths. Raises InputError for a file given twice."""
    found: dict[Path, Path] = {}
    for path in paths:
        if found.setdefault(path.resolve(), path) is not path:
            raise InputError(f"{path}: given twice")
    return list(found.values())


def files_in(folder: Path) -> list[Path]:
    """The sequence files in `folder`, sorted by name. Raises InputError if there is none, or anything else."""
    files = data_entries(folder)
    for file in files:
        if file.is_dir():
            deeper = f"a pattern, '{folder}/**/*.fa', reads folders too"
            raise InputError(f"{file}: a folder in {folder}, of which files alone are read; {deeper}")
        stem_of(file)
    if not files:
        raise InputError(f"{folder}: holds no sequence file ({SEQUENCE_ENDINGS})")
    return files


def stem_of(file: Path) -> str:
    """The name of a sequence file without its ending. Raises InputError if it is none by its name."""
    match = _SEQUENCE_FILE.fullmatch(file.name)
    if match is None:
        raise InputError(f"{file}: not named as a sequence file ({SEQUENCE_ENDINGS}); rename it or move it away")
    return match[1]


def data_entries(folder: Path) -> list[Path]:
    """The files and folders in `folder`, sorted by name, without hidden files and documents."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return [entry for entry in entries if entry.is_dir() or not _DOCUMENT.fullmatch(entry.name)]
