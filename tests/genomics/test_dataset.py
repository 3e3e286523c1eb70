"""From files and folders to labelled sequences, against what was written and against counts by brute force."""

import gzip
import json
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO
from Bio.Seq import Seq

from polymamba.core.errors import InputError
from polymamba.core.inputs import PARTS
from polymamba.genomics.alphabet import decode
from polymamba.genomics.commands import Dividing, Source
from polymamba.genomics.dataset import LabelledSequences, SplitRow, read_splits
from polymamba.genomics.dividing import divide
from polymamba.genomics.sources import read_source

SPLICE = Path(str(package_files("polymamba.genomics") / "examples" / "splice"))


def write_fasta(path: Path, n: int, seed: int = 0, prefix: str = "s", length: int = 40) -> Path:
    """n random records; gzipped if the name says so."""
    rng = np.random.default_rng(seed)
    text = "".join(f">{prefix}{i}\n{''.join(rng.choice(list('ACGT'), length))}\n" for i in range(n))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def from_class_files(files, *, split: bool = True, seed: int = 0, **how) -> LabelledSequences:
    classes = tuple(f"{name}={path}" for name, paths in files.items() for path in paths)
    data = read_source(Source(classes=classes))
    return divide(data, Dividing(**how), seed) if split else data


def from_folder(path, *, split: bool = True) -> LabelledSequences:
    data = read_source(Source(data=path))
    return divide(data, Dividing(), 0) if split else data


def records_of(data: LabelledSequences) -> set[tuple[str, ...]]:
    """Everything about each record, as a set."""
    classes = [data.classes[label] for label in data.labels]
    sequences = [decode(ids) for ids in data.tokens]
    return set(zip(data.names, sequences, classes, data.split.tolist(), data.sources, strict=True))


def by_brute_force(data: LabelledSequences, one: str, other: str) -> int:
    """Distinct sequences, either strand, that two parts share."""
    strands = []
    for part in (one, other):
        sequences = [decode(ids) for ids in data.subset(part).tokens]
        strands.append({frozenset((s, str(Seq(s).reverse_complement()))) for s in sequences})
    return len(strands[0] & strands[1])


# Files by class


def test_class_files_keep_the_order_given(tmp_path):
    paths = {
        "zeta": [write_fasta(tmp_path / "z1.fa", 20, 1), write_fasta(tmp_path / "z2.fa.gz", 10, 2)],
        "alpha": [write_fasta(tmp_path / "a.fna", 30, 3)],
    }
    data = from_class_files(paths)
    assert data.classes == ("zeta", "alpha")
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0] * 30 + [1] * 30
    assert (
        data.sources
        == [str(tmp_path / "z1.fa")] * 20 + [str(tmp_path / "z2.fa.gz")] * 10 + [str(tmp_path / "a.fna")] * 30
    )
    twins = [record for path in (tmp_path / "z1.fa", tmp_path / "a.fna") for record in SeqIO.parse(path, "fasta")]
    read = dict(zip(zip(data.sources, data.names, strict=True), map(decode, data.tokens), strict=True))
    for twin in twins[:20]:
        assert read[str(tmp_path / "z1.fa"), twin.id] == str(twin.seq)
    assert {part: int((data.split == part).sum()) for part in PARTS} == {"train": 48, "valid": 6, "test": 6}


def test_order_of_classes_and_files_does_not_change_who_is_in_which_part(tmp_path):
    a, b, c = (write_fasta(tmp_path / f"{name}.fa", 30, seed) for seed, name in enumerate("abc"))
    one = from_class_files({"x": [a, b], "y": [c]}, seed=5)
    other = from_class_files({"y": [c], "x": [b, a]}, seed=5)
    assert records_of(one) == records_of(other)
    assert records_of(one) != records_of(from_class_files({"x": [a, b], "y": [c]}, seed=6))


def test_nothing_is_set_aside_without_split(tmp_path):
    data = from_class_files({"only": [write_fasta(tmp_path / "a.fa", 2)]}, split=False)
    assert data.split.tolist() == ["train", "train"]


