"""Every way to hold labelled DNA gives the same labelled records as its plain-FASTA twin."""

import gzip
import io
from pathlib import Path

import numpy as np
import pysam
import pytest
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from polymamba.core.errors import InputError
from polymamba.genomics.alphabet import decode
from polymamba.genomics.commands import Dividing, Source
from polymamba.genomics.dataset import LabelledRow, LabelledSequences, labelled
from polymamba.genomics.dividing import chromosome_of, divide
from polymamba.genomics.sources import read_source

rng = np.random.default_rng(7)
RECORDS = [  # name, sequence, class
    (f"{label}{i}", "".join(rng.choice(list("ACGTacgtN"), rng.integers(5, 90))), label)
    for label in ("donor", "other")
    for i in range(6)
]


def fasta(records, width: int = 60, end: str = "\n") -> bytes:
    lines = []
    for name, sequence, *_ in records:
        lines += [f">{name}", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    return "".join(line + end for line in lines).encode()


def of_class(label: str):
    return [record for record in RECORDS if record[2] == label]


def described(data: LabelledSequences) -> list[tuple[str, str, str]]:
    return sorted(zip(data.names, map(decode, data.tokens), data.label_texts(), strict=True))


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> list[tuple[str, str, str]]:
    folder = tmp_path_factory.mktemp("twin")
    for label in ("donor", "other"):
        (folder / f"{label}.fa").write_bytes(fasta(of_class(label)))
    return described(read_source(Source(data=folder)))


def biopython(records, format: str) -> bytes:
    text = io.StringIO()
    annotations = {"molecule_type": "DNA"}
    for name, sequence, *_ in records:
        record = SeqRecord(Seq(sequence), id=name, name=name, description="", annotations=annotations)
        record.letter_annotations["phred_quality"] = [30 + i % 10 for i in range(len(sequence))]
        SeqIO.write(record, text, format)
    return text.getvalue().encode()


def bgzipped(path: Path, content: bytes) -> None:
    with pysam.BGZFile(str(path), "wb") as file:
        file.write(content)


FORMS = {
    "one line": (".fa", fasta(of_class("donor"), 1000)),
    "short lines": (".fasta", fasta(of_class("donor"), 7)),
    "CRLF": (".fna", fasta(of_class("donor"), 13, "\r\n")),
    "gzip": (".fa.gz", gzip.compress(fasta(of_class("donor")))),
    "FASTQ": (".fastq", biopython(of_class("donor"), "fastq")),
    "FASTQ gzip": (".fq.gz", gzip.compress(biopython(of_class("donor"), "fastq"))),
    "GenBank": (".gb", biopython(of_class("donor"), "genbank")),
    "EMBL": (".embl", biopython(of_class("donor"), "embl")),
}


@pytest.mark.parametrize("form", FORMS)
def test_file_formats(form, twin, tmp_path):
    ending, content = FORMS[form]
    (tmp_path / f"donor{ending}").write_bytes(content)
    (tmp_path / "other").mkdir()
    bgzipped(tmp_path / "other" / "o.fa.gz", fasta(of_class("other")))
    assert described(read_source(Source(data=tmp_path))) == twin
    words = (f"donor={tmp_path}/donor*", f"other={tmp_path / 'other'}")
    assert described(read_source(Source(classes=words))) == twin


def test_standard_input(twin, tmp_path, monkeypatch):
    (tmp_path / "o.fa").write_bytes(fasta(of_class("other")))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(fasta(of_class("donor")))))
    assert described(read_source(Source(classes=("donor=-", f"other={tmp_path / 'o.fa'}")))) == twin


@pytest.fixture
def mixed(tmp_path) -> Path:
    """All records in one file, the class in the header."""
    records = [(f"{name} length={len(s)} class={label};", s) for name, s, label in RECORDS]
    path = tmp_path / "mixed.fa"
    path.write_bytes(fasta(records))
    return path


def test_header_pattern(twin, mixed):
    for pattern in (r"class=(\w+)", r"^(?P<name>\w+) .* class=(?P<label>\w+);"):
        assert described(read_source(Source(fasta=(str(mixed),), label_pattern=pattern))) == twin
    parts = read_source(Source(fasta=(str(mixed),), label_pattern=r"^(\w+?)(?P<split>)\d"))
    assert set(parts.split) == {"train"}
    for pattern, message in [
        (r"class=(\w{9})", "record 'donor0': no class in the header"),
        ("class=", "has no group"),
        ("class=(", "no regular expression"),
    ]:
        with pytest.raises(InputError, match=message):
            read_source(Source(fasta=(str(mixed),), label_pattern=pattern))


