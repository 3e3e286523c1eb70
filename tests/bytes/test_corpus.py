"""Which document is of which part, and the corpus on disk: whole, checked, made again when it has to be."""

import csv
from pathlib import Path

import pytest

from polymamba.bytes import Dividing, divide, find_files, open_corpus
from polymamba.bytes.corpus import describe, named_part, write_splits_tsv
from polymamba.core import InputError
from polymamba.core.inputs import PARTS


@pytest.fixture
def folder(tmp_path) -> Path:
    """20 documents, of which two are the same."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_bytes(f"document {i % 19}".encode() * (i % 19 + 1))
    return folder


def parts(pieces) -> dict[str, str]:
    return {Path(piece.path).name: piece.part for piece in pieces}


def contents(documents) -> list[bytes]:
    return [b"".join(block.tobytes() for block in document.blocks()) for document in documents.documents]


def test_division_is_by_content_and_seed(folder, tmp_path):
    pieces = divide(find_files([folder]), Dividing(), 3)
    assert [list(parts(pieces).values()).count(part) for part in ("valid", "test")] in ([2, 2], [3, 2], [2, 3])
    assert parts(pieces)["00.txt"] == parts(pieces)["19.txt"]  # copies stay together
    moved = tmp_path / "elsewhere" / "deeper"
    moved.parent.mkdir()
    folder.rename(moved)
    assert parts(divide(find_files([moved]), Dividing(), 3)) == parts(pieces)
    assert len({tuple(parts(divide(find_files([moved]), Dividing(), seed)).values()) for seed in range(5)}) > 1


@pytest.mark.parametrize("seed", range(8))
def test_copies_never_straddle(folder, seed):
    for i in range(10):
        (folder / f"copy{i}").write_bytes((folder / f"{i:02}.txt").read_bytes())
    pieces = divide(find_files([folder]), Dividing(valid_fraction=0.3, test_fraction=0.3), seed)
    assert len({(piece.sha256, piece.part) for piece in pieces}) == len({piece.sha256 for piece in pieces})
    assert {piece.part for piece in pieces} == set(PARTS)


def test_paths_name_parts(tmp_path):
    names = ["train/a", "train/test/b", "valid.txt", "x/valid/deep/c.py", "test/d", "other", "validated/e"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [named_part(Path(n)) for n in names] == ["train", "test", "valid", "valid", "test", None, None]
    others = "val/a.txt", "a/validation.txt", "dev/a.txt"
    assert [named_part(Path(n)) for n in others] == ["valid", "valid", None]
    pieces = divide(find_files([tmp_path]), Dividing(), 0)
    expected = dict(zip(names, ["train", "test", "valid", "valid", "test", "train", "train"], strict=True))
    assert {str(Path(p.path).relative_to(tmp_path)): p.part for p in pieces} == expected
    (tmp_path / "train" / "copy").write_text("test/d")
    assert "1 documents of test are copies" in describe(divide(find_files([tmp_path]), Dividing(), 0))


def test_a_missing_part_is_taken_from_train(folder):
    (folder / "00.txt").rename(folder / "test.txt")
    pieces = divide(find_files([folder]), Dividing(), 0)
    assert [name for name, part in parts(pieces).items() if part == "test"] == ["test.txt"]
    assert "valid" in parts(pieces).values()
    without = divide(find_files([folder / "01.txt", folder / "02.txt"]), Dividing(test_fraction=0), 0)
    assert sorted(parts(without).values()) == ["train", "valid"]


def test_split_by_position(folder, tmp_path):
    files = find_files([folder])
    pieces = divide(files, Dividing(split_by="position", valid_fraction=0.2, test_fraction=0.1), 0)
    corpus = open_corpus(tmp_path / "cache", pieces)
    for file in files:
        mine = sorted((p for p in pieces if p.path == str(file)), key=lambda p: p.start)
        assert [p.part for p in mine] == [part for part in PARTS if part in [p.part for p in mine]]
        assert sum(p.size for p in mine) == file.stat().st_size
    whole = b"".join(
        contents(corpus[piece.part])[[p for p in pieces if p.part == piece.part].index(piece)]
        for piece in sorted(pieces, key=lambda p: (p.path, p.start))
    )
    assert whole == b"".join(file.read_bytes() for file in files)


def test_too_little_to_divide(folder, tmp_path):
    for name in ("00.txt", "19.txt"):  # the same document
        (folder / name).rename(tmp_path / name)
    with pytest.raises(InputError, match=r"1 different documents cannot be divided .* --split-by position"):
        divide([tmp_path / "00.txt", tmp_path / "19.txt"], Dividing(), 0)
    (tmp_path / "short").write_bytes(b"1")
    with pytest.raises(InputError, match="too short to cut a valid part off"):
        divide([tmp_path / "short"], Dividing(split_by="position"), 0)
    (tmp_path / "test.txt").write_bytes(b"1")
    (tmp_path / "valid.txt").write_bytes(b"1")
    with pytest.raises(InputError, match="no document is left for the train part"):
        divide([tmp_path / "test.txt", tmp_path / "valid.txt"], Dividing(), 0)


def test_the_corpus_is_built_once_and_whole(folder, tmp_path):
    pieces = divide(find_files([folder]), Dividing(), 0)
    corpus = open_corpus(tmp_path / "cache", pieces)
    for part in PARTS:
        assert contents(corpus[part]) == [Path(p.path).read_bytes() for p in pieces if p.part == part]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    open_corpus(tmp_path / "cache", pieces)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")} == before
    (folder / "05.txt").write_bytes(b"changed")
    changed = divide(find_files([folder]), Dividing(), 0)
    again = open_corpus(tmp_path / "cache", changed)
    assert b"changed" in contents(again["train"]) + contents(again["valid"]) + contents(again["test"])
    assert contents(corpus["train"]) == contents(
        open_corpus(tmp_path / "cache", pieces)["train"]
    )  # the first one stays


def test_damage_is_seen_said_and_repaired(folder, tmp_path, capsys):
    pieces = divide(find_files([folder]), Dividing(), 0)
    whole = contents(open_corpus(tmp_path / "cache", pieces)["train"])
    (path,) = (tmp_path / "cache").glob("*/train.bin")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    repaired = open_corpus(tmp_path / "cache", pieces)
    assert "train.bin is damaged" in capsys.readouterr().err
    assert contents(repaired["train"]) == whole


def test_nothing_is_left_of_a_build_that_fails(folder, tmp_path):
    pieces = divide(find_files([folder]), Dividing(), 0)
    (folder / "07.txt").write_bytes(b"q" * (folder / "07.txt").stat().st_size)  # of the same size
    with pytest.raises(InputError, match=r"07\.txt: changed while it was read"):
        open_corpus(tmp_path / "cache", pieces)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        open_corpus(tmp_path / "file", divide(find_files([folder]), Dividing(), 0))


def test_splits_tsv(folder, tmp_path):
    pieces = divide(find_files([folder]), Dividing(), 0)
    write_splits_tsv(tmp_path / "splits.tsv", pieces)
    with (tmp_path / "splits.tsv").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["path", "part", "start", "size", "sha256"]
    assert rows[1:] == [[str(field) for field in piece] for piece in pieces]
