"""Every way to hold labelled images gives the same set; what is wrong with one is told by file and line."""

import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polymamba.core import InputError
from polymamba.vision.config import Dividing
from polymamba.vision.dataset import ImageSet, divide
from polymamba.vision.images import read_image
from polymamba.vision.sources import find_images, read_source


def looks(images: ImageSet) -> list[tuple[str, str, tuple]]:
    """(class, part, mean colour) of each, sorted."""
    rows = []
    for i, (name, label, part) in enumerate(zip(images.names, images.labels, images.parts, strict=True)):
        mean = np.asarray(read_image(images.items[i], name)).mean((0, 1)).round(3)
        rows.append((images.classes[label], str(part), tuple(mean.tolist())))
    return sorted(rows)


def arrays(images: ImageSet):
    x = np.stack([np.asarray(read_image(images.items[i], "")) for i in range(len(images))])
    return x, np.array([images.classes[label] for label in images.labels])


@pytest.fixture(scope="module")
def folder(pictures):
    return read_source(pictures)


def test_folder(folder):
    assert folder.classes == ("blue", "green", "red")
    assert len(folder) == 36
    assert folder.names[10].endswith("10.png") or folder.names[2].endswith("10.png")
    assert set(folder.parts) == {""}
    assert folder.describe().startswith("36 images of 3 classes")


def test_folder_with_parts_and_other_things(pictures, tmp_path):
    for part, name in (("train", "Train"), ("valid", "val"), ("test", "test")):
        for colour in ("red", "blue"):
            (tmp_path / name / colour / "deeper").mkdir(parents=True)
            source = pictures / colour / f"{len(part)}.png"
            (tmp_path / name / colour / "deeper" / "x.PNG").write_bytes(source.read_bytes())
    (tmp_path / "test" / "red" / "notes.txt").write_text("no image")
    (tmp_path / "test" / "red" / ".hidden.png").write_text("no image")
    (tmp_path / "test" / "loose.png").write_text("of no class")
    images = read_source(tmp_path)
    assert sorted(images.parts.tolist()) == ["test"] * 2 + ["train"] * 2 + ["valid"] * 2


def test_classes_sort_by_number(pictures, tmp_path):
    for name in ("10", "9", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes((pictures / "red" / "1.png").read_bytes())
    assert read_source(tmp_path).classes == ("1", "9", "10")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_table(folder, tmp_path, suffix):
    path = tmp_path / f"images{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerow(["Label", "other", "Path", "split"])
        for name, label in zip(folder.names, folder.labels, strict=True):
            writer.writerow([folder.classes[label], "x, y", name, "VAL" if name.endswith("3.png") else ""])
    images = read_source(path)
    assert sorted((c, m) for c, _, m in looks(images)) == sorted((c, m) for c, _, m in looks(folder))
    assert (images.parts == "valid").sum() == 3
    assert images.files == (path,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "line 1: no column image or path"),
        ("image,part\na,b\n", "line 1: no column label"),
        ("image,label\nnone.png,cat\n", "line 2: .*none.png: no such file"),
        ("image,label\n,cat\n", "line 2: no image"),
        ("image,label\nx.png\n", "line 2: no label"),
        ("image,label,part\nx.png,cat,monday\n", "line 2: part 'monday' is none of train"),
        ("image,label\n", "no images"),
        ("", "line 1: no column"),
    ],
)
def test_wrong_tables(tmp_path, text, words):
    Image.new("RGB", (3, 3)).save(tmp_path / "x.png")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=rf"t\.csv.*{words}"):
        read_source(tmp_path / "t.csv")


def test_npz(folder, tmp_path):
    x, y = arrays(folder)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    assert looks(read_source(tmp_path / "a.npz")) == looks(folder)
    number = np.array([folder.classes.index(name) for name in y])
    odd = np.arange(len(x)) % 2 == 1
    for i, (names, labels) in enumerate([
        (("x_train", "y_train", "x_test", "y_test"), number),
        (("train_images", "train_labels", "val_images", "val_labels"), number[:, None].astype(np.uint8)),
    ]):  # fmt: skip
        values = (x[odd], labels[odd], x[~odd], labels[~odd])
        np.savez_compressed(tmp_path / f"{i}.npz", **dict(zip(names, values, strict=True)))
        images = read_source(tmp_path / f"{i}.npz")
        assert images.classes == ("0", "1", "2")
        assert (images.parts == "train").sum() == odd.sum()
        assert sorted(m for _, _, m in looks(images)) == sorted(m for _, _, m in looks(folder))


