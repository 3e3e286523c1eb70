"""Regions against what was written, their bases against Biopython, and every file that must be refused."""

import gzip
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pysam
import pytest
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import N, tokenize
from polymamba.genomics.reading.chromosomes import match_names
from polymamba.genomics.reading.regions import Region, cut, read_benchmark_folder, read_regions, region_name

compress = partial(gzip.compress, mtime=0)  # the same bytes in every process: they stand in test names

NAMES = st.text("chrXY1290_.|é", min_size=1, max_size=8)
WORDS = st.text("abcXYZ019_.:=%é", min_size=1, max_size=8)
PARTS = st.sampled_from(["train", "valid", "test"])
REGIONS = st.lists(
    st.tuples(NAMES, st.integers(0, 10**9), st.integers(1, 10**6), st.sampled_from("+-."), WORDS, PARTS), min_size=1
)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def plain(regions: list[Region]) -> list[tuple]:
    return [region[:6] for region in regions]


def refusal(path: Path, read=read_regions) -> str:
    """The message with which a file is refused, without its path."""
    with pytest.raises(InputError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).lstrip(",: ")


# BED


@given(
    regions=REGIONS,
    header=st.permutations(["Chrom", "start", "chromEnd", "strand", "label", "split", "score"]),
    hash_mark=st.sampled_from(["", "#", "# "]),
    separator=st.sampled_from(["\t", " ", "   "]),
    end=st.sampled_from(["\n", "\r\n"]),
    packed=st.booleans(),
)
def test_bed_with_a_header_reads_back(tmp_path_factory, regions, header, hash_mark, separator, end, packed):
    lines = ["track name=x", "", "# a comment", hash_mark + separator.join(header)]
    first = len(lines) + 1
    for chromosome, start, length, strand, label, split in regions:
        cells = {"Chrom": chromosome, "start": str(start), "chromEnd": str(start + length), "strand": strand}
        cells |= {"label": label, "split": split, "score": "0"}
        lines.append(separator.join(cells[name] for name in header))
    content = (end.join(lines) + end).encode()
    path = write(tmp_path_factory.mktemp("bed") / "x.bed", compress(content) if packed else content)
    assert read_regions(path) == [
        Region(chromosome, start, start + length, strand, label, split, path, first + i)
        for i, (chromosome, start, length, strand, label, split) in enumerate(regions)
    ]


@given(regions=REGIONS, n_columns=st.integers(3, 12), separator=st.sampled_from(["\t", " "]))
def test_bed_3_to_12_reads_back(tmp_path_factory, regions, n_columns, separator):
    lines = ["browser position chr1:1-2", 'track name="a b" description="c"']
    for chromosome, start, length, strand, label, _ in regions:
        cells = [chromosome, start, start + length, label, 0, strand, start, start, 0, 1, f"{length},", "0,"]
        lines.append(separator.join(map(str, cells[:n_columns])))
    path = write(tmp_path_factory.mktemp("bed") / "x.BED", "\n".join(lines))
    assert plain(read_regions(path)) == [
        (c, start, start + length, strand if n_columns > 5 else ".", label if n_columns > 3 else "", "")
        for c, start, length, strand, label, _ in regions
    ]


def test_bed_columns_end_at_tabs_if_there_are_any(tmp_path):
    path = write(tmp_path / "x.bed.gz", compress(b"chr1\t0\t5\ta label\nchr 2\t1\t6\t.\ntrack\t2\t7\tc\n"))
    assert [region[:5] for region in read_regions(path)] == [
        ("chr1", 0, 5, ".", "a label"),
        ("chr 2", 1, 6, ".", "."),
        ("track", 2, 7, ".", "c"),
    ]