@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
def test_tables(delimiter, twin, mixed, tmp_path):
    labels, sequences = tmp_path / "labels.csv", tmp_path / "sequences.csv"
    rows = [("id", "label"), *((name, label) for name, _, label in reversed(RECORDS))]
    labels.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    assert described(read_source(Source(fasta=(str(mixed),), labels=labels))) == twin
    rows = [("Label", "Sequence", "ID"), *((label, sequence, name) for name, sequence, label in RECORDS)]
    sequences.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    assert described(read_source(Source(table=sequences))) == twin


def test_table_with_parts(tmp_path):
    table = tmp_path / "t.tsv"
    rows = [f"{s}\t{label}\t{('train', 'val', 'test')[i % 3]}" for i, (_, s, label) in enumerate(RECORDS)]
    table.write_text("\n".join(["sequence\tlabel\tsplit", *rows]))
    data = divide(read_source(Source(table=table)), Dividing(), 0)
    assert data.split.tolist() == ["train", "valid", "test"] * 4


@pytest.fixture
def genome(tmp_path) -> tuple[Path, list[tuple[str, int, int, str, str]]]:
    """Two chromosomes that hold the records, some on the minus strand; and where: name, start, end, strand, class."""
    chromosomes, places = {"chr1": "ACGTTN", "chr2": ""}, []
    for i, (_, sequence, label) in enumerate(RECORDS):
        name, strand = ("chr1", "chr2")[i % 2], "+-"[i % 3 == 1]
        start = len(chromosomes[name])
        chromosomes[name] += sequence if strand == "+" else str(Seq(sequence).reverse_complement())
        places.append((name, start, len(chromosomes[name]), strand, label))
    path = tmp_path / "genome.fa.gz"
    bgzipped(path, fasta(chromosomes.items(), 50))
    return path, places


