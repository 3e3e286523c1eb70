"""`polymamba genomics variants` and mutagenesis."""

import csv
import json

import numpy as np
import pysam
import pytest

from polymamba.genomics.alphabet import BOS, A, T, tokenize
from polymamba.genomics.language_model import DNALanguageModel

CPU = ("--device", "cpu")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def vcf_of(sequences: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """A VCF with all that may be in one, and the reasons that are due."""
    one, two = sequences["chr1"], sequences["chr2"]
    other = {"A": "C", "C": "G", "G": "T", "T": "A"}
    rows = [
        (["1", "41", "rs1", one[40], other[one[40]]], [""]),  # another name
        (["chr1", "41", "rs2", one[40].lower(), other[one[40]].lower()], [""]),
        (["chr1", "50", ".", one[49:53], one[49]], [""]),  # a deletion
        (["chr1", "50", ".", one[49], one[49] + "GATTACA"], [""]),
        (["chr1", "60", ".", one[59], ",".join(b for b in "ACGT" if b != one[59])], ["", "", ""]),
        (
            ["chr1", "60", ".", one[59], f"{other[one[59]]},<DEL>,*,{one[59]}AC,N"],
            ["", "SYMBOLIC", "SYMBOLIC", "", "AMBIGUOUS"],
        ),
        (["chr1", "61", ".", other[one[60]], one[60]], ["REF_MISMATCH"]),
        (["chr1", "1050", ".", "N", "A"], ["AMBIGUOUS"]),
        (["chr1", "1050", ".", "A", "C"], ["N_CONTEXT"]),
        (["chr1", "995", ".", one[994], other[one[994]]], ["N_CONTEXT"]),  # a third of its window
        (["chr1", "990", ".", one[989], other[one[989]]], [""]),  # some of it
        (["chr1", "1", ".", one[0], other[one[0]]], [""]),
        (["chr2", "700", ".", two[699], other[two[699]]], [""]),
        (["chr2", "700", ".", two[699] + "A", two[699]], ["OUTSIDE"]),
        (["chr2", "0", ".", "A", "C"], ["OUTSIDE"]),
        (["chrUn", "5", ".", "A", "C"], ["NO_CONTIG"]),
        (["chr2", "9", ".", two[8:40], two[8]], ["TOO_LONG"]),
        (["chr2", "9", ".", two[8], two[8] + "A" * 40], ["TOO_LONG"]),
        (["chr2", "9", ".", two[8], two[8]], ["SAME"]),
        (["chr2", "9", ".", two[8], "."], []),
        (["chr2", "9", ".", two[8], f"{two[8]}[chr1:5["], ["SYMBOLIC"]),
    ]
    lines = ["\t".join([*cells, "30.0", "q10", f"OWN={i};DB", "GT", "0/1"]) for i, (cells, _) in enumerate(rows)]
    head = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\twho"]
    return [*head, *lines], [reasons for _, reasons in rows]


def split_record(line: str) -> tuple[str, dict[str, str]]:
    """A line without what was added, and that."""
    cells = line.split("\t")
    info = cells[7].split(";")
    added = dict(entry.split("=") for entry in info if entry.startswith("PM_"))
    cells[7] = ";".join(entry for entry in info if not entry.startswith("PM_"))
    return "\t".join(cells), added


@pytest.mark.parametrize("kind", ["causal", "masked"])
@pytest.mark.parametrize("packing", ["plain", "bgzip"])
def test_variants(kind, packing, run, masked_run, genome, sequences, tmp_path, capsys, genomics):
    lines, reasons = vcf_of(sequences)
    path = tmp_path / "x.vcf"
    path.write_text("\n".join(lines) + "\n")
    if packing == "bgzip":
        pysam.tabix_compress(str(path), str(tmp_path / "x.vcf.gz"))
        path = tmp_path / "x.vcf.gz"
    words = ["variants", run if kind == "causal" else masked_run, path, "--genome", genome, "--window", 32, *CPU]
    genomics(*words, "--max-n", 0.3)
    out, err = capsys.readouterr()
    found, due = out.splitlines(), [reason for row in reasons for reason in row]
    assert f"{len(reasons)} records, {due.count('')} of {len(due)} alleles scored" in err
    assert found[1].startswith("##INFO=<ID=PM_LLR,Number=A,Type=Float")
    records = [line for line in found if not line.startswith("##")]
    assert records[0] == lines[1]
    values = []
    for line, given, due in zip(records[1:], lines[2:], reasons, strict=True):
        bare, added = split_record(line)
        assert bare == given
        assert added.get("PM_WHY", ",".join("." * len(due))) == ",".join(reason or "." for reason in due)
        llrs = added.get("PM_LLR", ",".join("." * len(due))).split(",") if due else []
        assert [value == "." for value in llrs] == [bool(reason) for reason in due]
        values.append(llrs)
    assert values[0] == values[1], "neither a name nor lower case make a difference"
    assert len(set(values[4])) == 3
    assert values[5][0] in values[4]
    # pysam reads what was written.
    (tmp_path / "out.vcf").write_text(out)
    with pysam.VariantFile(str(tmp_path / "out.vcf")) as file:
        read = [list(record.info.get("PM_LLR", ())) for record in file]
    assert [len(x) for x in read] == [len(d) if not all(d) else 0 for d in reasons]


def test_variants_against_brute_force(run, genome, sequences, tmp_path, log_p, genomics):
    """The whole way, from the files' text, written out anew for each strand."""
    model = DNALanguageModel.from_pretrained(run)

    def likelihood(prefix: str, rest: str) -> float:
        tokens = [BOS, *tokenize(prefix + rest).tolist()]
        found = log_p(model, tokens)
        return sum(found[i, tokens[i + 1]] for i in range(len(prefix), len(tokens) - 1) if A <= tokens[i + 1] <= T)

    def turned(text: str) -> str:
        return text.upper().translate(str.maketrans("ACGT", "TGCA"))[::-1]

    text = sequences["chr2"]
    cases = [
        (100, text[100], "A" if text[100] != "A" else "C"),
        (200, text[200:203], text[200]),
        (300, text[300], text[300] + "GG"),
    ]
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    lines += [f"chr2\t{at + 1}\t.\t{ref}\t{alt}\t.\t.\t." for at, ref, alt in cases]
    (tmp_path / "x.vcf").write_text("\n".join(lines) + "\n")
    genomics("variants", run, tmp_path / "x.vcf", "--genome", genome, "--window", 32, "-o", tmp_path / "o.vcf.gz", *CPU)
    with pysam.VariantFile(str(tmp_path / "o.vcf.gz")) as file:
        found = [record.info["PM_LLR"][0] for record in file.fetch("chr2", 0, 700)]
    for value, (at, ref, alt) in zip(found, cases, strict=True):
        before, after = text[:at], text[at + len(ref) :]
        strands = []
        for left, right, one, other in (
            (before, after, ref, alt),
            *[(turned(after), turned(before), turned(ref), turned(alt))],
        ):
            strands.append(likelihood(left[-16:], (other + right)[:16]) - likelihood(left[-16:], (one + right)[:16]))
        assert value == pytest.approx(sum(strands) / 2, abs=1e-3)


@pytest.mark.parametrize("by", ["field", "table"])
def test_variants_against_labels(by, run, genome, sequences, tmp_path, capsys, genomics):
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng, text = np.random.default_rng(0), sequences["chr2"]
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    rows = ["chrom,pos,ref,alt,label"]
    for at in range(100, 160):
        alts = [b for b in "ACGT" if b != text[at]][:2]
        labels = rng.choice(["bad", "good", "."], 2, p=[0.4, 0.4, 0.2])
        info = "LABEL=" + ",".join(labels) if by == "field" else "."
        lines.append(f"2\t{at + 1}\t.\t{text[at]}\t{','.join(alts)}\t.\t.\t{info}")
        rows += [f"2,{at + 1},{text[at]},{alt},{label}" for alt, label in zip(alts, labels, strict=True)]
    (tmp_path / "x.vcf").write_text("\n".join(lines) + "\n")
    (tmp_path / "l.csv").write_text("\n".join(rows) + "\n")
    source = ["--label-field", "LABEL"] if by == "field" else ["--labels", tmp_path / "l.csv"]
    words = ["variants", run, tmp_path / "x.vcf", "--genome", genome, "-o", tmp_path / "o.vcf", *source, *CPU]
    genomics(*words, "--positive", "bad", "--metrics", tmp_path / "m.json")
    metrics = json.loads((tmp_path / "m.json").read_text())
    with pysam.VariantFile(str(tmp_path / "o.vcf")) as file:
        scores = {(r.pos, a): -x for r in file for a, x in zip(r.alts, r.info["PM_LLR"], strict=True)}
    pairs = [(row[4] == "bad", scores[int(row[1]), row[3]]) for row in csv.reader(rows[1:]) if row[4] != "."]
    truth, values = zip(*pairs, strict=True)
    assert metrics["n"] == len(pairs)
    assert metrics["auroc"]["value"] == pytest.approx(roc_auc_score(truth, values), abs=1e-6)
    assert metrics["auprc"]["value"] == pytest.approx(average_precision_score(truth, values), abs=1e-6)
    assert metrics["auroc"]["low"] < metrics["auroc"]["value"] < metrics["auroc"]["high"]
    assert f"AUROC of -LLR: {metrics['auroc']['value']:.4f}" in capsys.readouterr().err


def test_an_equivariant_model_says_the_same_of_either_strand(
    genome, sequences, tmp_path, capsys, error, flags, genomics
):
    run = tmp_path / "run"
    genomics("pretrain", *flags, "--no-baselines", "--epochs", 1, "--objective", "masked", "--rcps", "-o", run)
    assert json.loads((run / "config.json").read_text())["rcps"]
    text = sequences["chr2"]
    rows = [f"chr2\t{at + 1}\t.\t{text[at]}\t{'C' if text[at] != 'C' else 'G'}\t.\t.\t." for at in range(200, 230)]
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO", *rows]
    (tmp_path / "x.vcf").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    found = []
    for strands in ("--both-strands", "--no-both-strands"):  # 33 bases: as many on either side
        genomics("variants", run, tmp_path / "x.vcf", "--genome", genome, "--window", 33, strands, *CPU)
        lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != "#"]
        found.append([float(split_record(line)[1]["PM_LLR"]) for line in lines])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert np.std(found[0]) > 1e-3
    assert "rcps is of masked models" in error("pretrain", genome, "-o", tmp_path / "r", "--rcps", code=2)