def test_shares(tmp_path):
    files = {name: [write_fasta(tmp_path / f"{name}.fa", 40, i)] for i, name in enumerate("ab")}
    data = from_class_files(files, valid_fraction=0.25, test_fraction=0)
    assert {part: int((data.split == part).sum()) for part in PARTS} == {"train": 60, "valid": 20, "test": 0}
    for bad in (
        {"valid_fraction": -0.1},
        {"valid_fraction": 0.5, "test_fraction": 0.5},
        {"test_fraction": float("nan")},
    ):
        with pytest.raises(InputError, match="must not be negative, and add up to less than 1"):
            from_class_files(files, **bad)


def test_class_files_refused(tmp_path):
    a, b = write_fasta(tmp_path / "a.fa", 30, 1), write_fasta(tmp_path / "b.fa", 30, 2)
    few = write_fasta(tmp_path / "few.fa", 2, 3)
    (tmp_path / "empty.fa").touch()
    (tmp_path / "sub").mkdir()
    for files, message in [
        ({}, "say where the sequences are in one of these ways: --example, --data, --class"),
        ({"a": [a]}, r"1 class \(a\) is too few"),
        ({"a": [a], "b": [tmp_path / "sub" / ".." / "a.fa"]}, "a.fa: given twice"),
        ({"a": [a, a], "b": [b]}, "a.fa: given twice"),
        ({"a": [a], "b": [tmp_path / "empty.fa"]}, "empty.fa: is empty"),
        ({"a": [a], "b": [tmp_path / "none.fa"]}, "none.fa: no such file"),
        ({"a": [a], "b": [few]}, "class 'b': 2 distinct sequences .* at least 3 are needed"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            from_class_files(files)
        assert "\n" not in str(error.value)


# Folders


def test_file_a_class_and_folder_a_class_are_the_same(tmp_path):
    for seed, name in enumerate(["b", "a.x", "C"]):
        write_fasta(tmp_path / "files" / f"{name}.fa", 30, seed)
        write_fasta(tmp_path / "folders" / name / "anything.FASTA.gz", 30, seed)
    for extra in ("files/README.txt", "files/README", "files/a.x.fa.fai", "folders/.DS_Store", "folders/b/notes.md"):
        (tmp_path / extra).touch()
    files, folders = from_folder(tmp_path / "files"), from_folder(tmp_path / "folders")
    assert files.classes == folders.classes == ("C", "a.x", "b")
    assert files.names == folders.names
    assert files.labels.tolist() == folders.labels.tolist()
    assert files.split.tolist() == folders.split.tolist()
    assert all(np.array_equal(x, y) for x, y in zip(files.tokens, folders.tokens, strict=True))
    assert files.sources[0] == str(tmp_path / "files" / "C.fa")


@pytest.mark.parametrize("valid", ["valid", "val", "validation", "Dev"])
def test_given_parts_stay_as_they_are(tmp_path, valid):
    for part, n in (("train", 9), (valid, 4), ("test", 5)):
        write_fasta(tmp_path / part / "a.fa", n, n)
        write_fasta(tmp_path / part / "b" / "1.fa", n, n + 100)
    (tmp_path / "test" / "b" / "1.fa").unlink()
    (tmp_path / "test" / "b").rmdir()  # a class may be missing from another part than train
    data = from_folder(tmp_path)
    counts = {part: np.bincount(data.subset(part).labels, minlength=2).tolist() for part in PARTS}
    assert counts == {"train": [9, 9], "valid": [4, 4], "test": [5, 0]}
    for source, part in zip(data.sources, data.split, strict=True):
        assert (
            Path(source).relative_to(tmp_path).parts[0].lower().startswith(part[:3] if part != "valid" else ("v", "d"))
        )


@pytest.mark.parametrize(("given", "set_aside"), [(("train",), {"valid", "test"}), (("train", "valid"), {"test"})])
def test_missing_parts_come_from_train(tmp_path, given, set_aside):
    for part in given:
        for seed, name in enumerate("ab"):
            write_fasta(tmp_path / part / f"{name}.fa", 50, seed, prefix=part)
    data = from_folder(tmp_path)
    for part in set_aside:
        moved = data.subset(part)
        assert np.bincount(moved.labels).tolist() == [5, 5]
        assert all(name.startswith("train") for name in moved.names)
    assert from_folder(tmp_path, split=False).split.tolist() == [part for part in given for _ in range(100)]


def test_folders_refused(tmp_path):
    def laid_out(name: str, *paths: str) -> Path:
        for seed, path in enumerate(paths):
            write_fasta(tmp_path / name / path, 30, seed)
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    (laid_out("hollow", "a.fa", "b.fa") / "c").mkdir()
    for folder, message in [
        (tmp_path / "none", "none: no such folder"),
        (laid_out("file", "a.fa") / "a.fa", "a.fa: is a file, not a folder"),
        (laid_out("bare"), r"bare: holds no sequence file \(.fa .fasta .fna"),
        (laid_out("one", "a.fa"), r"1 class \(a\) is too few"),
        (laid_out("text", "a.fa", "b.fa", "c.doc"), "c.doc: not named as a sequence file"),
        (laid_out("csv", "a.fa", "b.fa", "c/x.csv"), "x.csv: not named as a sequence file"),
        (tmp_path / "hollow", "hollow/c: holds no sequence file"),
        (laid_out("deep", "a.fa", "b/c/d.fa"), r"b/c: a folder in .*b, of which files alone are read"),
        (laid_out("twice", "a.fa", "a.fa.gz", "b.fa"), "a.fa.gz: a second file or folder for class 'a'"),
        (laid_out("both", "a.fa", "a/x.fa", "b.fa"), "a.fa: a second file or folder for class 'a'"),
        (laid_out("stray", "train/a.fa", "train/b.fa", "c.fa"), "c.fa: lies beside folder train"),
        (laid_out("named", "train.fa", "test.fa"), "test.fa: named as a part of a split, not as a class"),
        (laid_out("vals", "train/a.fa", "train/b.fa", "val/a.fa", "dev/a.fa"), "dev and val both name the valid part"),
        (laid_out("untrained", "test/a.fa", "test/b.fa"), "the data have a test part but no train part"),
        (
            laid_out("unknown", "train/a.fa", "train/b.fa", "test/c.fa"),
            "c.fa: class 'c' is not in train, which has a, b",
        ),
    ]:
        with pytest.raises(InputError, match=message) as error:
            from_folder(folder)
        assert "\n" not in str(error.value)


# What can be done with it


def test_subset_keeps_records_together(tmp_path):
    data = from_class_files({name: [write_fasta(tmp_path / f"{name}.fa", 30, i)] for i, name in enumerate("ab")})
    parts = [data.subset(part) for part in PARTS]
    assert set.union(*map(records_of, parts)) == records_of(data)
    assert sum(len(part.names) for part in parts) == len(data.names)
    assert all(
        part.classes == data.classes and set(part.split) == {name} for part, name in zip(parts, PARTS, strict=True)
    )


def test_with_classes_of_a_model(tmp_path):
    files = {name: [write_fasta(tmp_path / f"{name}.fa", 3, i)] for i, name in enumerate("ba")}
    data = from_class_files(files, split=False).with_classes(("a", "b", "c"))
    assert data.labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert data.classes == ("a", "b", "c")
    with pytest.raises(InputError, match="class b: not among the known classes a, c"):
        data.with_classes(("a", "c"))


def test_splits_tsv_there_and_back(tmp_path):
    files = {"b": [write_fasta(tmp_path / "1.fa", 9), write_fasta(tmp_path / "2.fa", 9, 1)]}  # the same names in both
    data = from_class_files(files | {"a": [write_fasta(tmp_path / "3.fa", 9, 2)]})
    data.write_splits_tsv(tmp_path / "splits.tsv")
    rows = read_splits(tmp_path / "splits.tsv")
    labels = [data.classes[label] for label in data.labels]
    assert rows == [SplitRow(*row) for row in zip(data.names, labels, data.split.tolist(), data.sources, strict=True)]
    assert len({(row.source, row.name) for row in rows}) == len(rows)
    assert (tmp_path / "splits.tsv").read_text().splitlines()[0] == "id\tclass\tsplit\tsource"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: expected the columns id, class, split, source"),
        ("id\tclass\n", "line 1: expected the columns"),
        ("id\tclass\tsplit\tsource\na\tb\ttrain\tx\na\tb\tholdout\tx\n", "line 3: expected id, class, one of train"),
        ("id\tclass\tsplit\tsource\na\tb\ttrain\n", "line 2: expected id"),
        (None, "cannot be read"),
    ],
)
def test_splits_tsv_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "splits.tsv").write_text(content)
    with pytest.raises(InputError, match=f"splits.tsv.*{message}"):
        read_splits(tmp_path / "splits.tsv")


