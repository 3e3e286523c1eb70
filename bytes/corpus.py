"""From files to a divided corpus on disk, which training reads by position.

    files -> `divide`: which document is of which part -> `open_corpus`: a file for each part, made once

FOLDER/<fingerprint>/           of the documents, their contents and their parts (core/made_once.py)
    train.bin valid.bin test.bin    the documents of a part, end to end
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..core.errors import InputError
from ..core.files import save_tsv, sha256, written_whole
from ..core.inputs import PARTS, named_part
from ..core.made_once import made_once
from ..core.terminal import progress_bar, say
from .config import Dividing
from .documents import Document, Documents, whole_files

LAYOUT = 2  # raised whenever what is made of the same documents would be other files


class Piece(NamedTuple):
    """A document, or what of it belongs to one part."""

    path: str
    part: str  # one of PARTS
    start: int  # first byte of the file
    size: int
    sha256: str  # of the whole file


def divide(files: Sequence[Path], dividing: Dividing, seed: int) -> list[Piece]:
    """Each document's part. Empty files are left out, which is said.

    A path names a part by a folder above the file, or by the file's name up to its ending: train/a.txt, valid.txt.
    Of the others' documents valid and test are taken, unless they were named, in an order that the seed and the
    documents' contents give: the same ones wherever the files lie, and all copies of a document together.
    Raises InputError if too few documents are left.
    """
    documents = whole_files(files)
    if len(documents) < len(files):
        say(f"{len(files) - len(documents)} empty files passed over")
    pieces = []
    with progress_bar("checksums", sum(document.size for document in documents), "bytes") as advance:
        for document in documents:
            pieces.append(
                Piece(str(document.path), named_part(document.path) or "train", 0, document.size, sha256(document.path))
            )
            advance(document.size)
    named = {piece.part for piece in pieces}
    wanted = {"valid": dividing.valid_fraction, "test": dividing.test_fraction}
    wanted = {part: fraction for part, fraction in wanted.items() if part not in named and fraction > 0}
    if wanted:
        cut = _cut_each if dividing.split_by == "position" else _draw_documents
        pieces = cut(pieces, wanted, seed)
    if not any(piece.part == "train" for piece in pieces):
        raise InputError("no document is left for the train part; their paths name only valid and test")
    return sorted(pieces)


def _draw_documents(pieces: list[Piece], wanted: dict[str, float], seed: int) -> list[Piece]:
    """Let some documents of train change to the wanted parts: at least one each."""
    contents = {piece.sha256 for piece in pieces if piece.part == "train"}
    if len(contents) <= len(wanted):
        raise InputError(
            f"{len(contents)} different documents cannot be divided into train and {' and '.join(wanted)}; give more "
            "files, name paths (train/..., valid/...), or hold out the end of each file with --split-by position"
        )
    order = sorted(contents, key=lambda content: hashlib.sha256(f"{seed} {content}".encode()).digest())
    part_of: dict[str, str] = {}
    for part, fraction in wanted.items():
        n = max(1, round(fraction * len(contents)))
        n = min(n, len(order) - 1 - (len(wanted) - 1 if part == "valid" else 0))  # leave one for each part to come
        part_of |= dict.fromkeys(order[:n], part)
        order = order[n:]
    return [p._replace(part=part_of.get(p.sha256, p.part)) if p.part == "train" else p for p in pieces]


def _cut_each(pieces: list[Piece], wanted: dict[str, float], seed: int) -> list[Piece]:
    """Let the end of each document of train change to the wanted parts, valid before test. Nothing is drawn."""
    result = []
    for piece in pieces:
        if piece.part != "train":
            result.append(piece)
            continue
        sizes = {part: int(fraction * piece.size) for part, fraction in wanted.items()}
        start = 0
        for part, size in {"train": piece.size - sum(sizes.values()), **sizes}.items():
            result.append(piece._replace(part=part, start=start, size=size))
            start += size
    for part in wanted:
        if not any(piece.part == part and piece.size for piece in result):
            raise InputError(
                f"--split-by position: the documents are too short to cut a {part} part off; give more text"
            )
    return [piece for piece in result if piece.size]


def open_corpus(folder: Path, pieces: Sequence[Piece]) -> dict[str, Documents]:
    """The parts of a corpus, part -> documents, from the cache in `folder`; built there first if it is not.

    A cache whose files were damaged is built anew, which is said: see `made_once`.
    Raises InputError if a document changed meanwhile, and OSError if the cache cannot be written.
    """
    what = {"layout": LAYOUT, "documents": [piece._asdict() for piece in pieces]}
    cache = made_once(folder, what, lambda beside: _build(beside, pieces))
    return {part: Documents(_placed(cache / f"{part}.bin", pieces, part)) for part in PARTS}


def describe(pieces: Sequence[Piece]) -> str:
    """Documents and bytes of each part as a table, and what two parts have in common."""
    lines = []
    for part in PARTS:
        sizes = [piece.size for piece in pieces if piece.part == part]
        lines.append(f"{part:<6}{len(sizes):>9,} documents {sum(sizes):>16,} bytes")
    for part in PARTS[1:]:
        earlier = {p.sha256 for p in pieces if PARTS.index(p.part) < PARTS.index(part) and p.start == 0}
        if copies := sum(p.sha256 in earlier for p in pieces if p.part == part and p.start == 0):
            lines.append(f"{copies} documents of {part} are copies of documents in an earlier part")
    return "\n".join(lines)


def write_splits_tsv(path: Path, pieces: Iterable[Piece]) -> None:
    """Which document went to which part: columns path, part, start, size, sha256."""
    save_tsv(path, Piece._fields, pieces, errors="surrogateescape")


def _placed(file: Path, pieces: Sequence[Piece], part: str) -> list[Document]:
    """The documents of a part, where they stand in its .bin file."""
    placed, start = [], 0
    for piece in pieces:
        if piece.part == part:
            placed.append(Document(file, start, piece.size))
            start += piece.size
    return placed


def _build(folder: Path, pieces: Sequence[Piece]) -> None:
    with progress_bar("corpus", sum(piece.size for piece in pieces), "bytes") as advance:
        for part in PARTS:
            with written_whole(folder / f"{part}.bin") as unfinished, unfinished.open("wb") as file:
                for piece in pieces:
                    if piece.part != part:
                        continue
                    document = hashlib.sha256()
                    for block in Document(Path(piece.path), piece.start, piece.size).blocks():
                        file.write(block.data)
                        document.update(block.data)
                        advance(len(block))
                    _require_unchanged(piece, document.hexdigest())


def _require_unchanged(piece: Piece, found: str) -> None:
    size = Path(piece.path).stat().st_size
    if (piece.size == size and found != piece.sha256) or piece.start + piece.size > size:
        raise InputError(f"{piece.path}: changed while it was read; start again when it is no longer written to")
