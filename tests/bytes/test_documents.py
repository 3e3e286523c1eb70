"""Documents as a stream, and which files are documents."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.bytes import Document, Documents, find_files
from polymamba.bytes.documents import BLOCK, whole_files
from polymamba.core import InputError


def write(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@settings(max_examples=60)
@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=6), st.data())
def test_the_stream_is_marks_and_bytes(tmp_path_factory, texts, data):
    folder = tmp_path_factory.mktemp("d")
    joined = write(folder / "all", b"??" + b"".join(texts))  # some documents in one file, some alone
    documents, expected, start = [], [], 2
    for i, text in enumerate(texts):
        documents.append(
            Document(joined, start, len(text)) if i % 2 else Document(write(folder / str(i), text), 0, len(text))
        )
        expected += [256, *text]
        start += len(text)
    expected.append(256)
    stream = Documents(documents)
    assert (len(stream), stream.n_tokens, stream.n_bytes) == (len(texts), len(expected), sum(map(len, texts)))
    left = data.draw(st.integers(0, len(expected)))
    right = data.draw(st.integers(left, len(expected)))
    assert stream.read(left, right).tolist() == expected[left:right]
    position = data.draw(st.integers(0, len(expected) - 2))
    assert stream.document_at(position) == expected[: position + 1].count(256) - 1


def test_blocks_are_the_whole_document(tmp_path):
    data = np.random.default_rng(0).bytes(2 * BLOCK + 17)
    blocks = list(Document(write(tmp_path / "a", data), 3, len(data) - 3).blocks())
    assert [len(block) for block in blocks] == [BLOCK, BLOCK, 14]
    assert b"".join(block.tobytes() for block in blocks) == data[3:]


def test_a_file_that_shrank(tmp_path):
    document = Document(write(tmp_path / "a", b"12345"), 0, 5)
    write(tmp_path / "a", b"123")
    with pytest.raises(InputError, match=r"a: cannot be read .*cut short"):
        document.read(0, 5)
    (tmp_path / "a").unlink()
    with pytest.raises(InputError, match=r"a: cannot be read .*No such file"):
        document.read(0, 5)


def test_folders_are_searched_and_hidden_files_are_not(tmp_path):
    names = ["b/deep/er/2.txt", "b/1.bin", "a", "b/.hidden", "b/.git/config", "out/model"]
    paths = {name: write(tmp_path / name) for name in names}
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "linked").symlink_to(paths["a"])  # the same file by another name
    found = find_files([tmp_path], leave_out=tmp_path / "out")
    assert found == sorted(paths[name] for name in ("a", "b/1.bin", "b/deep/er/2.txt"))
    assert find_files([paths["b/.hidden"]]) == [paths["b/.hidden"]]  # named, so meant
    assert find_files([tmp_path / "b", paths["b/1.bin"]]) == find_files([tmp_path / "b"])


def test_what_is_no_document(tmp_path):
    with pytest.raises(InputError, match="nothing: no such file or folder"):
        find_files([tmp_path / "nothing"])
    (tmp_path / "empty" / ".x").mkdir(parents=True)
    with pytest.raises(InputError, match="empty: a folder without files"):
        find_files([tmp_path / "empty"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: no ordinary file"):
        find_files([tmp_path])
    (tmp_path / "pipe").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="link: a link to nothing"):
        find_files([tmp_path])


def test_unreadable_file(tmp_path, monkeypatch):
    file = write(tmp_path / "secret")

    def refuse(self, *args, **kwargs):  # as root no mode keeps us out
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(InputError, match=r"secret: cannot be read .Permission denied"):
        find_files([file])


def test_empty_files(tmp_path):
    empty, full = write(tmp_path / "e", b""), write(tmp_path / "f", b"1")
    assert whole_files([empty, full]) == [Document(full, 0, 1)]
    with pytest.raises(InputError, match="e: empty"):
        whole_files([empty])
