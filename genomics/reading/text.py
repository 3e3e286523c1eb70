"""The lines of a text file, plain, gzip or bgzip. A file is read whole or refused."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...core.errors import InputError
from .source import Source, opened


def read_lines(path: str | Path) -> Iterator[str]:
    """Each line without its end (LF or CRLF), streamed; UTF-8, with or without a byte order mark; "-": standard input.

    Raises InputError that names file and line: no such file, a folder, truncated or damaged compression, bytes that are
    no text, a file that changes meanwhile.
    """
    with opened(path) as source:
        yield from lines_of(source)


def lines_of(source: Source) -> Iterator[str]:
    """`read_lines` of a source that is open."""
    for number, raw in enumerate(_lines(source.blocks()), 1):
        yield _decoded(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, f"{source.name}, line {number}")
    source.check_unchanged()


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decoded(raw: bytes, where: str) -> str:
    try:
        line = raw.decode().removesuffix("\r")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{raw[error.start]:02x}"
        raise InputError(f"{where}: {byte}, which is not UTF-8 text; save the file as UTF-8") from None
    if "\0" in line:
        raise InputError(f"{where}: a NUL byte; the file is damaged or no text")
    if "\r" in line:
        raise InputError(f"{where}: a bare carriage return; convert the line ends to LF")
    return line