def test_wrong_npz(folder, tmp_path):
    x, y = arrays(folder)
    np.savez(tmp_path / "a.npz", pictures=x, y=y)
    np.savez(tmp_path / "b.npz", x=x, y=y[:-1])
    np.savez(tmp_path / "c.npz", x=np.array([{"a": 1}, 2], dtype=object), y=y[:2])
    (tmp_path / "d.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:1000])
    for name, words in (
        ("a", "it has pictures, y"),
        ("b", r"labels \(35,\)"),
        ("c", "plain arrays"),
        ("d", "plain arrays"),
    ):
        with pytest.raises(InputError, match=words):
            read_source(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet(folder, tmp_path, as_struct):
    content = [p.read_bytes() for p in folder.items]
    cells = [{"bytes": c, "path": None} for c in content] if as_struct else content
    table = pa.table({"image": cells, "label": folder.labels})
    names = {"info": {"features": {"label": {"names": list(folder.classes)}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert looks(read_source(tmp_path / "a.parquet")) == looks(folder)
    (tmp_path / "parts" / "data").mkdir(parents=True)
    pq.write_table(table[:20], tmp_path / "parts" / "data" / "train-00000-of-00001.parquet")
    pq.write_table(table[20:], tmp_path / "parts" / "data" / "validation-00000-of-00001.parquet")
    images = read_source(tmp_path / "parts")
    assert [(images.parts == part).sum() for part in ("train", "valid")] == [20, 16]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"picture": content}), tmp_path / "c.parquet")
    for name, words in (("b", "not a Parquet file"), ("c", "no column image or img; there are picture")):
        with pytest.raises(InputError, match=words):
            read_source(tmp_path / f"{name}.parquet")


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def test_idx(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (10, 5, 6), np.uint8), np.arange(10, dtype=np.uint8) % 3
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(x[:6]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(y[:6]))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x[6:])))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(y[6:])))
    images = read_source(tmp_path)
    assert images.parts.tolist() == ["test"] * 4 + ["train"] * 6
    assert images.labels.tolist() == [*y[6:], *y[:6]]
    assert np.array_equal(np.asarray(read_image(images.items[9], ""))[..., 0], x[5])
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(y[:6])[:-1])
    with pytest.raises(InputError, match="train-labels-idx1-ubyte: not an IDX file of bytes, or cut short"):
        read_source(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_idx(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("idx")
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=r"idx|one class|images"):
        read_source(folder)


def test_what_is_no_source(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no images in folders named after their classes"):
        read_source(tmp_path)
    with pytest.raises(InputError, match=r"a\.txt: labelled images are a folder or one of \.csv"):
        read_source(tmp_path / "a.txt")
    with pytest.raises(InputError, match="no such file"):
        read_source(tmp_path / "b")
    (tmp_path / "only").mkdir()
    Image.new("RGB", (3, 3)).save(tmp_path / "only" / "x.png")
    with pytest.raises(InputError, match="one class only"):
        read_source(tmp_path)


def test_find_images(pictures, tmp_path):
    words = [pictures / "red", pictures / "blue" / "3.png", pictures / "green" / "1*.png", pictures / "gre*"]
    found, names = find_images(words)
    assert names == list(map(str, found))
    assert [p.name for p in found][:12] == [f"{i}.png" for i in range(12)]
    assert [p.name for p in found][12:16] == ["3.png", "1.png", "10.png", "11.png"]
    assert names[16:] == [str(pictures / "green" / f"{i}.png") for i in range(12)]
    for word in (tmp_path, tmp_path / "none", tmp_path / "*.png"):
        with pytest.raises(InputError, match=r"no image|no such"):
            find_images([word])


def numbers(labels, parts=None, contents=None) -> ImageSet:
    """Images of 1 x 1 pixels; those of equal content are copies."""
    labels = np.asarray(labels)
    contents = np.arange(len(labels)) if contents is None else np.asarray(contents)
    items = list(contents.astype(np.int64).view(np.uint8).reshape(-1, 2, 4))
    classes = tuple(str(c) for c in range(labels.max() + 1))
    parts = np.array(parts if parts is not None else [""] * len(labels), dtype="U5")
    return ImageSet(items, [str(i) for i in range(len(labels))], labels, classes, parts)


def test_dividing_by_class():
    images, copies = divide(numbers(np.repeat([0, 1, 2], [100, 20, 5])), Dividing(), 0)
    counts = [
        [int(((images.parts == p) & (images.labels == k)).sum()) for p in ("train", "valid", "test")] for k in range(3)
    ]
    assert counts == [[80, 10, 10], [16, 2, 2], [3, 1, 1]]
    assert copies == 0
    again, _ = divide(numbers(np.repeat([0, 1, 2], [100, 20, 5])), Dividing(), 0)
    other, _ = divide(numbers(np.repeat([0, 1, 2], [100, 20, 5])), Dividing(), 1)
    assert again.digest() == images.digest() != other.digest()


def test_parts_that_are_named_stay():
    parts = ["train"] * 40 + ["test"] * 10
    images, _ = divide(numbers(np.tile([0, 1], 25), parts), Dividing(), 0)
    assert (images.parts == "test").tolist() == [p == "test" for p in parts]
    assert (images.parts == "valid").sum() == 4
    images, _ = divide(numbers(np.tile([0, 1], 25)), Dividing(test_fraction=0), 0)
    assert sorted(set(images.parts.tolist())) == ["train", "valid"]


def test_copies_stay_together_and_leaks_are_told():
    contents = np.repeat(np.arange(30), 3)
    images, copies = divide(numbers(np.repeat([0, 1], 45), contents=contents), Dividing(valid_fraction=0.2), 3)
    assert copies == 0
    for content in range(30):
        assert len(set(images.parts[contents == content])) == 1
    parts = ["train"] * 6 + ["valid"] * 3
    _, copies = divide(numbers([0, 1] * 4 + [0], parts, [0, 1, 2, 3, 4, 5, 0, 9, 4]), Dividing(test_fraction=0), 0)
    assert copies == 2


def test_nothing_left():
    with pytest.raises(InputError, match="valid part"):
        divide(numbers([0, 1]), Dividing(), 0)
    with pytest.raises(InputError, match="class '1': no image in the train part"):
        divide(numbers([0, 0, 0, 1], ["train", "train", "valid", "valid"]), Dividing(), 0)
