"""VCF in and out: letter by letter, by pysam's reading of it, and every file that must be refused."""

import gzip

import pysam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.core.errors import InputError
from polymamba.genomics.reading.source import opened
from polymamba.genomics.reading.vcf import COLUMNS, VariantFile, header_with, index_if_sorted

HEADER = [
    "##fileformat=VCFv4.2",
    "##contig=<ID=1,length=100>",
    '##INFO=<ID=AF,Number=A,Type=Float,Description="of each allele">',
    '##FILTER=<ID=q10,Description="bad">',
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="genotype">',
    "\t".join([*COLUMNS, "FORMAT", "who"]),
]
BASES = st.text("ACGTN", min_size=1, max_size=4)
RECORDS = st.lists(
    st.tuples(
        st.sampled_from(["1", "chrX", "HLA-A*01:01"]),
        st.integers(0, 10**9),
        st.sampled_from([".", "rs1", "a;b"]),
        BASES,
        st.just(".") | st.lists(BASES | st.sampled_from(["<DEL>", "*", "G[1:7[", "<INS:ME>"]), min_size=1, max_size=3),
        st.sampled_from([".", "30", "30.00", "1e-3"]),
        st.sampled_from([".", "PASS", "q10", "q10;other"]),
        st.sampled_from([".", "AF=0.10", "DB", "FOO=1,2;DB;AF=."]),
    ),
    max_size=6,
)


def text_of(records, end: str = "\n") -> str:
    rows = [[*map(str, r[:4]), r[4] if r[4] == "." else ",".join(r[4]), *r[5:], "GT", "0/1"] for r in records]
    return end.join([*HEADER, *map("\t".join, rows)]) + end


def read(path) -> tuple[list[str], list]:
    with opened(path) as source:
        file = VariantFile(source)
        return file.header, list(file)


@settings(max_examples=60)
@given(RECORDS, st.sampled_from(["\n", "\r\n"]), st.sampled_from(["plain", "gzip", "bgzip"]))
def test_records_keep_every_letter(tmp_path_factory, records, end, packing):
    folder = tmp_path_factory.mktemp("vcf")
    path, text = folder / "x.vcf", text_of(records, end)
    path.write_bytes(gzip.compress(text.encode()) if packing == "gzip" else text.encode())
    if packing == "bgzip":
        pysam.tabix_compress(str(path), str(folder / "x.vcf.gz"))
        path = folder / "x.vcf.gz"
    header, found = read(path)
    assert header == HEADER
    assert [v.with_info([]) for v in found] == text_of(records).splitlines()[len(HEADER) :]
    for variant, (chromosome, position, _, reference, alternatives, _, _, info) in zip(found, records, strict=True):
        assert variant[1] == found.index(variant) + len(HEADER) + 1
        assert (variant.chromosome, variant.position, variant.reference) == (chromosome, position - 1, reference)
        assert variant.alternatives == ([] if alternatives == "." else alternatives)
        cells = variant.with_info(["X=1", "Y"]).split("\t")
        assert cells[7] == ("X=1;Y" if info == "." else f"{info};X=1;Y")
        assert cells[:7] + cells[8:] == variant.cells[:7] + variant.cells[8:]
        assert variant.info("DB") == ("" if "DB" in info else None)
        assert variant.info("AF") == {"AF=0.10": "0.10", "FOO=1,2;DB;AF=.": "."}.get(info)


