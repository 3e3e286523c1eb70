"""Tables as Hugging Face's datasets write them: the same images, classes and parts as in the folder they came from."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from polymamba.cli import main
from polymamba.core import InputError
from polymamba.vision.images import read_image
from polymamba.vision.sources import find_images, read_source
from polymamba.vision.stored import find_shards

COLOURS = ("red", "green", "blue")  # the order of the ClassLabel, which is not that of the alphabet
FEATURES = {"image": {"_type": "Image"}, "label": {"names": list(COLOURS), "_type": "ClassLabel"}}
METADATA = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table_of(pictures: Path, numbers, metadata=METADATA, *, labels=None) -> pa.Table:
    """Those numbers of each colour."""
    files = [pictures / colour / f"{i}.png" for colour in COLOURS for i in numbers]
    labels = [COLOURS.index(file.parent.name) for file in files] if labels is None else labels
    cells = pa.array([{"bytes": file.read_bytes(), "path": file.name} for file in files], STRUCT)
    table = pa.table({"id": list(range(len(files))), "image": cells, "label": pa.array(labels, pa.int64())})
    return table.replace_schema_metadata(metadata)


def save_to_disk(folder: Path, *tables: pa.Table) -> None:
    """As `Dataset.save_to_disk`: a file for each table."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))


@pytest.fixture
def saved(pictures, tmp_path) -> Path:
    """train (of two files), validation and test."""
    folder = tmp_path / "saved"
    save_to_disk(folder / "train", table_of(pictures, range(3)), table_of(pictures, range(3, 6)))
    save_to_disk(folder / "validation", table_of(pictures, range(6, 8)))
    save_to_disk(folder / "test", table_of(pictures, range(8, 12)))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    return folder


def looks(images) -> list[tuple[str, bytes]]:
    """(class, pixels) of each, sorted."""
    rows = zip(images.items, images.names, images.labels, strict=True)
    return sorted((images.classes[label], read_image(item, name).tobytes()) for item, name, label in rows)


def counts(images) -> dict[str, int]:
    return {part: int(n) for part, n in zip(*np.unique(images.parts, return_counts=True), strict=True)}


def test_splits_that_were_saved(saved, pictures):
    images = read_source(saved)
    assert images.classes == COLOURS
    assert counts(images) == {"train": 18, "valid": 6, "test": 12}
    assert looks(images) == looks(read_source(pictures))
    assert images.names[9] == f"{saved}/train/data-00001-of-00002.arrow[0]"
    assert len(images.files) == 4
    one = read_source(saved / "train")  # a folder of a single split has no parts
    assert counts(one) == {"": 18}


def test_names_of_classes_from_the_file_beside(pictures, tmp_path):
    save_to_disk(tmp_path / "d", table_of(pictures, range(2), metadata=None))
    assert read_source(tmp_path / "d").classes == COLOURS
    (tmp_path / "d" / "dataset_info.json").unlink()
    assert read_source(tmp_path / "d").classes == ("0", "1", "2")


@pytest.mark.parametrize(
    "name",
    [
        "{0}-00000-of-00001.parquet", "data/{0}-00000-of-00001.parquet", "plain_text/{0}-00000-of-00001.parquet",
        "{0}/0000.parquet", "default/{0}/0000.parquet", "data/{0}/part-0.parquet",
    ],
)  # fmt: skip
def test_snapshots_of_the_hub(pictures, tmp_path, name):
    for split, numbers in (("train", range(6)), ("validation", range(6, 8)), ("test", range(8, 12))):
        path = tmp_path / name.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table_of(pictures, numbers), path)
    (tmp_path / "README.md").write_text("about")
    hidden = tmp_path / ".cache" / "x.parquet"
    hidden.parent.mkdir()
    hidden.write_text("passed over")
    images = read_source(tmp_path)
    assert (images.classes, counts(images)) == (COLOURS, {"train": 18, "valid": 6, "test": 12})
    assert looks(images) == looks(read_source(pictures))


