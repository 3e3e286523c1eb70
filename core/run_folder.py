"""The folder of a training run, which explains itself.

config.json, model.safetensors   the best model so far (hub.py)
manifest.json                    command, settings, seed, versions, checksums of the input files
log.jsonl, tensorboard/          what was logged, a JSON object a line
curves.png, metrics.json         written when the run ends
checkpoints/step-NNNNNNNN/       what --resume needs; only the newest is kept
(and the modality's own files: labels.json, splits.tsv, ...)
"""

import datetime
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import processes
from .config import SAME_RESULT
from .errors import InputError
from .files import is_leftover, sha256, write_json, write_text

MANIFEST, LOG = "manifest.json", "log.jsonl"
PACKAGES = ("polymamba", "torch", "triton", "numba", "numpy", "accelerate", "safetensors")


class RunFolder:
    """A run folder that belongs to the run of these settings: new, or resumed."""

    def __init__(self, path: str | Path, settings: dict[str, Any], inputs: Iterable[Path], *, resume: bool = False):
        """Claim `path`. Raises InputError if it holds something else, another run, or (resuming) no such run.

        settings  what determines the result; JSON-safe. A run resumes only under the settings that it began with, save
                  those that change the way to it only (config.SAME_RESULT).
        inputs    files whose checksums the manifest records, and a resumed run compares.
        """
        self.path = Path(path)
        with processes.first_alone():
            if processes.is_first():
                self._claim(settings, inputs, resume)

    def _claim(self, settings: dict[str, Any], inputs: Iterable[Path], resume: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: a file; the output must be a folder")
        checksums = checksums_of(inputs)
        settings = json.loads(json.dumps(settings))
        if (self.path / MANIFEST).is_file():
            self._claim_existing(settings, checksums, resume)
            return
        if self.path.is_dir() and not all(is_leftover(entry) for entry in self.path.iterdir()):
            raise InputError(f"{self.path}: holds other files and no run; give a new or empty folder")
        if resume:
            raise InputError(f"{self.path}: holds no run to resume; leave --resume out to begin one")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.path}: cannot be made ({error.strerror})") from error
        write_manifest(self.path, settings, checksums)

    def _claim_existing(self, settings: dict[str, Any], inputs: dict[str, str], resume: bool) -> None:
        if not resume:
            raise InputError(f"{self.path}: already holds a run; continue it with --resume, or give another folder")
        manifest = self._read_manifest()
        for what, old, new in (
            ("setting", _that_matter(manifest["settings"]), _that_matter(settings)),
            ("checksum of", manifest["inputs_sha256"], inputs),
        ):
            changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            if changed:
                key = changed[0]
                raise InputError(
                    f"{self.path}: cannot resume: {what} {key} was {old.get(key)!r} and is now {new.get(key)!r}"
                )

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            return {key: dict(manifest[key]) for key in ("settings", "inputs_sha256")}
        except (ValueError, LookupError, TypeError):
            problem = "damaged, or not of a run; begin anew in another folder"
            raise InputError(f"{self.path / MANIFEST}: {problem}") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # Log

    def append_log(self, record: dict[str, Any]) -> None:
        with open(self / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        if not (self / LOG).exists():
            return []
        lines = (self / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last line

    def rewind_log(self, n_records: int) -> None:
        """Keep the first `n_records` only: a resumed run will log the others again."""
        kept = [json.dumps(record) + "\n" for record in self.read_log()[:n_records]]
        write_text(self / LOG, "".join(kept))

    # Checkpoints

    def save_checkpoint(self, step: int, save: Callable[[Path], object]) -> None:
        """Let `save` fill a folder, rename it into place, and only then remove the older ones.

        Of several processes all have to call it, and each calls `save`.
        """
        checkpoints = self / "checkpoints"
        beside, final = checkpoints / f".writing-{step:08d}", checkpoints / f"step-{step:08d}"
        while final.exists():  # one of this step already: it is removed when the new one is there, as all others are
            final = final.with_name(f"{final.name}+")
        if processes.is_first():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        processes.wait()
        try:
            save(beside)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        processes.wait()
        if not processes.is_first():
            return
        os.replace(beside, final)
        for other in checkpoints.iterdir():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    def latest_checkpoint(self) -> Path | None:
        return max((self / "checkpoints").glob("step-*"), default=None)


def _that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in SAME_RESULT}


def checksums_of(inputs: Iterable[Path]) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(inputs)}


def write_manifest(folder: Path, settings: dict[str, Any], checksums: dict[str, str]) -> None:
    """Say in manifest.json what made the folder: command, settings, versions, machine and input files."""
    manifest = {
        "command": sys.argv,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
        "versions": _versions(),
        "settings": settings,
        "inputs_sha256": checksums,
    }
    write_json(folder / MANIFEST, manifest)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
