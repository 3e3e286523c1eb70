"""The ways to hold labelled images -> one `ImageSet`.

folder     CLASS/image, or train/CLASS/image and so on: torchvision's and timm's ImageFolder
.csv .tsv  columns image (or path, file), label (or class), perhaps part (or split): paths from the file's own folder
.npz       x and y, or x_train, y_train, x_valid, ...; or images and labels, train_images, ... (MedMNIST's)
.parquet   a column of images and one of labels; or a folder of such files, each named after its part
stored     a folder that Hugging Face's `datasets.save_to_disk` wrote (stored.py, as for Parquet)
IDX        a folder with train-images-idx3-ubyte and so on, perhaps .gz (MNIST's)
"""

import csv
import gzip
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from ..core.terminal import say
from .dataset import PART_OF, Chosen, ImageSet, Joined
from .images import SUFFIXES, Item
from .stored import Shard, find_shards, read_shard


def read_source(path: Path) -> ImageSet:
    """Raises InputError for what is none of the above, naming the file and line or key."""
    if path.is_dir():
        if any(path.glob("*-images-idx3-ubyte*")):
            return _read_idx(path)
        shards = find_shards(path)
        return _read_stored(path, shards) if shards else _read_folder(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    readers: dict[str, Callable[[Path], ImageSet]] = {
        ".csv": _read_table,
        ".tsv": _read_table,
        ".npz": _read_npz,
        ".parquet": lambda p: _read_stored(p, find_shards(p)),
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: labelled images are a folder or one of {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def find_images(words: Iterable[Path]) -> tuple[Sequence[Item], list[str]]:
    """(images, names): of files, of folders at any depth in the order of their names, and of tables.

    Raises InputError if there are none.
    """
    found: list[Sequence[Item]] = []
    names: list[str] = []
    for path in (path for word in words for path in _existing(word)):
        shards = find_shards(path)
        for shard in shards:
            found.append(read_shard(shard.path, labelled=False).images)
            names += [f"{shard.path}[{i}]" for i in range(len(found[-1]))]
        if not shards:
            found.append(_images_below(path) if path.is_dir() else [path])
            names += map(str, found[-1])
    if not names:
        raise InputError(f"no image in {' '.join(map(str, words))}; files ending in {' '.join(sorted(SUFFIXES))}")
    return Joined(found), names


def _existing(word: Path) -> list[Path]:
    if word.exists():
        return [word]
    if any(c in word.name for c in "*?["):
        return sorted(word.parent.glob(word.name), key=_natural)
    raise InputError(f"{word}: no such file or folder")


def _natural(path: Path | str) -> list[Any]:
    """Sorts 2 before 10."""
    return [(int(s), s) if s.isdecimal() else (-1, s.lower()) for s in re.split(r"(\d+)", str(path))]


def _images_below(folder: Path) -> list[Path]:
    return sorted((p for p in _below(folder, set()) if p.suffix.lower() in SUFFIXES), key=_natural)


def _below(folder: Path, seen: set[Path]) -> Iterable[Path]:
    """Files at any depth, hidden ones and hidden folders passed over; `seen`: folders, as a link may lead back."""
    if folder.resolve() in seen:
        return
    seen.add(folder.resolve())
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_dir():
            yield from _below(entry, seen)
        elif entry.is_file():
            yield entry


def _image_set(
    items: Sequence[Item], names: list[str], labels: Sequence[str], parts: Sequence[str],
    classes: Sequence[str] | None = None, files: Iterable[Path] = (),
) -> ImageSet:  # fmt: skip
    """classes: if they are known beforehand; else those that occur, 2 before 10."""
    classes = tuple(sorted(set(labels), key=_natural) if classes is None else classes)
    if len(classes) < 2:
        raise InputError(f"images of one class only ({classes[0] if classes else 'none'}): nothing to tell apart")
    number = {name: i for i, name in enumerate(classes)}
    indices = np.array([number[label] for label in labels], dtype=np.int64)
    return ImageSet(items, names, indices, classes, np.array(parts, dtype="U5"), tuple(files))


def _read_folder(folder: Path) -> ImageSet:
    tops = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    in_parts = [entry for entry in tops if entry.name.lower() in PART_OF]
    roots = [(root, PART_OF[root.name.lower()]) for root in in_parts] or [(folder, "")]
    items, labels, parts = [], [], []
    for root, part in roots:
        for path in _images_below(root):
            inside = path.relative_to(root).parts
            if len(inside) < 2:
                continue
            items.append(path)
            labels.append(inside[0])
            parts.append(part)
    if not items:
        raise InputError(
            f"{folder}: no images in folders named after their classes; expected {folder}/CLASS/*.jpg, or "
            f"{folder}/train/CLASS/*.jpg"
        )
    return _image_set(items, [str(path) for path in items], labels, parts)


def _read_table(path: Path) -> ImageSet:
    wanted = {"image": ("image", "path", "file", "filename"), "label": ("label", "class", "target")}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = {name.strip().lower(): name for name in rows.fieldnames or () if name}
        column = {}
        for what, names in wanted.items():
            found = next((header[name] for name in names if name in header), None)
            if found is None:
                raise InputError(f"{path}, line 1: no column {' or '.join(names)}; there are {', '.join(header)}")
            column[what] = found
        of_part = next((header[name] for name in ("part", "split", "subset", "fold") if name in header), None)
        items, labels, parts = [], [], []
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            name, label = ((row[column[what]] or "").strip() for what in ("image", "label"))
            part = (row[of_part] or "").strip().lower() if of_part else ""
            if not name or not label:
                raise InputError(f"{where}: no {'image' if not name else 'label'}")
            if part and part not in PART_OF:
                raise InputError(f"{where}: part {part!r} is none of {', '.join(PART_OF)}")
            image = path.parent / name
            if not image.is_file():
                raise InputError(f"{where}: {image}: no such file")
            items.append(image)
            labels.append(label)
            parts.append(PART_OF.get(part, ""))
    if not items:
        raise InputError(f"{path}: no images in it")
    return _image_set(items, [str(p) for p in items], labels, parts, files=[path])


def _of_arrays(path: Path, found: Sequence[tuple[str, str, np.ndarray, np.ndarray]], files: Iterable[Path]) -> ImageSet:
    """found: (name, part, images, labels) of each array."""
    names, labels, parts = [], [], []
    for name, part, x, y in found:
        y = np.squeeze(y, axis=1) if y.ndim == 2 and y.shape[1] == 1 else y
        if y.ndim != 1 or len(x) != len(y) or x.ndim not in (3, 4):
            raise InputError(
                f"{path}: images {name} {x.shape} and labels {y.shape}; expected (n, H, W) or (n, H, W, C), and (n,)"
            )
        names += [f"{path}:{name}[{i}]" for i in range(len(x))]
        labels += [str(int(label)) if np.issubdtype(y.dtype, np.number) else str(label) for label in y]
        parts += [part] * len(x)
    return _image_set(Joined([x for _, _, x, _ in found]), names, labels, parts, files=files)


_PAIRS = [("x", "y"), ("images", "labels"), ("data", "labels"), ("image", "label"), ("X", "Y")]


def _read_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an .npz file of plain arrays ({error})") from None
    found = []
    for images, labels in _PAIRS:
        for word, part in (("", ""), *PART_OF.items()):
            for form in ("{0}_{1}", "{1}_{0}") if word else ("{0}",):
                x, y = form.format(images, word), form.format(labels, word)
                if x in arrays and y in arrays:
                    found.append((x, part, arrays[x], arrays[y]))
    if not found:
        raise InputError(f"{path}: no arrays x and y, or x_train and y_train; it has {', '.join(arrays)}")
    return _of_arrays(path, found, [path])


def _read_idx(folder: Path) -> ImageSet:
    found, files = [], []
    for images in sorted(folder.glob("*-images-idx3-ubyte*")):
        prefix = images.name.partition("-")[0]
        labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
        x, y = _read_idx_file(images), _read_idx_file(labels)
        found.append((prefix, PART_OF.get(prefix, ""), x, y))
        files += [images, labels]
    return _of_arrays(folder, found, files)


def _read_idx_file(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's format: magic 0 0 8 dimensions, the sizes as big-endian int32, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    begin = 4 + 4 * (content[3] if len(content) > 3 else 0)
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, begin, 4)]
    if content[:3] != b"\0\0\x08" or len(content) != begin + math.prod(sizes):
        raise InputError(f"{path}: not an IDX file of bytes, or cut short")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(sizes)


def _read_stored(path: Path, shards: Sequence[Shard]) -> ImageSet:
    of_parts = [shard for shard in shards if shard.split.lower() in PART_OF]
    if of_parts and len(of_parts) < len(shards):
        others = sorted({shard.split for shard in shards if shard not in of_parts})
        say(f"{path}: left out what is of none of the parts: {', '.join(others)}")
        shards = of_parts
    images, names, labels, parts, declared = [], [], [], [], []
    for shard in shards:
        table = read_shard(shard.path, labelled=True)
        images.append(table.images)
        names += [f"{shard.path}[{i}]" for i in range(len(table.images))]
        labels += table.labels
        parts += [PART_OF.get(shard.split.lower(), "")] * len(table.images)
        declared.append(table.classes)
    known = np.array([i for i, label in enumerate(labels) if label is not None], dtype=np.int64)
    if len(known) < len(labels):
        say(f"{path}: left out {len(labels) - len(known):,} images without a label")
    classes = None if None in declared else list(dict.fromkeys(name for names in declared for name in names))
    names, labels, parts = ([column[i] for i in known] for column in (names, labels, parts))
    return _image_set(Chosen(Joined(images), known), names, labels, parts, classes, [shard.path for shard in shards])
