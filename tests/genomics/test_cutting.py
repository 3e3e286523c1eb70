"""The bases of regions, against Biopython, and the regions and genomes that must be refused."""

import gzip
from pathlib import Path

import numpy as np
import pysam
import pytest
from Bio.Seq import Seq

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import N, tokenize
from polymamba.genomics.reading.regions import Region, cut, read_regions, region_name


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fasta(sequences: dict[str, str], width: int = 60) -> bytes:
    lines = []
    for name, sequence in sequences.items():
        lines += [f">{name}", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    return "\r\n".join(lines).encode()


def random_sequence(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGTNacgtnRYSWKMBDHVry"), length))


def bgzip(path: Path, content: bytes) -> Path:
    plain_file = write(path.with_suffix(".plain"), content)
    pysam.tabix_compress(str(plain_file), str(path))
    return path


@pytest.mark.parametrize("hard_mask", [False, True])
def test_cut_equals_biopython(tmp_path, hard_mask):
    rng = np.random.default_rng(0)
    sequences = {f"chr{i}": random_sequence(rng, length) for i, length in enumerate((997, 1, 64, 3001))}
    genome = [
        write(tmp_path / "a.fa", fasta({"chr0": sequences["chr0"], "unplaced": "ACGT"})),
        write(tmp_path / "b.fa.gz", gzip.compress(fasta({name: sequences[name] for name in ("chr2", "chr1")}))),
        bgzip(tmp_path / "c.fa.gz", fasta({"chr3": sequences["chr3"]}, 77)),
    ]
    regions = [Region("chr1", 0, 1, "-", "", "", tmp_path, 1), Region("3", 0, 3001, "-", "", "", tmp_path, 2)]
    for line in range(3, 200):
        name = f"chr{rng.choice([0, 2, 3])}"
        start, end = sorted(rng.choice(len(sequences[name]) + 1, 2, replace=False).tolist())
        strand = str(rng.choice(["+", "-", "."]))
        regions.append(Region(name, start, end, strand, "x", "", tmp_path, line))
    pieces = list(cut(genome, regions, hard_mask=hard_mask))
    own_names = [region._replace(chromosome=f"chr{region.chromosome[-1]}") for region in regions]
    assert [region for region, _ in pieces] == own_names
    for region, tokens in pieces:
        name = f"chr{region.chromosome.removeprefix('chr')}"
        piece = Seq(sequences[name][region.start : region.end])
        if hard_mask:
            piece = Seq("".join("N" if letter.islower() else letter for letter in str(piece)))
        piece = piece.reverse_complement() if region.strand == "-" else piece
        assert tokens.dtype == np.uint8
        assert np.array_equal(tokens, tokenize(str(piece))), region_name(region)
        assert tokens.base is None, "a view keeps the chromosome in memory"
    assert any((tokens == N).any() for _, tokens in pieces)


def test_cut_from_other_formats(tmp_path):
    genome = write(tmp_path / "x.fastq", "@chr1\nACGTT\n+\nIIIII\n")
    ((_, tokens),) = cut([genome], [Region("1", 2, 5, "-", "", "", tmp_path, 1)])
    assert np.array_equal(tokens, tokenize("AAC"))


def test_regions_of_a_bed_file_by_their_names(tmp_path):
    bed = write(tmp_path / "x.bed", "chr1 2 6 a 0 -\nchr1 2 6 b 0 .\n")
    genome = write(tmp_path / "g.fa", ">chr1 dna\nACGTTTTT\n")
    found = {region_name(region): tokens for region, tokens in cut([genome], read_regions(bed))}
    assert list(found) == ["chr1:2-6(-)", "chr1:2-6(.)"]
    assert np.array_equal(found["chr1:2-6(-)"], tokenize("AAAC"))
    assert np.array_equal(found["chr1:2-6(.)"], tokenize("GTTT"))


def test_a_name_in_two_files_matters_only_if_it_is_wanted(tmp_path):
    a = write(tmp_path / "a.fa", ">X\nACGT\n>chr1\nAC\n")
    b = write(tmp_path / "b.fa", ">X\nTTTT\n")
    region = Region("chr1", 0, 2, "+", "", "", tmp_path / "x.bed", 3)
    assert np.array_equal(next(cut([a, b], [region]))[1], tokenize("AC"))
    with pytest.raises(InputError) as error:
        list(cut([a, b], [region._replace(chromosome="chrX")]))
    assert str(error.value) == f"{a} and {b}: both hold a chromosome 'X'; rename or leave out one"


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (("chr1", 0, 9), "ends at 9, but chromosome 'chr1' has 8 bases; is it the same assembly?"),
        (("chr1", 8, 9), "ends at 9, but chromosome 'chr1' has 8 bases; is it the same assembly?"),
        (("chr2", 0, 1), "chromosome 'chr2' is not in the genome, which has 1, M, chrM"),
        (("MT", 0, 1), "chromosome 'MT' may mean 'M' or 'chrM' of the genome; use the genome's own name"),
    ],
)
def test_cut_refused(tmp_path, region, message):
    genome = write(tmp_path / "g.fa", ">1\nACGTACGT\n>M\nAC\n>chrM\nAC\n")
    good = Region("1", 0, 8, "+", "", "", tmp_path / "x.bed", 4)
    bad = Region(*region, "+", "", "", tmp_path / "x.bed", 5)
    with pytest.raises(InputError) as error:
        list(cut([genome], [good, bad]))
    assert str(error.value) == f"{tmp_path}/x.bed, line 5: {message}"


def test_a_bad_genome_is_refused(tmp_path):
    genome = write(tmp_path / "g.fa", ">1\nACGT\n>2\nAC*T\n")
    with pytest.raises(InputError, match=r"g\.fa, record '2', line 4"):
        next(cut([genome], [Region("1", 0, 1, "+", "", "", tmp_path, 1)]))
