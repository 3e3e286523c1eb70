"""`polymamba genomics pretrain`, score, perplexity, generate, variants, mutagenesis: files in, files out."""

import csv
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pysam
import pytest
import torch

from polymamba.cli import main
from polymamba.genomics.alphabet import BOS, MASK, TOKEN_NAMES, A, T, tokenize
from polymamba.genomics.caduceus import Caduceus
from polymamba.genomics.evaluation import STRIDE
from polymamba.genomics.language_model import DNALanguageModel

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def sequences() -> dict[str, str]:
    """Of an order-2 process, which is soon learned."""
    rng = np.random.default_rng(3)
    likely = rng.dirichlet([0.3] * 4, 16).cumsum(1)
    found = {}
    for name, n in (("chr1", 1500), ("chr2", 700), ("chr3", 500)):
        letters = [0, 1]
        for u in rng.random(n - 2):
            letters.append(int(np.searchsorted(likely[4 * letters[-2] + letters[-1]], u * 0.999)))
        found[name] = "".join("ACGT"[i] for i in letters)
    found["chr1"] = found["chr1"][:1000] + "N" * 100 + found["chr1"][1100:1300] + found["chr1"][1300:].lower()
    return found


@pytest.fixture(scope="module")
def genome(sequences, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text("".join(f">{name} x\n{text}\n" for name, text in sequences.items()))
    return path


def flags(genome: Path) -> list[str]:
    training = ["--length", "32", "--batch-size", "16", "--epochs", "3", "--lr", "1e-2", "--save-every", "2"]
    return [str(genome), "--valid-chromosomes", "2", "--test-chromosomes", "3", *training, *CPU]


@pytest.fixture(scope="module")
def run(genome, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "causal"
    more = ["--first-length", "16", "--rc-augment", "--lower-case-weight", "0.5"]
    assert main(["genomics", "pretrain", *flags(genome), *more, "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def masked_run(genome, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "masked"
    assert main(["genomics", "pretrain", *flags(genome), "--objective", "masked", "-o", str(output)]) == 0
    return output


def genomics(*words: object) -> None:
    assert main(["genomics", *map(str, words)]) == 0


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def log_p(model, inputs: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([inputs]))[0].double().log_softmax(-1).numpy()


# Pretraining


def test_what_a_run_leaves(run, genome, sequences, capsys):
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "model.safetensors", "metrics.json", "log.jsonl", "curves.png", "splits.bed"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bases"] == 500
    assert len(metrics["order_bits_per_base"]) == 12
    assert metrics["perplexity"] == pytest.approx(2 ** metrics["bits_per_base"])
    assert metrics["bits_per_base"] < 2.2
    rows = table((run / "splits.bed").read_text())
    assert [(r["#chrom"], int(r["end"]), r["split"]) for r in rows] == [
        (name, len(text), part)
        for (name, text), part in zip(sequences.items(), ("train", "valid", "test"), strict=True)
    ]
    config = json.loads((run / "config.json").read_text())
    assert (config["objective"], config["window"]) == ("next", 32)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["valid_bits_per_base"] for r in log if "valid_bits_per_base" in r][-1] < 2.2


def test_test_figure_against_a_plain_loop(run, sequences):
    model, text = DNALanguageModel.from_pretrained(run), sequences["chr3"]
    bits = 0.0
    for at in range(0, len(text), 32):
        tokens = tokenize(text[at : at + 32]).tolist()
        found = log_p(model, [BOS, *tokens])
        bits -= sum(found[i, token] for i, token in enumerate(tokens)) / math.log(2)
    assert json.loads((run / "metrics.json").read_text())["bits_per_base"] == pytest.approx(bits / len(text), rel=1e-4)


def test_what_is_said(genome, tmp_path, capsys):
    genomics("pretrain", *flags(genome), "--no-baselines", "--max-n", "0.9", "--epochs", "1", "-o", tmp_path / "run")
    out, err = capsys.readouterr()
    assert "windows left out, more than 90% of their bases being N: 2 of 47 train, 0 of 22 valid, 0 of 16 test" in err
    assert "512 bases a step" in err
    assert out.split()[::2] == ["bits_per_base", "perplexity", "bases"]


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_a_resumed_run_ends_with_the_same_bits(objective, genome, run, masked_run, tmp_path, monkeypatch):
    from polymamba.core.train import _Trainer

    more = ["--objective", objective, "--no-baselines", "--rc-augment"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    genomics("pretrain", *flags(genome), *more, "-o", whole)
    step, count = _Trainer.step, [0]

    def killed(self, *args):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "step", killed)
        assert main(["genomics", "pretrain", *flags(genome), *more, "-o", str(stopped)]) == 1
    assert not (stopped / "metrics.json").exists()
    genomics("pretrain", *flags(genome), *more, "-o", stopped, "--resume")
    for name in ("model.safetensors", "metrics.json", "splits.bed"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


def test_refusals_of_pretraining(genome, tmp_path, error):
    assert "first_length is 10; doubled some times" in error(
        "pretrain", genome, "-o", tmp_path / "r", "--first-length", 10, "--length", 32, code=2
    )
    assert "5 doublings to 32 take 6 epochs, but there are 3" in error(
        "pretrain", genome, "-o", tmp_path / "r", "--first-length", 1, "--length", 32, "--epochs", 3, code=2
    )
    (tmp_path / "n.fa").write_text(">a\n" + "N" * 90 + "\n>b\nACGT\n>c\nACGT\n")
    words = [tmp_path / "n.fa", "-o", tmp_path / "r", "--valid-chromosomes", "b", "--test-fraction", 0, *CPU]
    (tmp_path / "x.bed").write_text("#chrom start end split\na 0 90 train\nb 0 4 valid\n")
    assert "no such file or folder" in error("pretrain", tmp_path / "no.fa", "-o", tmp_path / "r")
    main(["genomics", "pretrain", *map(str, words), "--regions", str(tmp_path / "x.bed")])


# Scoring


def bits_along(model, text: str) -> np.ndarray:
    tokens = tokenize(text).tolist()
    found = log_p(model, [BOS, *tokens])
    return np.array([-found[i, t] / math.log(2) if A <= t <= T else math.nan for i, t in enumerate(tokens)])


@pytest.mark.parametrize("chunk", [50, 1000])
def test_score_is_that_of_one_shot(chunk, run, genome, sequences, tmp_path, capsys):
    model = DNALanguageModel.from_pretrained(run)
    genomics("score", run, genome, "--chunk", chunk, "--track", tmp_path / "t.bedgraph", *CPU)
    rows = table(capsys.readouterr().out)
    truth = {name: bits_along(model, text) for name, text in sequences.items()}
    assert [row["id"] for row in rows] == list(sequences)
    for row in rows:
        bits = truth[row["id"]]
        assert int(row["bases"]) == len(bits)
        assert int(row["scored"]) == np.sum(~np.isnan(bits))
        assert float(row["log_likelihood"]) == pytest.approx(-np.nansum(bits) * math.log(2), rel=1e-4)
        assert float(row["bits_per_base"]) == pytest.approx(np.nanmean(bits), abs=1e-4)
    first, *lines = (tmp_path / "t.bedgraph").read_text().splitlines()
    assert first == 'track type=bedGraph name="bits per base"'
    found = {name: np.full(len(text), math.nan) for name, text in sequences.items()}
    for line in lines:
        name, start, end, value = line.split("\t")
        assert int(end) == int(start) + 1
        found[name][int(start)] = float(value)
    for name, bits in truth.items():
        np.testing.assert_allclose(found[name], bits, atol=2e-3)


def test_a_binned_track_of_packed_records(run, sequences, tmp_path):
    (tmp_path / "x.fa.gz").write_bytes(gzip.compress(f">chr1\n{sequences['chr1']}\n".encode()))
    words = ["score", run, tmp_path / "x.fa.gz", "-o", tmp_path / "s.tsv", "--track", tmp_path / "t.bedgraph", *CPU]
    genomics(*words, "--bin", 64, "--chunk", 100)
    bits = bits_along(DNALanguageModel.from_pretrained(run), sequences["chr1"])
    lines = [line.split("\t") for line in (tmp_path / "t.bedgraph").read_text().splitlines()[1:]]
    bins = [(at, bits[at : at + 64]) for at in range(0, len(bits), 64)]
    wanted = [(at, at + len(b), np.nanmean(b)) for at, b in bins if not np.isnan(b).all()]
    assert [(int(a), int(b)) for _, a, b, _ in lines] == [(a, b) for a, b, _ in wanted]
    assert [float(line[3]) for line in lines] == pytest.approx([mean for *_, mean in wanted], abs=1e-3)
    assert len(table((tmp_path / "s.tsv").read_text())) == 1


def test_score_by_a_masked_model(masked_run, genome, sequences, capsys):
    genomics("score", masked_run, genome, "--window", 1500, "--overlap", 0, *CPU)
    model = Caduceus.from_pretrained(masked_run)
    rows = table(capsys.readouterr().out)
    for row, text in zip(rows, sequences.values(), strict=True):
        tokens = tokenize(text)
        bits = np.zeros(len(tokens))
        known = (tokens >= A) & (tokens <= T)
        for k in range(STRIDE):
            hidden = (np.arange(len(tokens)) % STRIDE == k) & known
            found = log_p(model, np.where(hidden, MASK, tokens).tolist())
            bits[hidden] = -found[hidden, tokens[hidden]] / math.log(2)
        assert float(row["bits_per_base"]) == pytest.approx(bits.sum() / known.sum(), abs=1e-3)


def test_how_far_windows_are_from_one_shot(masked_run, genome, capsys):
    differences = []
    for overlap in (0, 24):
        genomics("score", masked_run, genome, "--window", 32, "--overlap", overlap, "--one-shot", *CPU)
        out, err = capsys.readouterr()
        assert f"windows of 32 bases, overlapping by {overlap}" in err
        differences.append([float(row["mean_difference"]) for row in table(out)])
    assert all(0 < more < less for less, more in zip(*differences, strict=True))


def test_refusals_of_scoring(run, masked_run, genome, tmp_path, error):
    assert error("score", tmp_path / "no", genome) == f"error: {tmp_path / 'no'}: no such run folder"
    assert "--window is of masked models" in error("score", run, genome, "--window", 9, *CPU)
    assert "--overlap 32: must be at least 0 and less than the window" in error(
        "score", masked_run, genome, "--overlap", 32, *CPU
    )
    (tmp_path / "x.fa").write_text(">chr1\nACGJ\n")
    assert "record 'chr1': 'J' at position 4 is no DNA letter" in error(
        "score", run, tmp_path / "x.fa", "-o", tmp_path / "s.tsv", *CPU
    )
    (tmp_path / "x.fa").write_text(">chr1\nACG\n")
    assert "both hold a record 'chr1'" in error(
        "score", run, tmp_path / "x.fa", genome, "--track", tmp_path / "t", *CPU
    )
    (tmp_path / "x.fa.fai").write_text("chr1\t3\n")
    assert "x.fa.fai, line 1: not a line of a FASTA index" in error("score", run, tmp_path / "x.fa", *CPU)


# Both strands by the same weights


def test_an_equivariant_model_says_the_same_of_either_strand(genome, sequences, tmp_path, capsys, error):
    run = tmp_path / "run"
    genomics("pretrain", *flags(genome), "--no-baselines", "--epochs", 1, "--objective", "masked", "--rcps", "-o", run)
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


def test_n_is_read_as_an_official_model_learned_it(tmp_path):
    """There padding stood for it."""
    from polymamba.core.config import ComputeConfig
    from polymamba.genomics.config import CaduceusConfig, language_model_config
    from polymamba.genomics.verbs.language import load_language_model

    backbone = language_model_config("tiny", "masked", 32).backbone
    Caduceus(CaduceusConfig(backbone=backbone, n_token="[PAD]")).save_pretrained(tmp_path)
    weight = load_language_model(tmp_path, ComputeConfig(device="cpu")).embedding.weight
    n, pad, a = (TOKEN_NAMES.index(name) for name in ("N", "[PAD]", "A"))
    assert torch.equal(weight[n], weight[pad])
    assert not torch.equal(weight[n], weight[a])


# Longer tokens


@pytest.mark.parametrize("words", [["kmer", "--k", "3"], ["bpe", "--vocab-size", "40"]])
@pytest.mark.parametrize("objective", ["next", "masked"])
def test_longer_tokens(words, objective, genome, sequences, tmp_path, capsys, error):
    output, few = tmp_path / "run", ["--no-baselines", "--epochs", 1, "--objective", objective]
    genomics("pretrain", *flags(genome), *few, "--tokenizer", *words, "-o", output)
    assert json.loads((output / "config.json").read_text())["tokenizer"] == words[0]
    assert (output / "tokenizer.json").exists() == (words[0] == "bpe")
    capsys.readouterr()
    genomics("score", output, genome, "--track", tmp_path / "t.bedgraph", *CPU)
    rows = table(capsys.readouterr().out)
    assert [int(row["scored"]) for row in rows] == [len(text) - text.count("N") for text in sequences.values()]
    track = [line.split("\t") for line in (tmp_path / "t.bedgraph").read_text().splitlines()[1:]]
    for row in rows:
        bits = [float(value) for name, _, _, value in track if name == row["id"]]
        assert np.mean(bits) == pytest.approx(float(row["bits_per_base"]), abs=1e-3)
    if objective == "next":
        genomics("generate", output, "--prompt", "ACGTNACG", "--length", 50, *CPU)
        written = "".join(capsys.readouterr().out.splitlines()[1:])
        assert written.startswith("ACGTNACG")
        assert len(written) == 58
        assert set(written[8:]) <= set("ACGT")
    vcf = genome.parent / "none.vcf"
    assert "variants are scored by models of --tokenizer char" in error(
        "variants", output, vcf, "--genome", genome, *CPU
    )


def test_refusals_of_tokens(genome, tmp_path, error):
    words = ["pretrain", genome, "-o", tmp_path / "r"]
    assert "k is 1; of tokenizer kmer it is 2 to 8" in error(*words, "--tokenizer", "kmer", code=2)
    assert "k is 3; of tokenizer kmer" in error(*words, "--k", 3, code=2)
    assert "vocab_size is 3; it must be at least 20" in error(*words, "--tokenizer", "bpe", "--vocab-size", 3, code=2)


# Context


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_perplexity_against_context(kind, run, masked_run, genome, sequences, tmp_path, capsys):
    model_run = run if kind == "causal" else masked_run
    words = [
        "--contexts",
        4,
        8,
        40,
        "--target",
        16,
        "--stretches",
        5,
        "--regions",
        run / "splits.bed",
        "--part",
        "test",
    ]
    genomics("perplexity", model_run, genome, "-o", tmp_path / "p", *words, *CPU)
    rows = table((tmp_path / "p" / "perplexity.tsv").read_text())
    assert table(capsys.readouterr().out) == rows
    assert (tmp_path / "p" / "perplexity.png").stat().st_size > 10_000
    assert [row["context"] for row in rows] == ["4", "8", "40"]
    assert {(row["bases"], row["stretches"]) for row in rows} == {("80", "5")}
    assert rows[0]["change"] == "0.00000"
    if kind == "masked":
        return
    model, text = DNALanguageModel.from_pretrained(run), sequences["chr3"]
    starts = list(range(40, 500 - 16 + 1, 16))
    starts = [starts[i] for i in np.linspace(0, len(starts) - 1, 5).round().astype(int)]
    for row in rows:
        context = int(row["context"])
        bits = [bits_along(model, text[at - context : at + 16])[context:].sum() for at in starts]
        assert float(row["bits_per_base"]) == pytest.approx(sum(bits) / 80, abs=1e-4)
        assert float(row["low"]) <= float(row["change"]) <= float(row["high"])


def test_refusals_of_perplexity(run, genome, tmp_path, error):
    words = ["perplexity", run, genome, "-o", tmp_path / "p", *CPU]
    assert "no stretch has 132096 bases; give shorter --contexts than 131072" in error(*words)
    assert "in rising order" in error(*words, "--contexts", 8, 4, code=2)


# Writing


def test_generate(run, tmp_path, capsys):
    genomics("generate", run, "--prompt", "ACGTN", "--length", 70, "--number", 3, "--seed", 5, *CPU)
    text = capsys.readouterr().out
    records = dict(line.split("\n", 1) for line in text.split(">")[1:])
    assert list(records) == [f"generated_{i} 70 bases after 5" for i in (1, 2, 3)]
    written = [body.replace("\n", "") for body in records.values()]
    assert all(sequence[:5] == "ACGTN" and len(sequence) == 75 for sequence in written)
    assert set("".join(sequence[5:] for sequence in written)) == set("ACGT")
    assert len(set(written)) == 3
    (tmp_path / "p.fa").write_text(">one\nACGTN\n>two\nAC\n")
    genomics(
        "generate", run, "--prompts", tmp_path / "p.fa", "--length", 70, "--seed", 5, "-o", tmp_path / "o.fa", *CPU
    )
    again = (tmp_path / "o.fa").read_text().split(">")[1:]
    assert again[0].split("\n", 1)[1].replace("\n", "") == written[0], "the seed and the prompt decide"
    assert again[1].startswith("two_1 70 bases after 2\n")


def test_greedy_writing_is_what_the_model_finds_likeliest(run, capsys):
    genomics("generate", run, "--prompt", "ACG", "--length", 20, "--temperature", 0, *CPU)
    written = "".join(capsys.readouterr().out.splitlines()[1:])
    model = DNALanguageModel.from_pretrained(run)
    tokens = [BOS, *tokenize("ACG").tolist()]
    for _ in range(20):
        tokens.append(int(log_p(model, tokens)[-1, A : T + 1].argmax()) + A)
    assert written == "".join(TOKEN_NAMES[t] for t in tokens[1:])


def test_a_masked_model_does_not_write(masked_run, error):
    assert "a masked model, which sees both ways; generate needs" in error("generate", masked_run, *CPU)
    assert "--prompt: 'J' at position 1 is no DNA letter" in error("generate", masked_run, "--prompt", "J", *CPU)


# Variants


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
def test_variants(kind, packing, run, masked_run, genome, sequences, tmp_path, capsys):
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


def test_variants_against_brute_force(run, genome, sequences, tmp_path, capsys):
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
def test_variants_against_labels(by, run, genome, sequences, tmp_path, capsys):
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


def test_mutagenesis(run, genome, sequences, tmp_path):
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


def test_mutagenesis_where_nothing_is_known(run, genome, tmp_path):
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


@pytest.mark.gpu
def test_a_gpu_pretrains_to_the_same_bits_by_graph(genome, tmp_path):
    for name, more in (("plain", []), ("graph", ["--cuda-graph"])):
        genomics("pretrain", *flags(genome)[:-1], "cuda", "--epochs", 4, *more, "-o", tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "graph")]
    assert weights[0] == weights[1]


def test_a_masked_model_is_not_recorded(genome, tmp_path, capsys):
    words = [*flags(genome), "--objective", "masked", "--cuda-graph", "-o", str(tmp_path / "run")]
    assert main(["genomics", "pretrain", *words]) == 1
    assert "--cuda-graph" in capsys.readouterr().err