def test_bed_name_is_the_label_unless_there_is_one(tmp_path):
    table_browser = write(
        tmp_path / "a.bed", "#chrom\tchromStart\tchromEnd\tname\tscore\tstrand\nchr1\t0\t5\tx\t0\t-\n"
    )
    both = write(tmp_path / "b.bed", "chrom name start end class\nchr1 x 0 5 y\n")
    assert plain(read_regions(table_browser)) == [("chr1", 0, 5, "-", "x", "")]
    assert plain(read_regions(both)) == [("chr1", 0, 5, ".", "y", "")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no region"),
        ("track name=x\n#chrom start end\n", "holds no region"),
        ("chr1 5\n", "line 1: 2 columns; a BED file has at least 3"),
        ("\nchr1 5 9\nchr1 5\n", "line 3: 2 columns, but 3 in the lines before"),
        ("chr1\t5\t9\ta\nchr1 5 9 a b\n", "line 2: 5 columns, but 4 in the lines before"),
        ("#chrom start end label\nchr1 5 9\n", "line 2: 3 columns, but 4 in the lines before"),
        ("chr1 5 nine\n", "line 1: end 'nine' is no whole number, 0 or more"),
        ("chr1 5.0 9\n", "line 1: start '5.0' is no whole number"),
        ("chr1 -5 9\n", "line 1: start '-5' is no whole number, 0 or more"),
        ("chr1 1_000 2_000\n", "line 1: start '1_000' is no whole number"),
        ("chr1 ٣ 9\n", "line 1: start '٣' is no whole number"),
        (f"chr1 0 {'9' * 5000}\n", "line 1: end '99"),
        ("chr1\t5\t\n", "line 1: end '' is no whole number"),
        ("chr1 0 9\nchr1 9 9\n", "line 2: the region is empty or backwards, 9-9"),
        ("chr1 9 5\n", "line 1: the region is empty or backwards, 9-5"),
        ("chr1 0 9 a 0 plus\n", "line 1: strand 'plus' is none of + - ."),
        ("chr1\t0\t9\ta\t0\t\n", "line 1: strand '' is none of + - ."),
        ("\t0\t9\n", "line 1: no chromosome"),
        ("chrom start end split\nchr1 0 9 holdout\n", "line 2: split 'holdout' is none of train, valid"),
        ("chrom start end split\nchr1 0 9 .\n", "line 2: split '.' is none of train, valid"),
        ("chrom start end label target\n", "line 1: columns 'label' and 'target' may both be the label"),
        ("chr1 0 9\nchrom start end\n", "line 2: start 'start' is no whole number"),
        (b"chr1 0 9\nchr\xe9 0 9\n", "line 2: byte 0xe9, which is not UTF-8 text"),
        (compress(b"chr1 0 9\n" * 50)[:-9], "truncated: "),
    ],
)
def test_bed_refused(tmp_path, content, message):
    assert refusal(write(tmp_path / "x.bed", content)).startswith(message)


@pytest.mark.parametrize("name", ["x.txt", "x.csv.gz", "bed", "x.vcf"])
def test_other_file_names_refused(tmp_path, name):
    assert refusal(write(tmp_path / name, "chr1 0 9\n")).startswith(
        "regions are read from .bed, .bedgraph, .gff, .gff3"
    )


def test_missing_file(tmp_path):
    assert refusal(tmp_path / "x.bed") == "no such file"


# GFF3 and GTF

GFF3 = """##gff-version 3
#!genome-build x
chr1\tsrc\tgene\t1\t90\t.\t+\t.\tID=g1;Name=a%3Bb
chr1\tsrc\tCDS\t11\t20\t.\t-\t0\tID=c1;Label=x%20y;split=val

chr%202\tsrc\tCDS\t5\t5\t.\t.\t.\t ID=c2 ; label=z;split=test
###
##FASTA
>chr1
ACGT
"""


def gff_line(region, syntax: str, feature: str = "CDS") -> str:
    chromosome, start, length, strand, label, split = region
    pairs = {"ID": "a1", "label": label, "split": split}
    if syntax == "gff3":
        chromosome = quote(chromosome)
        attributes = ";".join(f"{key}={quote(value)}" for key, value in pairs.items())
    else:
        attributes = 'exon_number 1; note "a; label b"; ' + " ".join(f'{k} "{v}";' for k, v in pairs.items())
    return "\t".join([chromosome, "src", feature, str(start + 1), str(start + length), ".", strand, "0", attributes])


@given(
    regions=REGIONS,
    syntax=st.sampled_from(["gff3", "gtf"]),
    ending=st.sampled_from(["gff", "GFF3", "gtf"]),
    end=st.sampled_from(["\n", "\r\n"]),
    packed=st.booleans(),
)
def test_gff_reads_back(tmp_path_factory, regions, syntax, ending, end, packed):
    lines = ["##gff-version 3"]
    for region in regions:
        lines += ["# a comment", gff_line(region, syntax), gff_line(region, syntax, "exon")]
    content = (end.join(lines) + end).encode()
    path = tmp_path_factory.mktemp("gff") / (f"x.{ending}.gz" if packed else f"x.{ending}")
    write(path, compress(content) if packed else content)
    expected = [(c, start, start + n, strand, label, split) for c, start, n, strand, label, split in regions]
    read = read_regions(path, features=["CDS"])
    assert plain(read) == expected
    assert [region.line for region in read] == [3 + 3 * i for i in range(len(regions))]
    assert plain(read_regions(path)) == [region for region in expected for _ in range(2)]


