"""Which files a word of the command line stands for."""

from pathlib import Path

import pytest

from polymamba.core.errors import InputError
from polymamba.genomics.reading.files import find_files

ENDINGS = ["fa", "fasta", "fna", "ffn", "fas", "fq", "fastq", "gb", "gbk", "gbff", "genbank", "embl"]


def touched(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_a_file_stands_for_itself_whatever_its_name(tmp_path):
    for path in touched(tmp_path, "a.fa", "b.txt", "c[1].fa", "d"):
        assert find_files(path) == find_files(str(path)) == [path]
    assert find_files("-") == [Path("-")]


@pytest.mark.parametrize("packing", ["", ".gz", ".bgz", ".GZ"])
def test_every_ending_in_a_folder(tmp_path, packing):
    paths = touched(tmp_path, *[f"x.{ending}{packing}" for ending in [*ENDINGS, "FA", "Fastq"]])
    touched(tmp_path, ".hidden.fa", "README", "notes.txt", "x.fa.fai", "x.fa.gz.gzi", "labels.tsv")
    assert find_files(tmp_path) == sorted(paths)


def test_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touched(tmp_path, "b.fa", "a.fa", "a.fa.fai", "README.md", "sub/c.fa", "sub/deep/d.seq", ".hidden/e.fa", ".f.fa")
    for pattern, names in [
        ("*", ["a.fa", "b.fa"]),
        ("*.fa*", ["a.fa", "b.fa"]),
        ("[b]*", ["b.fa"]),
        ("**/*.fa", ["a.fa", "b.fa", "sub/c.fa"]),
        ("**", ["a.fa", "b.fa", "sub/c.fa", "sub/deep/d.seq"]),
        ("sub/*/?.seq", ["sub/deep/d.seq"]),
    ]:
        assert find_files(pattern) == [Path(name) for name in names], pattern


def test_refused(tmp_path):
    touched(tmp_path, "stray/a.fa", "stray/b.csv", "nested/a.fa", "nested/sub/b.fa", "documents/notes.txt")
    for word, message in [
        ("none.fa", "none.fa: no such file or folder"),
        ("*.fa", r"\*.fa: matches nothing; give a file, a folder or a pattern"),
        ("*", r"\*: matches nothing but documents or folders; "),
        ("stray", r"b.csv: not named as a sequence file \(.fa .fasta .* or .bgz\); rename it or move it away"),
        ("nested", r"nested/sub: a folder in .*nested, of which files alone .* pattern, '.*nested/\*\*/\*.fa'"),
        ("documents", r"documents: holds no sequence file \(.fa .fasta "),
        ("documents/*", "matches nothing but documents or folders"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            find_files(tmp_path / word)
        assert "\n" not in str(error.value)
