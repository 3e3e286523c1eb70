"""Embeddings in files, read back by numpy and pyarrow themselves."""

import csv

import numpy as np
import pytest

from polymamba.core import InputError
from polymamba.core.embeddings import require_embeddings_file, write_embeddings

NAMES = [("a\tb", 0, 7), ('"', 3, 2**40), ("é", 5, 1)]
ARRAY = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)


def chunks():
    yield NAMES[:2], ARRAY[:2]
    yield NAMES[2:], ARRAY[2:]


def test_npy_has_its_names_beside_it(tmp_path):
    write_embeddings(tmp_path / "e.npy", {"id": str, "start": int, "end": int}, ARRAY.shape, chunks())
    found = np.load(tmp_path / "e.npy", allow_pickle=False)
    assert found.dtype == np.float32
    assert np.array_equal(found, ARRAY)
    with (tmp_path / "e.names.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows == [["id", "start", "end"], *([name, str(start), str(end)] for name, start, end in NAMES)]


def test_parquet_has_a_column_of_lists(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_embeddings(tmp_path / "e.parquet", {"id": str, "start": int, "end": int}, ARRAY.shape, chunks())
    table = parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["id", "start", "end", "embedding"]
    assert list(zip(*(table[name].to_pylist() for name in ("id", "start", "end")), strict=True)) == NAMES
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), ARRAY)


@pytest.mark.parametrize("name", ["e.npy", "e.parquet"])
def test_an_error_in_the_middle_leaves_what_was_there(name, tmp_path):
    def failing():
        yield NAMES[:2], ARRAY[:2]
        raise InputError("enough")

    if name == "e.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match="enough"):
        write_embeddings(tmp_path / name, {"id": str, "start": int, "end": int}, ARRAY.shape, failing())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_what_cannot_be_written_is_said_beforehand(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"e\.txt: name it \.npy or \.parquet"):
        require_embeddings_file(tmp_path / "e.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no folder"):
        require_embeddings_file(tmp_path / "file" / "e.npy")
    monkeypatch.setattr("polymamba.core.embeddings.find_spec", lambda name: None)
    require_embeddings_file(tmp_path / "e.npy")
    with pytest.raises(InputError, match=r"Parquet needs pyarrow \(pip install 'polymamba\[parquet\]'\)"):
        require_embeddings_file(tmp_path / "e.parquet")