def test_summary(tmp_path):
    (tmp_path / "a.fa").write_text(">1\nACGTA\n>2\nTACGT\n>3\nNAC\n>4\nAC\n")
    (tmp_path / "b.fa").write_text(">1\nACRTACG\n")
    data = from_class_files({"a": [tmp_path / "a.fa"], "b": [tmp_path / "b.fa"]}, split=False)
    data.split[:] = ["train", "test", "train", "valid", "train"]
    summary = data.summary()
    assert (
        json.loads(json.dumps(summary))
        == summary
        == {
            "rows": [
                {
                    "class": "a",
                    "train": 2,
                    "valid": 1,
                    "test": 1,
                    "shortest": 2,
                    "median": 4,
                    "longest": 5,
                    "with_N": 1,
                },
                {
                    "class": "b",
                    "train": 1,
                    "valid": 0,
                    "test": 0,
                    "shortest": 7,
                    "median": 7,
                    "longest": 7,
                    "with_N": 1,
                },
                {
                    "class": "all",
                    "train": 3,
                    "valid": 1,
                    "test": 1,
                    "shortest": 2,
                    "median": 5,
                    "longest": 7,
                    "with_N": 2,
                },
            ],
            "distinct": 4,
            "shared": {"train/valid": 0, "train/test": 1, "valid/test": 0},
        }
    )
    assert data.describe().splitlines() == [
        "class  train  valid  test  shortest  median  longest  with N",
        "a          2      1     1         2       4        5       1",
        "b          1      0     0         7       7        7       1",
        "all        3      1     1         2       5        7       2",
        "4 distinct sequences, either strand",
        "1 of them stand in both train and test",
    ]