def test_refusals_of_variants(run, genome, sequences, tmp_path, error):
    lines, _ = vcf_of(sequences)
    path = tmp_path / "x.vcf"
    path.write_text("\n".join(lines) + "\nchr1\t5\t.\tA\n")
    words = ["variants", run, path, "--genome", genome, *CPU]
    assert f"x.vcf, line {len(lines) + 1}: 4 columns, but 10 in the header" in error(*words, "-o", tmp_path / "o.vcf")
    path.write_text("\n".join([lines[0], '##INFO=<ID=PM_LLR,Number=1,Type=Float,Description="x">', *lines[1:]]) + "\n")
    assert "x.vcf: has PM_LLR already; give another --tag" in error(*words)
    assert "name it .vcf or .vcf.gz" in error(*words, "-o", tmp_path / "o.txt")
    assert "labels and label_field both say" in error(*words, "--labels", "x", "--label-field", "x", code=2)
    path.write_text("hello\n")
    assert "x.vcf: not a VCF file" in error(*words)


# Every change


def test_mutagenesis(run, genome, sequences, tmp_path, genomics, in_full):
    region = ["chr1:1-20", "--genome", genome, "--window", 16]
    genomics("mutagenesis", run, *region, "-o", tmp_path / "m", *CPU)
    rows = table((tmp_path / "m" / "effects.tsv").read_text())
    assert "".join(row["ref"] for row in rows) == sequences["chr1"][:20]
    assert [int(row["pos"]) for row in rows] == list(range(1, 21))
    assert all((row[base] == ".") == (base == row["ref"]) for row in rows for base in "ACGT")
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    for row in rows:
        alts = ",".join(base for base in "ACGT" if base != row["ref"])
        lines.append(f"chr1\t{row['pos']}\t.\t{row['ref']}\t{alts}\t.\t.\t.")
    (tmp_path / "x.vcf").write_text("\n".join(lines) + "\n")
    genomics("variants", run, tmp_path / "x.vcf", *region[1:], "-o", tmp_path / "o.vcf", *CPU)
    with pysam.VariantFile(str(tmp_path / "o.vcf")) as file:
        for record, row in zip(file, rows, strict=True):
            found = [float(row[base]) for base in record.alts]
            assert found == pytest.approx(record.info["PM_LLR"], rel=1e-3, abs=1e-4)
    track = [line.split("\t") for line in (tmp_path / "m" / "effects.bedgraph").read_text().splitlines()[1:]]
    means = [np.mean([float(row[b]) for b in "ACGT" if row[b] != "."]) for row in rows]
    assert [float(line[3]) for line in track] == pytest.approx(means, abs=1e-3)
    assert (tmp_path / "m" / "effects.png").stat().st_size > 10_000


def test_mutagenesis_where_nothing_is_known(run, genome, tmp_path, genomics):
    genomics("mutagenesis", run, "chr1:1,005-1,010", "--genome", genome, "--window", 16, "-o", tmp_path / "m", *CPU)
    rows = table((tmp_path / "m" / "effects.tsv").read_text())
    assert {row[base] for row in rows for base in "ACGT"} == {"."}
    assert len((tmp_path / "m" / "effects.bedgraph").read_text().splitlines()) == 1


def test_refusals_of_mutagenesis(run, genome, tmp_path, error):
    for region, wanted in (
        ("chr1", "write it CHROM:START-END, from 1, as in"),
        ("chr1:,-5", "write it CHROM:START-END, from 1, as in"),
        ("chr1:0-5", "not within 'chr1', which has 1500 bases"),
        ("chr1:9-5", "not within 'chr1'"),
        ("chr1:1-1501", "not within 'chr1'"),
        ("chr9:1-5", "chromosome 'chr9' is not in the genome"),
    ):
        assert wanted in error("mutagenesis", run, region, "--genome", genome, "-o", tmp_path / "m", *CPU)