def test_several_shards_and_links_into_a_cache(pictures, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    for i in range(3):
        pq.write_table(table_of(pictures, range(4 * i, 4 * i + 4)), tmp_path / "blobs" / str(i))
        link = tmp_path / "snapshot" / "data" / f"train-0000{i}-of-00003.parquet"
        link.symlink_to(tmp_path / "blobs" / str(i))
    images = read_source(tmp_path / "snapshot")
    assert counts(images) == {"train": 36}
    assert looks(images) == looks(read_source(pictures))


def test_other_columns_and_kinds(pictures, tmp_path):
    """Columns known by their types; images as bytes or as paths; classes as words."""
    table = table_of(pictures, range(3))
    features = {"picture": FEATURES["image"], "kind": FEATURES["label"]}
    renamed = table.rename_columns(["id", "picture", "kind"])
    renamed = renamed.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    words = [COLOURS[k] for k in table["label"].to_pylist()]
    files = [f"{pictures}/{colour}/{i}.png" for colour in COLOURS for i in range(3)]
    as_paths = pa.table({"image": files, "label": pa.array(words).dictionary_encode()})
    as_bytes = pa.table({"img": [Path(file).read_bytes() for file in files], "class": words})
    only_paths = pa.table({"image": pa.array([{"bytes": None, "path": file} for file in files], STRUCT)})
    only_paths = only_paths.append_column("label", pa.array(words))
    expected = sorted((word, Image.open(file).tobytes()) for word, file in zip(words, files, strict=True))
    for i, other in enumerate((renamed, as_paths, as_bytes, only_paths)):
        pq.write_table(other, tmp_path / f"{i}.parquet")
        assert looks(read_source(tmp_path / f"{i}.parquet")) == expected


def test_what_has_no_label_or_no_part_is_left_out_and_said(saved, pictures, capsys):
    """As the hidden labels of a hub's test split are -1."""
    save_to_disk(saved / "extra", table_of(pictures, range(1)))
    for path in (saved / "test").iterdir():
        path.unlink()
    (saved / "test").rmdir()
    save_to_disk(saved / "test", table_of(pictures, range(2), labels=[0, -1, None, 1, -1, 2]))
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test", "extra"]}))
    images = read_source(saved)
    assert counts(images) == {"train": 18, "valid": 6, "test": 3}
    assert [images.classes[label] for label in images.part("test").labels] == list(COLOURS)
    said = capsys.readouterr().err
    assert "left out 3 images without a label" in said
    assert "none of the parts: extra" in said
    assert len(find_images([saved])[1]) == 33  # but there are images in all of them


def test_what_is_wrong_is_said(saved, pictures, tmp_path):
    def refuses(path: Path, words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            read_source(path)
        assert "\n" not in str(caught.value)

    for name, table, words in (
        ("label", table_of(pictures, range(1), labels=[0, 1, 3]), r"label\.parquet\[2\]: label 3 is none of the 3"),
        ("lists", pa.table({"image": [b"x"], "label": [[1, 2]]}), r"lists\.parquet\[0\]: several values"),
        ("pixels", pa.table({"image": [[1, 2]], "label": ["a"]}), "column image holds list"),
        ("none", pa.table({"image": [b"x"], "species": ["a"]}), "no column label or .*; there are image, species"),
    ):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        refuses(tmp_path / f"{name}.parquet", words)
    for config in ("one", "other"):
        (tmp_path / "both" / config).mkdir(parents=True)
        pq.write_table(table_of(pictures, range(1)), tmp_path / "both" / config / "train.parquet")
    refuses(tmp_path / "both", r"several data sets \(one, other\)")

    shard = saved / "train" / "data-00001-of-00002.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refuses(saved, r"data-00001-of-00002\.arrow: not a file of Arrow's stream format, or damaged")
    shard.write_bytes(b"")
    refuses(saved, "data-00001")
    shard.unlink()
    refuses(saved, r"data-00001-of-00002\.arrow: no such file, but state\.json beside it names it")
    (saved / "train" / "state.json").write_text("[]")
    refuses(saved, r"state\.json: damaged: no JSON with '_data_files'")
    (saved / "train" / "state.json").write_text('{"_data_files": 3}')
    refuses(saved, r"state\.json: damaged")
    (saved / "train" / "state.json").write_text('{"_data_files": [3]}')
    refuses(saved, r"state\.json: names no files")
    (saved / "train" / "state.json").unlink()
    refuses(saved, r"train/state\.json: no such file")
    (saved / "dataset_dict.json").write_text("{")
    refuses(saved, r"dataset_dict\.json: damaged")


def test_damaged_anywhere(pictures, tmp_path):
    """One clear line, or images that are read; the process never ends over it."""
    save_to_disk(tmp_path / "d", table_of(pictures, range(1)))
    shard = tmp_path / "d" / "data-00000-of-00001.arrow"
    whole, rng, n_refused = shard.read_bytes(), np.random.default_rng(0), 0
    cuts = [whole[:length] for length in range(0, len(whole) - 8, len(whole) // 40)]
    for content in (*cuts, *(spoiled(whole, rng) for _ in range(100))):
        shard.write_bytes(content)
        try:
            images = read_source(tmp_path / "d")
        except InputError:
            n_refused += 1
        else:
            assert sum(1 for _ in images.items) <= 3
    assert n_refused > len(cuts)


def spoiled(content: bytes, rng: np.random.Generator) -> bytes:
    """Two bytes among the first 1,024, where sizes are told, and two anywhere are other ones."""
    changed = bytearray(content)
    for place in (*rng.integers(0, 1024, 2), *rng.integers(0, len(content), 2)):
        changed[place] = rng.integers(256)
    return bytes(changed)


def test_train_eval_predict(saved, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--model", "test_vmamba", "--size", "16", "--batch-size", "8", "--lr", "0.01", "--epochs", "1"]
    assert main(["vision", "train", str(saved), "-o", str(run), *flags, "--device", "cpu"]) == 0
    assert json.loads((run / "labels.json").read_text()) == dict(zip("012", COLOURS, strict=True))
    assert json.loads((run / "manifest.json").read_text())["settings"]["parts"] == {"train": 18, "valid": 6, "test": 12}
    words = ["vision", "eval", str(run), str(saved), "-o", str(tmp_path / "e"), "--device", "cpu"]
    assert main(words) == 0
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "e", run))
    assert ours["confusion"] == theirs["confusion"]
    out = tmp_path / "p.csv"
    words = ["vision", "predict", str(run), str(saved / "test"), "-o", str(out), "--device", "cpu"]
    assert main(words) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{saved}/test/data-00000-of-00001.arrow[{i}]" for i in range(12)]
    with (tmp_path / "e" / "predictions.tsv").open() as file:
        assert [row["predicted"] for row in csv.DictReader(file, delimiter="\t")] == [row["class_1"] for row in rows]
    capsys.readouterr()


def test_written_by_datasets_itself(pictures, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    files = [pictures / colour / f"{i}.png" for colour in COLOURS for i in range(12)]
    rows = {"image": [Image.open(file) for file in files], "label": [file.parent.name for file in files]}
    whole = datasets.Dataset.from_dict(rows, features=features).shuffle(seed=0)
    splits = whole.train_test_split(test_size=9, seed=0)
    splits.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
    for name, split in splits.items():
        split.to_parquet(str(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet"))
    for folder in (tmp_path / "saved", tmp_path / "hub"):
        images = read_source(folder)
        assert (images.classes, counts(images)) == (COLOURS, {"train": 27, "test": 9})
        assert looks(images) == looks(read_source(pictures))
    assert [len(find_shards(tmp_path / name)) for name in ("saved", "hub")] == [3, 2]