# The data set in the package


def test_official_split_of_splice_shares_69_sequences():
    data = from_folder(SPLICE, split=False)
    assert [(row["class"], row["train"], row["test"]) for row in data.summary()["rows"]] == [
        *(("EI", 464, 303), ("IE", 485, 280), ("N", 1051, 603)),
        ("all", 2000, 1186),
    ]
    assert data.summary()["shared"] == {"train/test": 69}
    assert by_brute_force(data, "train", "test") == 69


def test_example_splice():
    data, official = divide(read_source(Source(example="splice")), Dividing(), 1), from_folder(SPLICE, split=False)
    assert records_of(data.subset("test")) == records_of(official.subset("test"))
    shared = {pair: by_brute_force(data, *pair.split("/")) for pair in ("train/valid", "train/test", "valid/test")}
    assert shared == data.summary()["shared"]
    assert shared["train/valid"] == 0
    assert shared["train/test"] + shared["valid/test"] == 69
    assert np.bincount(data.subset("valid").labels).tolist() == pytest.approx([46.4, 48.5, 105.1], abs=1.5)


def test_example_splice_has_the_junction_where_its_readme_says():
    data = read_source(Source(example="splice"))
    sequences = np.stack(data.tokens)
    donor, acceptor = (sequences[data.labels == data.classes.index(name)] for name in ("EI", "IE"))
    assert np.mean([decode(ids) == "GT" for ids in donor[:, 30:32]]) > 0.98
    assert np.mean([decode(ids) == "AG" for ids in acceptor[:, 28:30]]) > 0.98


def test_packed_files_carry_no_time_and_no_name():
    for path in SPLICE.glob("*/*.gz"):
        header = path.read_bytes()[:10]
        assert header[3] == 0  # flags: no file name
        assert header[4:8] == bytes(4)  # time of packing
    assert "CC BY 4.0" in (SPLICE / "README.txt").read_text()


def test_unknown_example():
    with pytest.raises(InputError, match="no example 'splices'; there is splice"):
        read_source(Source(example="splices"))
