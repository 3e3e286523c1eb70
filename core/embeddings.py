"""Files of embeddings, with what each row is of.

x.npy       one array (n, D) float32; the columns that say what its rows are of in x.names.tsv beside it
x.parquet   those columns, and `embedding`, lists of D float32
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError
from .files import require_writable, write_tsv, written_whole

Chunks = Iterable[tuple[Sequence[tuple], np.ndarray]]  # rows of the columns, and their embeddings (rows, D) float32


def require_embeddings_file(path: Path) -> None:
    """Raises InputError if `write_embeddings` could not write to `path`: before long work."""
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".parquet"):
        raise InputError(f"{path}: name it .npy or .parquet, which says what is written")
    if suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError(f"{path}: Parquet needs pyarrow (pip install 'polymamba[parquet]'); or name it .npy")
    require_writable(path)


def write_embeddings(path: Path, columns: Mapping[str, type], shape: tuple[int, int], chunks: Chunks) -> None:
    """Write embeddings as they come. columns: names and types, str or int. shape: (n, D) of all chunks together."""
    write = _write_npy if path.suffix.lower() == ".npy" else _write_parquet
    write(path, columns, shape, chunks)


def _write_npy(path: Path, columns: Mapping[str, type], shape: tuple[int, int], chunks: Chunks) -> None:
    header: Any = {"descr": "<f4", "fortran_order": False, "shape": shape}

    def rows(file) -> Iterator[tuple]:
        for names, embeddings in chunks:
            file.write(embeddings.astype("<f4").tobytes())
            yield from names

    with (
        written_whole(path) as beside,
        written_whole(path.with_suffix(".names.tsv")) as names_beside,
        beside.open("wb") as file,
        names_beside.open("w", encoding="utf-8", errors="replace", newline="") as names,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        write_tsv(names, list(columns), rows(file))


def _write_parquet(path: Path, columns: Mapping[str, type], shape: tuple[int, int], chunks: Chunks) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {name: pa.string() if kind is str else pa.int64() for name, kind in columns.items()}
    schema = pa.schema(types | {"embedding": pa.list_(pa.float32(), shape[1])})
    with written_whole(path) as beside, pq.ParquetWriter(beside, schema) as writer:
        for names, embeddings in chunks:
            flat = pa.array(embeddings.reshape(-1))
            arrays = [*map(list, zip(*names, strict=True)), pa.FixedSizeListArray.from_arrays(flat, shape[1])]
            writer.write_table(pa.table(arrays, schema))