def test_gff_label_is_the_attribute_or_else_the_type(tmp_path):
    path = write(tmp_path / "x.gff3", GFF3)
    cds = [("chr1", 10, 20, "-", "x y", "valid"), ("chr 2", 4, 5, ".", "z", "test")]
    assert plain(read_regions(path, features={"CDS"})) == cds
    assert plain(read_regions(path, features=("gene",))) == [("chr1", 0, 90, "+", "gene", "")]


def test_gff_attributes_that_say_nothing(tmp_path):
    path = write(tmp_path / "x.gtf", "".join(f"1\ts\texon\t1\t2\t.\t+\t.\t{text}\n" for text in ("", ".", "gene_id 7")))
    assert [region.label for region in read_regions(path)] == ["exon"] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("##gff-version 3\n", "holds no region"),
        ("1\ts\texon\t1\t2\t.\t+\t.\n", "line 1: 8 columns; a GFF or GTF line has 9, separated by tabs"),
        ("1 s exon 1 2 . + . ID=a\n", "line 1: 1 columns; a GFF"),
        ("\n1\ts\texon\t0\t2\t.\t+\t.\t.\n", "line 2: start 0, but GFF and GTF count from 1"),
        ("1\ts\texon\t-1\t2\t.\t+\t.\t.\n", "line 1: start '-1' is no whole number"),
        ("1\ts\texon\t3\t2\t.\t+\t.\t.\n", "line 1: the region is empty or backwards, 2-2"),
        ("1\ts\texon\t3\tx\t.\t+\t.\t.\n", "line 1: end 'x' is no whole number"),
        ("1\ts\texon\t1\t2\t.\t*\t.\t.\n", "line 1: strand '*' is none of + - ."),
        ("1\ts\texon\t1\t2\t.\t+\t.\tsplit=all\n", "line 1: split 'all' is none of train, "),
        (GFF3, "line 3: no attribute split, but the feature of line 4 has one"),
    ],
)
def test_gff_refused(tmp_path, content, message):
    assert refusal(write(tmp_path / "x.gff", content)).startswith(message)


def test_features_that_are_not_there(tmp_path):
    path = write(tmp_path / "x.gff", GFF3)
    for features, missing in [(["tRNA", "mRNA"], "mRNA, tRNA"), (["CDS", "cds"], "cds")]:
        message = refusal(path, lambda path, features=features: read_regions(path, features))
        assert message == f"no feature of type {missing}; there is CDS, gene"
    bed = write(tmp_path / "x.bed", "chr1 0 9\n")
    assert refusal(bed, lambda path: read_regions(path, ["CDS"])).startswith("a BED file has no feature types")


# Genomic Benchmarks


def test_benchmark_folder(tmp_path):
    write(tmp_path / "metadata.yaml", "version: 0\n")
    csv = "id,region,start,end,strand\n0,chr6,39541754,39546349,+\n1,chrX,0,200,-\n"
    train = write(tmp_path / "train" / "positive.csv.gz", compress(csv.encode()))
    # Some of the published files have a nameless first column.
    negative = write(tmp_path / "train" / "negative.x.csv", ",id,region,start,end,strand\r\n7,7,ENST1,784,984,+\r\n")
    test = write(tmp_path / "test" / "positive.csv.gz", compress(csv.encode()))
    positive = [("chr6", 39541754, 39546349, "+", "positive"), ("chrX", 0, 200, "-", "positive")]
    assert read_benchmark_folder(tmp_path) == [
        Region("ENST1", 784, 984, "+", "negative.x", "train", negative, 2),
        *(Region(*region, "train", train, line) for line, region in enumerate(positive, 2)),
        *(Region(*region, "test", test, line) for line, region in enumerate(positive, 2)),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no folder train or test"),
        ({"train/a.csv": "id,region,start,end\n0,1,2,3\n"}, "train/a.csv, line 1: no column for the strand"),
        ({"train/a.csv": "region,start,end,strand\n"}, "train/a.csv: has no row below its header"),
        ({"train/a.csv": "region,start,end,strand\n1,5,5,+\n"}, "train/a.csv, line 2: the region is empty"),
        ({"train/a.csv": "region,start,end,strand\n1,5,6,1\n"}, "train/a.csv, line 2: strand '1' is none of"),
        ({"train/a.tsv": ""}, "train/a.tsv: not named <class>.csv.gz or <class>.csv"),
        ({"train/a.csv": "", "train/a.csv.gz": ""}, "train/a.csv.gz: a second file for class 'a'"),
        ({"train/README.md": ""}, "train: holds no file <class>.csv.gz"),
        ({"train": ""}, "train: is a file, not a folder"),
        ({"val/a.csv": "", "dev/a.csv": ""}, "folders dev and val both name the valid part"),
        ({"train/a.csv": "", "more/a.csv": ""}, "more: split 'more' is none of train, valid"),
        ({"train/a.csv": "", "b.csv": ""}, "b.csv: split 'b.csv' is none of train, valid"),
    ],
)
def test_benchmark_folder_refused(tmp_path, files, message):
    for name, content in files.items():
        write(tmp_path / name, content)
    assert refusal(tmp_path, read_benchmark_folder).lstrip("/").startswith(message)


