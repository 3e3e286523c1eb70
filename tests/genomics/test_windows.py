"""Windows of long sequences, and tracks along them, against brute force."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core import BackboneConfig
from polymamba.genomics import DNAClassifierConfig
from polymamba.genomics.alphabet import decode, tokenize
from polymamba.genomics.dataset import LabelledRow, labelled
from polymamba.genomics.pieces import Piece
from polymamba.genomics.tracks import mean_cover, write_bed, write_bedgraph
from polymamba.genomics.windows import cut_windows, moved, windows_of, without_n_rich


@given(length=st.integers(1, 200), window=st.integers(1, 80), stride=st.integers(1, 100))
def test_windows_have_one_length_and_end_at_the_end(length, window, stride):
    found = list(windows_of(length, window, stride))
    assert found == sorted(set(found))
    assert {end - start for start, end in found} == {min(window, length)}
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(start % stride == 0 for start, _ in found[:-1])
    if stride <= window:
        covered = {i for start, end in found for i in range(start, end)}
        assert covered == set(range(length))


def test_cut_windows_keep_label_part_and_source():
    rows = [
        LabelledRow("r", tokenize("ACGTACGTAC"), "x", "train", "a.fa"),
        LabelledRow("s", tokenize("GGG"), "y", "train", "b.fa"),
        LabelledRow("t", tokenize("ACGTACGTAC"), "x", "test", "c.fa"),
    ]
    data = cut_windows(labelled(rows), 4, 3)
    assert data.names == ["r:0-4", "r:3-7", "r:6-10", "s:0-3", "t:0-4", "t:4-8", "t:6-10"]
    sequences = ("ACGT", "TACG", "GTAC", "GGG", "ACGT", "ACGT", "GTAC")
    assert [ids.tolist() for ids in data.tokens] == [tokenize(s).tolist() for s in sequences]
    assert data.label_texts() == ["x", "x", "x", "y", "x", "x", "x"]
    assert data.split.tolist() == ["train"] * 4 + ["test"] * 3
    assert data.sources == ["a.fa"] * 3 + ["b.fa"] + ["c.fa"] * 3
    assert data.records.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert data.subset("test").records.tolist() == [2, 2, 2]
    assert data.starts.tolist() == [0, 3, 6, 0, 0, 4, 6]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    window=st.integers(1, 20),
    stride=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_moved_windows_are_stretches_of_their_record_nearby(lengths, window, stride, seed):
    rows = [LabelledRow(f"{i}", np.arange(n, dtype=np.uint8), "x", "", "f") for i, n in enumerate(lengths)]
    records = labelled(rows)
    data = cut_windows(records, window, stride)
    rng = np.random.default_rng(seed)
    for i, ids in enumerate(data.tokens):
        places = set()
        for _ in range(40):
            ids_there = moved(data, i, rng, records=records.tokens, reach=stride // 2, max_n=1)
            start = int(ids_there[0])  # tokens are positions here
            assert ids_there.tolist() == list(range(start, start + len(ids)))
            assert start + len(ids) <= lengths[data.records[i]]
            assert abs(start - data.starts[i]) <= stride // 2
            places.add(start)
        free = lengths[data.records[i]] > len(ids) and stride > 1
        assert (len(places) > 1) is free


def test_a_window_does_not_move_where_it_would_be_mostly_n():
    records = labelled([LabelledRow("r", tokenize("A" * 5 + "N" * 20), "x", "", "f")])
    data = cut_windows(records, 5, 5).take(np.array([0]))
    rng = np.random.default_rng(0)
    seen = {decode(moved(data, 0, rng, records=records.tokens, reach=5, max_n=0.4)) for _ in range(100)}
    assert seen == {"AAAAA", "AAAAN", "AAANN"}


def test_n_rich_sequences_are_left_out_and_counted():
    rows = [LabelledRow(f"{i}", tokenize(s), "x", "", "f") for i, s in enumerate(["ACGT", "ANNT", "NNRT", "NNNN"])]
    kept, n_dropped = without_n_rich(labelled(rows), 0.5)
    assert (kept.names, n_dropped) == (["0", "1"], 2)


CONFIG = DNAClassifierConfig(backbone=BackboneConfig(d_model=8, n_layer=1), classes=("a", "b"))


def pieces(*places: tuple[str, int, int]) -> list[Piece]:
    return [Piece(name, start, end, np.zeros(end - start, np.uint8)) for name, start, end in places]


@given(
    windows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), min_size=1, max_size=8),
    at_a_time=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_bedgraph_holds_the_mean_over_each_base(windows, at_a_time, seed):
    spans = [(start, start + width) for start, width in sorted(windows)]
    values = np.random.default_rng(seed).random((len(spans), 2))
    by_base, stretches = {}, []
    for start, end, means in mean_cover(((*span, row) for span, row in zip(spans, values, strict=True)), at_a_time):
        assert start < end
        stretches.append((start, end))
        for base in range(start, end):
            assert base not in by_base
            by_base[base] = means
    borders = {border for span in spans for border in span}
    assert stretches == sorted(stretches)
    assert all(not borders & set(range(start + 1, end)) and {start, end} <= borders for start, end in stretches)
    for base in range(60):
        covering = [v for (start, end), v in zip(spans, values, strict=True) if start <= base < end]
        assert (base in by_base) == bool(covering)
        if covering:
            assert by_base[base] == pytest.approx(np.mean(covering, axis=0))


def test_bed_and_bedgraph_files(tmp_path):
    where = pieces(("chr1", 0, 4), ("chr1", 2, 6), ("chr2", 0, 3))
    predictions = np.array([[0.9, 0.1], [0.4, 0.6], [0.25, 0.75]])
    predicted = list(zip(where, ["a", "b", "b"], predictions, strict=True))
    file = io.StringIO()
    write_bed(file, predicted, CONFIG)
    assert file.getvalue() == "chr1\t0\t4\ta\t900\t.\nchr1\t2\t6\tb\t600\t.\nchr2\t0\t3\tb\t750\t.\n"
    file = io.StringIO()
    write_bedgraph(file, predicted, CONFIG, tmp_path)
    track_a = 'track type=bedGraph name="a"\nchr1\t0\t2\t0.9\nchr1\t2\t4\t0.65\nchr1\t4\t6\t0.4\nchr2\t0\t3\t0.25\n'
    track_b = 'track type=bedGraph name="b"\nchr1\t0\t2\t0.1\nchr1\t2\t4\t0.35\nchr1\t4\t6\t0.6\nchr2\t0\t3\t0.75\n'
    assert file.getvalue() == track_a + track_b
    assert not list(tmp_path.iterdir())
