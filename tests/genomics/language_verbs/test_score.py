"""`polymamba genomics score` and perplexity; what models of longer tokens do."""

import csv
import gzip
import json
import math

import numpy as np
import pytest
import torch

from polymamba.genomics.alphabet import BOS, MASK, TOKEN_NAMES, A, T, tokenize
from polymamba.genomics.caduceus import Caduceus
from polymamba.genomics.evaluation import STRIDE
from polymamba.genomics.language_model import DNALanguageModel

CPU = ("--device", "cpu")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def bits_along(log_p, model, text: str) -> np.ndarray:
    tokens = tokenize(text).tolist()
    found = log_p(model, [BOS, *tokens])
    return np.array([-found[i, t] / math.log(2) if A <= t <= T else math.nan for i, t in enumerate(tokens)])


@pytest.mark.parametrize("chunk", [50, 1000])
def test_score_is_that_of_one_shot(chunk, run, genome, sequences, tmp_path, capsys, log_p, genomics):
    model = DNALanguageModel.from_pretrained(run)
    genomics("score", run, genome, "--chunk", chunk, "--track", tmp_path / "t.bedgraph", *CPU)
    rows = table(capsys.readouterr().out)
    truth = {name: bits_along(log_p, model, text) for name, text in sequences.items()}
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


def test_a_binned_track_of_packed_records(run, sequences, tmp_path, log_p, genomics):
    (tmp_path / "x.fa.gz").write_bytes(gzip.compress(f">chr1\n{sequences['chr1']}\n".encode()))
    words = ["score", run, tmp_path / "x.fa.gz", "-o", tmp_path / "s.tsv", "--track", tmp_path / "t.bedgraph", *CPU]
    genomics(*words, "--bin", 64, "--chunk", 100)
    bits = bits_along(log_p, DNALanguageModel.from_pretrained(run), sequences["chr1"])
    lines = [line.split("\t") for line in (tmp_path / "t.bedgraph").read_text().splitlines()[1:]]
    bins = [(at, bits[at : at + 64]) for at in range(0, len(bits), 64)]
    wanted = [(at, at + len(b), np.nanmean(b)) for at, b in bins if not np.isnan(b).all()]
    assert [(int(a), int(b)) for _, a, b, _ in lines] == [(a, b) for a, b, _ in wanted]
    assert [float(line[3]) for line in lines] == pytest.approx([mean for *_, mean in wanted], abs=1e-3)
    assert len(table((tmp_path / "s.tsv").read_text())) == 1


def test_score_by_a_masked_model(masked_run, genome, sequences, capsys, log_p, genomics):
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


def test_how_far_windows_are_from_one_shot(masked_run, genome, capsys, genomics):
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
def test_longer_tokens(words, objective, genome, sequences, tmp_path, capsys, error, flags, genomics):
    output, few = tmp_path / "run", ["--no-baselines", "--epochs", 1, "--objective", objective]
    genomics("pretrain", *flags, *few, "--tokenizer", *words, "-o", output)
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


# Context


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_perplexity_against_context(
    kind, run, masked_run, genome, sequences, tmp_path, capsys, log_p, genomics, in_full
):
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
        bits = [bits_along(log_p, model, text[at - context : at + 16])[context:].sum() for at in starts]
        assert float(row["bits_per_base"]) == pytest.approx(sum(bits) / 80, abs=1e-4)
        assert float(row["low"]) <= float(row["change"]) <= float(row["high"])


def test_refusals_of_perplexity(run, genome, tmp_path, error):
    words = ["perplexity", run, genome, "-o", tmp_path / "p", *CPU]
    assert "no stretch has 132096 bases; give shorter --contexts than 131072" in error(*words)
    assert "in rising order" in error(*words, "--contexts", 8, 4, code=2)