def without_names(described: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    return sorted((sequence, label) for _, sequence, label in described)


def test_genome_regions(twin, genome, tmp_path):
    path, places = genome
    bed, gff = tmp_path / "r.bed", tmp_path / "r.gff3"
    bed.write_text("".join(f"{c}\t{a}\t{b}\t{label}\t0\t{s}\n" for c, a, b, s, label in places))
    features = [f"{c[3:]}\tx\t{label}\t{a + 1}\t{b}\t.\t{s}\t.\tID=1\n" for c, a, b, s, label in places]
    gff.write_text("##gff-version 3\n" + "".join(features) + "1\tx\tintron\t1\t2\t.\t+\t.\t.\n")
    named = tmp_path / "named.bed"
    rows = [f"{label}\t{s}\t{a}\t{c[3:]}\t{b}\ttrain\n" for c, a, b, s, label in places]
    named.write_text("#label\tstrand\tstart\tchrom\tend\tsplit\n" + "".join(rows))
    for source in (
        Source(regions=(bed,), genome=(str(path),)),
        Source(regions=(gff,), genome=(str(path),), features=("donor", "other")),
        Source(regions=(named,), genome=(str(path),)),
    ):
        assert without_names(described(read_source(source))) == without_names(twin)
    data = read_source(Source(regions=(bed,), genome=(str(path),)))
    c, a, b, s, _ = places[0]
    assert data.names[0] == f"{c}:{a}-{b}({s})"
    assert {chromosome_of(name) for name in data.names} == {"chr1", "chr2"}


def test_a_stretch_that_stands_twice_and_a_chromosome_of_two_names(genome, tmp_path):
    path, places = genome
    (c, a, b, s, _), other = places[0], tmp_path / "other.bed"
    (tmp_path / "r.bed").write_text(f"{c}\t{a}\t{b}\tx\t0\t{s}\n{c}\t{a}\t{b}\ty\t0\t{s}\n")
    other.write_text(f"{c[3:]}\t{a}\t{b}\tx\t0\t{s}\n")
    data = read_source(Source(regions=(tmp_path / "r.bed", other), genome=(str(path),)))
    assert data.names == [f"{c}:{a}-{b}({s}){end}" for end in ("", "#2", "#3")]
    data.write_splits_tsv(tmp_path / "splits.tsv")
    assert divide(data, Dividing(splits=tmp_path / "splits.tsv"), 0).split.tolist() == ["train"] * 3


def test_genomic_benchmarks_folder(twin, genome, tmp_path):
    path, places = genome
    folder = tmp_path / "benchmark"
    for i, (c, a, b, s, label) in enumerate(places):
        file = folder / ("train", "test")[i % 3 == 0] / f"{label}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        with file.open("a") as out:
            out.write(("id,region,start,end,strand\n" if new else "") + f"{i},{c},{a},{b},{s}\n")
    data = read_source(Source(data=folder, genome=(str(path),)))
    assert without_names(described(data)) == without_names(twin)
    assert sorted(set(data.split)) == ["test", "train"]
    assert (data.split == "test").sum() == 4


def test_hard_mask_reads_lower_case_as_n(genome, tmp_path):
    path, places = genome
    bed, table, plain = tmp_path / "r.bed", tmp_path / "t.tsv", tmp_path / "p.fa"
    bed.write_text("".join(f"{c}\t{a}\t{b}\t{label}\t0\t{s}\n" for c, a, b, s, label in places))
    table.write_text("sequence\tlabel\n" + "".join(f"{s}\t{label}\n" for _, s, label in RECORDS))
    plain.write_bytes(fasta(RECORDS))
    expected = sorted("".join(b if b.isupper() else "N" for b in sequence) for _, sequence, _ in RECORDS)
    for source in (
        Source(regions=(bed,), genome=(str(path),)),
        Source(table=table),
        Source(fasta=(str(plain),), label_pattern=r"(\D+)"),
        Source(classes=(f"x={plain}",)),
    ):
        assert sorted(map(decode, read_source(source, hard_mask=True).tokens)) == expected


def test_one_way_only(mixed, tmp_path):
    for source, message in [
        (Source(), "one of these ways: --example, --data, --class, --fasta, --table, --regions; got none"),
        (Source(example="splice", data=tmp_path), "got --example and --data together"),
        (Source(example="splice", labels=mixed), "--labels says nothing about --example"),
        (Source(table=mixed, genome=("g",)), "--genome says nothing about --table"),
        (Source(fasta=("x",), labels=mixed, label_pattern="(x)"), "both say the class"),
        (Source(regions=(mixed,)), "--regions needs --genome"),
        (Source(example="splices"), "no example 'splices'; there is splice"),
        (Source(classes=("=x",)), "expected NAME=FASTA"),
    ]:
        with pytest.raises(InputError, match=message):
            read_source(source)


# Other targets than one class


def rows(*labels: str) -> list[LabelledRow]:
    return [LabelledRow(f"r{i}", np.array([7, 8, 9]), label, "", "t.tsv") for i, label in enumerate(labels)]


def test_multilabel():
    data = labelled(rows("b;a", ".", "b", "c; b"), "multilabel")
    assert data.classes == ("a", "b", "c")
    assert data.labels.tolist() == [[True, True, False], [False] * 3, [False, True, False], [False, True, True]]
    assert data.label_texts() == ["a;b", ".", "b", "b;c"]
    wider = data.with_classes(("c", "x", "b", "a"))
    assert wider.label_texts() == ["b;a", ".", "b", "c;b"]


def test_parts_for_all_or_none():
    some = rows("a", "b")
    with pytest.raises(InputError, match="only some records have a part"):
        labelled([some[0], some[1]._replace(split="test")])


def test_labels_of_class_files(mixed):
    data = read_source(Source(classes=(f"b;a={mixed}",)), "multilabel")
    assert data.classes == ("a", "b")
    assert data.labels.all()
    assert set(read_source(Source(classes=(f"0.5={mixed}",)), "regression").labels) == {0.5}


def test_regression():
    data = labelled(rows("1.5", "-2e3", "0"), "regression")
    assert data.labels.tolist() == [1.5, -2000.0, 0.0]
    for bad in ("high", "nan", "inf", ""):
        with pytest.raises(InputError, match=r"t\.tsv, record 'r1': label .* is no finite number"):
            labelled(rows("1", bad), "regression")


@pytest.mark.parametrize(
    ("name", "chromosome"),
    [
        ("chr1:100-200(+)", "chr1"),
        ("Umaydis:chr01:5-9(.)", "Umaydis:chr01"),
        ("chr1:24100328+", "chr1"),
        ("scaffold_7", "scaffold_7"),
        ("chr2:0-50:10-20", "chr2"),
        ("pos_1::chr1:10-90", "chr1"),
        ("gene7|chr1:10-90(-)", "chr1"),
        ("NC_003070.9:c500-40", "NC_003070.9"),
    ],
)
def test_chromosome_of(name, chromosome):
    assert chromosome_of(name) == chromosome