def test_no_benchmark_folder(tmp_path):
    assert refusal(tmp_path / "none", read_benchmark_folder) == "no such folder"
    assert refusal(write(tmp_path / "x", ""), read_benchmark_folder) == "is a file, not a folder"


# Chromosome names


@pytest.mark.parametrize(
    ("wanted", "known", "match"),
    [
        ("chr1", ["1", "10", "11"], "1"),
        ("1", ["chr1", "chr10", "chr11"], "chr1"),
        ("1", ["Chr1", "Chr2"], "Chr1"),
        ("chr1", ["chr01", "chr10"], "chr01"),
        ("chr10", ["chr01", "chr10"], "chr10"),
        ("Chr02", ["chromosome_1", "chromosome_2"], "chromosome_2"),
        ("chromosome_3", ["3", "chr33"], "3"),
        ("chrM", ["MT", "chr1"], "MT"),
        ("MT", ["chrM", "chr1"], "chrM"),
        ("M", ["chrMT"], "chrMT"),
        ("x", ["chrX", "chrY"], "chrX"),
        ("2L", ["chr2L", "chr2R"], "chr2L"),
        ("scaffold10", ["scaffold1", "scaffold10"], "scaffold10"),
        ("chr01", ["Umaydis:chr01:1:+:2476500", "Umaydis:chr02:1:+:1879391"], "Umaydis:chr01:1:+:2476500"),
        ("2", ["Umaydis:chr01:2:+:2476500", "Umaydis:chr02:1:+:1879391"], "Umaydis:chr02:1:+:1879391"),
        ("chr1", ["NC_000001.11|chr1", "NC_000010.11|chr10"], "NC_000001.11|chr1"),
        ("NC_000010.11", ["NC_000001.11|chr1", "NC_000010.11|chr10"], "NC_000010.11|chr10"),
        # An equal name goes first, whatever else would do.
        ("chr1", ["1", "chr1", "Chr1", "x|chr1"], "chr1"),
        ("chrM", ["chrM", "chrMT"], "chrM"),
        ("a:chr1", ["a:chr1", "chr1"], "a:chr1"),
    ],
)
def test_names_that_match(wanted, known, match):
    for order in (known, known[::-1]):
        assert match_names({wanted: "x.bed, line 7"}, order) == {wanted: match}


@pytest.mark.parametrize(
    ("wanted", "known", "both"),
    [
        ("chr1", ["1", "chr01"], "'1' or 'chr01'"),
        ("MT", ["chrM", "chrMT"], "'chrM' or 'chrMT'"),
        ("chr1", ["1", "x|chr1"], "'1' or 'x|chr1'"),
        ("chr1", ["Umaydis:chr01:1", "Ztritici:chr01:1"], "'Umaydis:chr01:1' or 'Ztritici:chr01:1'"),
        ("chrx", ["chrX", "X"], "'X' or 'chrX'"),
    ],
)
def test_names_that_may_mean_two(wanted, known, both):
    for order in (known, known[::-1]):
        with pytest.raises(InputError) as error:
            match_names({wanted: "x.bed, line 7"}, order)
        message = f"x.bed, line 7: chromosome {wanted!r} may mean {both} of the genome; use the genome's own name"
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("wanted", "known", "has"),
    [
        ("chr9", [f"chr{i}" for i in range(1, 9)], "chr1, chr2, chr3, chr4, chr5 and 3 more"),
        ("chr1", ["chr10", "chr11"], "chr10, chr11"),
        ("1", ["a:chr2:1:+:9"], "a:chr2:1:+:9"),  # 1 is a position there
        ("scaffold11", ["scaffold101"], "scaffold101"),
        ("x1", ["xchr1"], "xchr1"),
        ("a:chr1", ["b:chr1", "chr1"], "b:chr1, chr1"),  # of another species, for all we know
    ],
)
def test_names_that_are_not_there(wanted, known, has):
    with pytest.raises(InputError) as error:
        match_names({wanted: "x.bed, line 7"}, known)
    assert str(error.value) == f"x.bed, line 7: chromosome {wanted!r} is not in the genome, which has {has}"


# Cutting


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
        write(tmp_path / "b.fa.gz", compress(fasta({name: sequences[name] for name in ("chr2", "chr1")}))),
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
