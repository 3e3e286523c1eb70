"""Dividing a genome: what each base is of, base by base, against a slow and plain count."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import N, tokenize
from polymamba.genomics.language_commands import GenomeDividing
from polymamba.genomics.n_runs import find_n_runs
from polymamba.genomics.parts import Stretch, divide_genome, write_splits_bed
from polymamba.genomics.reading.genome import Genome


def genome_of(folder: Path, sequences: dict[str, str], name: str = "genome.fa") -> Genome:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
    return Genome([path])


def part_of_each_base(genome: Genome, stretches: list[Stretch]) -> list[list[str]]:
    parts = [[""] * contig.length for contig in genome.contigs]
    for stretch in stretches:
        for i in range(stretch.start, stretch.end):
            assert not parts[stretch.contig][i], "a base is of two stretches"
            parts[stretch.contig][i] = stretch.part
    return parts


LENGTHS = {"chr1": 90, "chr2": 40, "chrX": 25}


@pytest.fixture
def genome(tmp_path):
    rng = np.random.default_rng(0)
    with genome_of(tmp_path, {name: "".join(rng.choice(list("ACGT"), n)) for name, n in LENGTHS.items()}) as genome:
        yield genome


@given(st.integers(1, 60), st.floats(0.01, 0.6), st.just(0) | st.floats(0.01, 0.39), st.integers(0, 5))
def test_blocks(tmp_path_factory, block, valid, test, seed):
    how = GenomeDividing(block=block, valid_fraction=valid, test_fraction=test)
    with genome_of(tmp_path_factory.mktemp("g"), {name: "A" * n for name, n in LENGTHS.items()}) as genome:
        stretches = divide_genome(genome, how, seed)
        assert divide_genome(genome, how, seed) == stretches
        parts = part_of_each_base(genome, stretches)
        blocks = [row[k : k + block] for row in parts for k in range(0, len(row), block)]
    counts = {part: sum(row.count(part) for row in parts) for part in ("train", "valid", "test")}
    assert sum(counts.values()) == 155
    assert all(len(set(one)) == 1 for one in blocks), "a block was torn"
    for part, share in (("valid", valid), ("test", test)):
        assert (counts[part] > 0) == (share > 0)
        if len(blocks) > 12:
            assert counts[part] < share * 155 + block + 1e-9
    assert counts["train"] > 0
    assert stretches == sorted(stretches)


def test_the_seed_decides(genome):
    how = GenomeDividing(block=5)
    assert divide_genome(genome, how, 0) != divide_genome(genome, how, 1)


def test_whole_chromosomes(genome):
    stretches = divide_genome(genome, GenomeDividing(split_by="chromosome"), 0)
    assert sorted(s.part for s in stretches) == ["test", "train", "valid"]
    assert [s.n_bases for s in stretches] == list(LENGTHS.values())


def test_named_chromosomes_by_other_names(genome):
    how = GenomeDividing(valid_chromosomes=("2",), test_chromosomes=("chrx",))
    assert [s.part for s in divide_genome(genome, how, 0)] == ["train", "valid", "test"]


def test_aligned_genomes_hold_out_the_same_places(tmp_path):
    for species in ("human", "chimp"):
        genome_of(tmp_path, {"bin1": "A" * 50, "bin2": "C" * 47}, f"{species}.fa").close()
    with Genome([tmp_path / "human.fa", tmp_path / "chimp.fa"]) as genome:
        human, chimp, *_ = np.split(np.array(part_of_each_base(genome, divide_genome(genome, _blocks(), 3)), object), 2)
    assert human.tolist() == chimp.tolist()


def _blocks() -> GenomeDividing:
    return GenomeDividing(block=9, valid_fraction=0.2, test_fraction=0.2)


def test_paths_name_parts(tmp_path):
    paths = [tmp_path / part / "x.fa" for part in ("train", "valid", "test")]
    for path in paths:
        genome_of(tmp_path, {"x": "ACGT"}, str(path)).close()
    with Genome(paths) as genome:
        assert divide_genome(genome, GenomeDividing(), 0) == [
            Stretch(i, 0, 4, part) for i, part in enumerate(("train", "valid", "test"))
        ]


REGIONS = st.lists(
    st.tuples(st.sampled_from(list(LENGTHS)), st.integers(0, 24), st.integers(1, 30), st.sampled_from("tvs")),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(REGIONS)
def test_regions_against_a_count_base_by_base(tmp_path_factory, regions):
    folder = tmp_path_factory.mktemp("g")
    names = {"t": "train", "v": "val", "s": "TEST"}
    truth = {name: [set() for _ in range(n)] for name, n in LENGTHS.items()}
    rows = ["#chrom\tstart\tend\tsplit"]
    for name, start, length, part in regions:
        end = min(start + length, LENGTHS[name])
        rows.append(f"{name.removeprefix('chr')}\t{start}\t{end}\t{names[part]}")
        for i in range(start, end):
            truth[name][i].add({"t": "train", "v": "valid", "s": "test"}[part])
    (folder / "x.bed").write_text("\n".join(rows) + "\n")
    how = GenomeDividing(regions=(folder / "x.bed",), block=1)
    clash = any(len(parts) > 1 for row in truth.values() for parts in row)
    with genome_of(folder, {name: "A" * n for name, n in LENGTHS.items()}) as genome:
        if clash:
            with pytest.raises(
                InputError, match=r"x.bed, line \d+: the .* region overlaps the .* region of .*line \d+"
            ):
                divide_genome(genome, how, 0)
            return
        in_train = sum(parts == {"train"} for row in truth.values() for parts in row)
        has = {part for row in truth.values() for parts in row for part in parts}
        if in_train <= len({"valid", "test"} - has):
            with pytest.raises(InputError):
                divide_genome(genome, how, 0)
            return
        found = part_of_each_base(genome, divide_genome(genome, how, 0))
        for row, name in zip(found, LENGTHS, strict=True):
            for part, parts in zip(row, truth[name], strict=True):
                taken = part in {"valid", "test"} - has and parts == {"train"}
                assert taken or {part} - {""} == parts
        write_splits_bed(folder / "splits.bed", genome, divide_genome(genome, how, 0))
        again = divide_genome(genome, GenomeDividing(regions=(folder / "splits.bed",)), 7)
        assert part_of_each_base(genome, again) == found, "the file that was written does not read back"


@pytest.mark.parametrize(
    ("bed", "wanted"),
    [
        ("chr1\t0\t91\n", "x.bed, line 1: ends at 91, but chromosome 'chr1' has 90 bases; is it the same assembly?"),
        ("chr7\t0\t9\n", "x.bed, line 1: chromosome 'chr7' is not in the genome, which has chr1, chr2, chrX"),
        ("chr1\t9\t9\n", "x.bed, line 1: the region is empty or backwards, 9-9"),
        ("#chrom start end split\nchr1 0 9 dev\n", "the genome has a valid part, but no train part"),
        ("chr1\t0\t9\n", "so few blocks cannot be divided into train and valid and test; give a --block smaller"),
    ],
)
def test_bad_regions(genome, tmp_path, bed, wanted):
    (tmp_path / "x.bed").write_text(bed)
    with pytest.raises(InputError) as error:
        divide_genome(genome, GenomeDividing(regions=(tmp_path / "x.bed",)), 0)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_other_refusals(genome, tmp_path):
    with pytest.raises(InputError, match="--test-chromosomes 1: named for the valid part, too"):
        divide_genome(genome, GenomeDividing(valid_chromosomes=("chr1",), test_chromosomes=("1",)), 0)
    with pytest.raises(InputError, match="--valid-chromosomes: chromosome 'Y' is not in the genome"):
        divide_genome(genome, GenomeDividing(valid_chromosomes=("Y",)), 0)
    with genome_of(tmp_path, {"one": "ACGT" * 9}, "one.fa") as one:
        with pytest.raises(InputError, match=r"1 chromosome cannot be divided .* use --split-by block"):
            divide_genome(one, GenomeDividing(split_by="chromosome"), 0)
        (tmp_path / "x.bed").write_text("one\t0\t9\n")
        both = Genome([tmp_path / "one.fa", genome_of(tmp_path, {"one": "AC"}, "two.fa").contigs[0].path])
        with both, pytest.raises(InputError, match=r"x.bed, line 1: chromosome 'one' stands in .*one.fa and .*two.fa"):
            divide_genome(both, GenomeDividing(regions=(tmp_path / "x.bed",)), 0)
    with pytest.raises(ValueError, match="valid_fraction is 0"):
        GenomeDividing(valid_fraction=0)


# Runs of N


@settings(max_examples=60)
@given(st.text("ACGTNRnacg", min_size=1, max_size=300), st.data())
def test_n_runs_against_counting(tmp_path_factory, sequence, data):
    import polymamba.genomics.reading.genome as module

    start = data.draw(st.integers(0, len(sequence) - 1))
    end = data.draw(st.integers(start + 1, len(sequence)))
    starts = np.array(data.draw(st.lists(st.integers(start, end), min_size=1, max_size=9)))
    ends = np.array([data.draw(st.integers(s, end)) for s in starts.tolist()])
    tokens = tokenize(sequence)
    with genome_of(tmp_path_factory.mktemp("g"), {"x": sequence}) as genome, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Genome.pieces, "__defaults__", (data.draw(st.integers(1, 50)),))
        (runs,) = find_n_runs(genome, [Stretch(0, start, end, "train")])
    truth = [int(np.sum(tokens[s:e] == N)) for s, e in zip(starts.tolist(), ends.tolist(), strict=True)]
    assert runs.count(starts, ends).tolist() == truth
    assert np.all(runs.starts < runs.ends)
    assert np.all(runs.ends[:-1] < runs.starts[1:])
