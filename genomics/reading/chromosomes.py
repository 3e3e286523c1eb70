"""Which sequence of a genome a chromosome's name means, and reading the chromosomes that are wanted."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...core.errors import InputError
from ..alphabet import hard_masked
from .format import Record
from .several import read_each

_PREFIX = re.compile(r"^(chromosome|chrom|chr)[_.-]?(?=.)")
_LEADING_ZEROS = re.compile(r"^0+(?=[0-9])")
_BETWEEN_PARTS = re.compile(r"[:|]")


def match_names(wanted: Mapping[str, str], known: Iterable[str], *, skip_unknown: bool = False) -> dict[str, str]:
    """Wanted chromosome name -> the sequence among `known` that it means.

    wanted         name -> where it stands (file and line, or option), for messages
    known          the names of the genome's sequences
    skip_unknown   leave out a name that means none of them

    An equal name goes first. Otherwise two names mean the same if they differ only in case, a prefix chr, chrom or
    chromosome, leading zeros, or as M and MT do; and a name in several parts, such as `Umaydis:chr01:1:+:2476500` or
    `NC_000001.11|chr1`, means what one of its parts does, numbers apart (they may be positions).
    Raises InputError for a name that means more than one of the sequences, and for one that means none.
    """
    known = list(known)
    meanings: dict[str, set[str]] = defaultdict(set)
    for name in known:
        for key in _keys(name):
            meanings[key].add(name)
    matches = {}
    for name, where in wanted.items():
        candidates = meanings[_key(name)]
        if name in candidates:
            matches[name] = name
        elif len(candidates) == 1:
            (matches[name],) = candidates
        elif candidates:
            both = " or ".join(repr(candidate) for candidate in sorted(candidates))
            raise InputError(f"{where}: chromosome {name!r} may mean {both} of the genome; use the genome's own name")
        elif not skip_unknown:
            raise InputError(f"{where}: chromosome {name!r} is not in the genome, which has {_some(known)}")
    return matches


def read_chromosomes(
    genome: Sequence[str | Path], wanted: Mapping[str, str], *, hard_mask: bool = False
) -> dict[str, tuple[str, np.ndarray]]:
    """Wanted chromosome name -> the genome's own name for it, and its tokens, uint8 (L,).

    genome       files that read_records reads
    wanted       as for match_names
    hard_mask    lower-case letters are read as N

    Each file is read once, and of its sequences no more is kept than the tokens of those that a wanted name may mean.
    Raises InputError as read_records and match_names do, and for a name that two of those sequences have.
    """
    keys = {_key(name) for name in wanted}
    tokens: dict[str, np.ndarray] = {}
    source: dict[str, str | Path] = {}
    known = []

    def keep(record: Record) -> tuple[str, np.ndarray | None]:
        if keys.isdisjoint(_keys(record.name)):
            return record.name, None
        return record.name, hard_masked(record.tokens, record.sequence) if hard_mask else record.tokens

    for path, records in zip(genome, read_each([Path(path) for path in genome], keep), strict=True):
        for name, ids in records:
            known.append(name)
            if ids is None:
                continue
            if name in source:
                both = f"{source[name]} and {path}"
                raise InputError(f"{both}: both hold a chromosome {name!r}; rename or leave out one")
            tokens[name] = ids
            source[name] = path
    return {name: (match, tokens[match]) for name, match in match_names(wanted, known).items()}


def _key(name: str) -> str:
    """The same for names that mean the same."""
    bare = _LEADING_ZEROS.sub("", _PREFIX.sub("", name.lower()))
    return "mt" if bare == "m" else bare


def _keys(name: str) -> set[str]:
    """The key of a name, and those of its parts that hold a letter."""
    parts = [part for part in _BETWEEN_PARTS.split(name) if re.search("[a-zA-Z]", part)]
    return {_key(part) for part in (name, *parts)}


def _some(names: Sequence[str]) -> str:
    """The first few names, in words."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
