"""Tables of images as Hugging Face's datasets leave them on disk, read with pyarrow and nothing else.

save_to_disk    a folder with state.json, which names its .arrow files (Arrow's stream format); or dataset_dict.json
                and such a folder for each split
hub snapshot    Parquet files, each named after its split (train-00000-of-00002.parquet) or in a folder so named

One column holds the images: as {bytes, path}, as bytes, or as paths from the file's own folder. Another may hold the
classes, as words or numbers; a ClassLabel's numbers have names in the schema's metadata.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from .dataset import PART_OF
from .images import Item

STATE, SPLITS, INFO = "state.json", "dataset_dict.json", "dataset_info.json"
DEPTHS = ("*.parquet", "*/*.parquet", "*/*/*.parquet")  # the first that matches anything is what is meant
COLUMNS = {"Image": ("image", "img"), "ClassLabel": ("label", "labels", "class", "fine_label")}  # what else: by type


@dataclass(frozen=True)
class Shard:
    """One file of a table, and what its split is called: "" if nothing says."""

    path: Path
    split: str


def find_shards(path: Path) -> list[Shard]:
    """Of a folder as above, or of one .parquet file; none if it is neither. InputError for a damaged folder."""
    if path.is_file():
        return [Shard(path, _split_of(Path(path.name)))] if path.suffix.lower() == ".parquet" else []
    if (path / SPLITS).is_file():
        splits = _read_json(path / SPLITS, "splits", list)
        return [Shard(file, str(split)) for split in splits for file in _arrow_files(path / str(split))]
    if (path / STATE).is_file():
        return [Shard(file, "") for file in _arrow_files(path)]
    for depth in DEPTHS:
        inside = [file.relative_to(path) for file in sorted(path.glob(depth))]
        inside = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
        sets = {part for file in inside for part in file.parts[:-1] if part != "data" and part.lower() not in PART_OF}
        if len(sets) > 1:
            raise InputError(f"{path}: several data sets ({', '.join(sorted(sets))}); name the folder of one")
        if inside:
            return [Shard(path / file, _split_of(file)) for file in inside]
    return []


def _arrow_files(folder: Path) -> list[Path]:
    entries = _read_json(folder / STATE, "_data_files", list)
    try:
        files = [folder / entry["filename"] for entry in entries]
    except (TypeError, LookupError):
        raise InputError(f"{folder / STATE}: names no files under '_data_files'") from None
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise InputError(f"{missing}: no such file, but {STATE} beside it names it")
    return files


def _read_json(path: Path, key: str, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `datasets.save_to_disk` writes one") from None
    except (ValueError, LookupError, TypeError):
        value = None
    if not isinstance(value, kind):
        raise InputError(f"{path}: damaged: no JSON with {key!r}")
    return value


def _split_of(inside: Path) -> str:
    """That of a file's name, or of the nearest folder with a split's name; else what the file's name begins with."""
    own = re.split(r"[-_.]", inside.name)[0]
    return next((word for word in (own, *reversed(inside.parts[:-1])) if word.lower() in PART_OF), own)


class Images(Sequence):
    """The images of a column, read one by one."""

    def __init__(self, column: Any, folder: Path):
        self.column, self.folder = column, folder

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, i: Any) -> Item:
        cell = self.column[int(i)].as_py()
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        return self.folder / cell if isinstance(cell, str) else cell or b""


@dataclass(frozen=True)
class Table:
    """What a shard holds: n images, and the class of each, None where it is not known."""

    images: Images
    labels: list[str | None]  # (n,), or () if it was not asked for
    classes: list[str] | None  # in their order, if that is declared


def read_shard(path: Path, *, labelled: bool) -> Table:
    """Raises InputError for a damaged file, a missing column, or one that holds something else."""
    table = _read_table(path)
    features = _features(path, table.schema.metadata)
    image = _column(path, table.column_names, features, "Image")
    kind = str(table.schema.field(image).type)
    if not re.match(r"(large_)?(binary|string)\b|struct<", kind):
        raise InputError(f"{path}: column {image} holds {kind[:60]}; expected images as bytes, or {{bytes, path}}")
    images = Images(table[image], path.parent)
    if not labelled:
        return Table(images, [], None)
    label = _column(path, table.column_names, features, "ClassLabel")
    names = features.get(label, {}).get("names")
    labels = [_label(value, names, f"{path}[{i}]") for i, value in enumerate(table[label].to_pylist())]
    return Table(images, labels, names)


def _read_table(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"
        raise InputError(f"{path}: {kind} needs pyarrow (pip install 'polymamba[parquet]')") from None
    try:
        if path.suffix.lower() == ".parquet":
            return pq.ParquetFile(path).read()
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # of offsets: pyarrow trusts a stream's, and a wrong one ends the process
        table.slice(0, 1).to_pylist()  # UnicodeDecodeError if the name of a column or field is damaged
        return table
    except (OSError, ValueError, pa.ArrowException) as error:
        kind = "a Parquet file" if path.suffix.lower() == ".parquet" else "a file of Arrow's stream format"
        raise InputError(f"{path}: not {kind}, or damaged ({' '.join(str(error).split())[:100]})") from None


def _features(path: Path, metadata: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of each column: of the schema's metadata, else of the file beside an .arrow file."""
    try:
        features = dict(json.loads(metadata[b"huggingface"])["info"]["features"])
    except (LookupError, TypeError, ValueError):
        info = path.with_name(INFO)
        features = _read_json(info, "features", dict) if info.is_file() else {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _column(path: Path, names: list[str], features: dict[str, dict[str, Any]], kind: str) -> str:
    """By its name, else the only one of this kind."""
    by_kind = [name for name in names if features.get(name, {}).get("_type") == kind]
    found = [name for name in COLUMNS[kind] if name in names] or (by_kind if len(by_kind) == 1 else [])
    if not found:
        raise InputError(f"{path}: no column {' or '.join(COLUMNS[kind])}; there are {', '.join(names)}")
    return found[0]


def _label(value: Any, names: list[str] | None, where: str) -> str | None:
    if value is None or (names is not None and value == -1):  # datasets' number of a class that is not known
        return None
    if isinstance(value, list | dict):
        raise InputError(f"{where}: several values as its label; expected one class")
    if names is None or isinstance(value, str):
        return str(value)
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise InputError(f"{where}: label {value} is none of the {len(names)} classes that the file declares")
    return str(names[value])
