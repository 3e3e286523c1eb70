"""What is made of the user's files once, and then read at each start: a corpus, mapped into memory.

FOLDER/<fingerprint>/    of what it is made of: what is made of something else gets another folder
    ...                  the files
    manifest.json        what they are made of, and their checksums
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import new_folder, sha256, write_json
from .processes import is_first
from .terminal import say

MANIFEST = "manifest.json"


def made_once(folder: Path, what: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder in `folder` with what is made of `what` (plain JSON, a version of the files' layout in it), unchanged.

    If there is none, `make` fills a new one. One that was damaged is made anew, which is said. Of several processes the
    first looks at it, and the others take what they find (`processes.first_alone`). What another program has made
    meanwhile is taken, too. Raises OSError if it cannot be written, and what `make` raises; nothing is left then.
    """
    made = folder / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    if is_first() and made.exists() and (problem := _damage(made, what)):
        say(f"{made}: {problem}; building it anew")
        shutil.rmtree(made)
    if not made.exists():
        try:
            with new_folder(made) as beside:
                make(beside)
                checksums = {file.name: sha256(file) for file in sorted(beside.iterdir())}
                write_json(beside / MANIFEST, {**what, "sha256": checksums})
        except OSError:
            if not (made / MANIFEST).exists():
                raise
    return made


def _damage(made: Path, what: dict[str, Any]) -> str | None:
    """What is wrong with a folder, or None."""
    try:
        manifest = json.loads((made / MANIFEST).read_text(encoding="utf-8"))
        if other := [name for name, value in what.items() if manifest[name] != value]:
            return f"{MANIFEST} lists other {other[0]}"
        for name, checksum in dict(manifest["sha256"]).items():
            if sha256(made / name) != checksum:
                return f"{name} is damaged (its checksum is another one)"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"damaged ({type(error).__name__})"
    return None