def test_what_is_written_is_read_by_pysam(tmp_path):
    records = [("1", p, ".", "A", ["C", "<DEL>"], ".", "PASS", "AF=0.1,0.2") for p in (3, 9, 70)]
    (tmp_path / "x.vcf").write_text(text_of(records))
    header, found = read(tmp_path / "x.vcf")
    lines = header_with(header, ['##INFO=<ID=L,Number=A,Type=Float,Description="x">'])
    lines += [variant.with_info(["L=0.5,."]) for variant in found]
    (tmp_path / "y.vcf").write_text("\n".join(lines) + "\n")
    pysam.tabix_compress(str(tmp_path / "y.vcf"), str(tmp_path / "y.vcf.gz"))
    assert index_if_sorted(tmp_path / "y.vcf.gz", tmp_path / "y.vcf.gz")
    with pysam.VariantFile(str(tmp_path / "y.vcf.gz")) as file:
        (one,) = file.fetch("1", 5, 20)
        assert (one.pos, one.alts, one.info["L"], one.info["AF"][1]) == (
            9,
            ("C", "<DEL>"),
            (0.5, None),
            pytest.approx(0.2),
        )
    (tmp_path / "z.vcf").write_text("\n".join([*lines[:-3], lines[-1], lines[-2]]) + "\n")
    pysam.tabix_compress(str(tmp_path / "z.vcf"), str(tmp_path / "z.vcf.gz"))
    (tmp_path / "z.vcf.gz.tbi").write_bytes((tmp_path / "y.vcf.gz.tbi").read_bytes())  # of an earlier file
    assert not index_if_sorted(tmp_path / "z.vcf.gz", tmp_path / "z.vcf.gz")
    assert not (tmp_path / "z.vcf.gz.tbi").exists()


def test_bcf(tmp_path):
    records = [("1", p, "rs1", "AC", ["A"], "30", "q10", "AF=0.5") for p in (3, 9)]
    (tmp_path / "x.vcf").write_text(text_of(records))
    with (
        pysam.VariantFile(str(tmp_path / "x.vcf")) as file,
        pysam.VariantFile(str(tmp_path / "x.bcf"), "wb", header=file.header) as out,
    ):
        for record in file:
            out.write(record)
    header, found = read(tmp_path / "x.bcf")
    assert header[-1] == HEADER[-1]
    assert [v.with_info([]) for v in found] == text_of(records).splitlines()[len(HEADER) :]
    (tmp_path / "x.bcf").write_bytes((tmp_path / "x.bcf").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"x.bcf: "):
        read(tmp_path / "x.bcf")


GOOD = "1\t5\t.\tA\tC\t.\t.\t.\tGT\t0/1"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ": is empty; expected a VCF file"),
        ("hello\n", ": not a VCF file; expected ##fileformat=VCF... in its first line, found 'hello'"),
        (">x\nACGT\n", ": not a VCF file"),
        ("##fileformat=VCFv4.2\n" + GOOD + "\n", ", line 2: expected the line of columns, #CHROM POS"),
        ("##fileformat=VCFv4.2\n", ", line 1: expected the line of columns"),
        ("##fileformat=VCFv4.2\n#CHROM POS ID REF ALT QUAL FILTER INFO\n", ", line 2: expected the line of columns"),
        (GOOD.rsplit("\t", 1)[0], ", line 7: 9 columns, but 10 in the header; separate them by tabs"),
        (GOOD.replace("\t", " "), ", line 7: 1 columns, but 10 in the header"),
        (GOOD.replace("5", "five"), ", line 7: POS 'five' is no whole number, 0 or more"),
        (GOOD.replace("5", "-5"), ", line 7: POS '-5' is no whole number"),
        (GOOD.replace("A", "<A>"), ", line 7: REF '<A>' is not one or more bases"),
        (GOOD.replace("A", ""), ", line 7: REF is empty; write . for what is missing"),
        (GOOD.replace("C", "C,,G"), ", line 7: ALT 'C,,G' has an empty allele"),
        (GOOD.replace("1\t5", "\t5"), ", line 7: CHROM is empty"),
        (GOOD + "\0", ", line 7: a NUL byte"),
    ],
)
def test_malformed(tmp_path, text, wanted):
    path = tmp_path / "x.vcf"
    if text and text[0] not in "#h>":
        text = "\n".join([*HEADER, text]) + "\n"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}{wanted}")
    assert "\n" not in str(error.value)


def test_truncated(tmp_path):
    (tmp_path / "x.vcf.gz").write_bytes(gzip.compress(text_of([]).encode() * 50)[:-30])
    with pytest.raises(InputError, match="truncated"):
        read(tmp_path / "x.vcf.gz")
