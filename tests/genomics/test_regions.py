"""Regions against what was written, and every file that must be refused. (Their bases: test_cutting.py.)"""

import gzip
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.reading.regions import Region, read_benchmark_folder, read_regions

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
