"""`polymamba genomics pretrain`."""

import csv
import json
import math

import pytest

from polymamba.cli import main
from polymamba.genomics.alphabet import BOS, tokenize
from polymamba.genomics.language_model import DNALanguageModel

CPU = ("--device", "cpu")


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def test_what_a_run_leaves(run, sequences):
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


def test_test_figure_against_a_plain_loop(run, sequences, log_p):
    model, text = DNALanguageModel.from_pretrained(run), sequences["chr3"]
    bits = 0.0
    for at in range(0, len(text), 32):
        tokens = tokenize(text[at : at + 32]).tolist()
        found = log_p(model, [BOS, *tokens])
        bits -= sum(found[i, token] for i, token in enumerate(tokens)) / math.log(2)
    assert json.loads((run / "metrics.json").read_text())["bits_per_base"] == pytest.approx(bits / len(text), rel=1e-4)


def test_what_is_said(flags, tmp_path, capsys, genomics):
    genomics("pretrain", *flags, "--no-baselines", "--max-n", "0.9", "--epochs", "1", "-o", tmp_path / "run")
    out, err = capsys.readouterr()
    assert "windows left out, more than 90% of their bases being N: 2 of 47 train, 0 of 22 valid, 0 of 16 test" in err
    assert "512 bases a step" in err
    assert out.split()[::2] == ["bits_per_base", "perplexity", "bases"]


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_a_resumed_run_ends_with_the_same_bits(objective, flags, tmp_path, at_step, genomics):
    more = ["--objective", objective, "--no-baselines", "--rc-augment"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    genomics("pretrain", *flags, *more, "-o", whole)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with at_step(6, interrupt):
        assert main(["genomics", "pretrain", *flags, *more, "-o", str(stopped)]) == 1
    assert not (stopped / "metrics.json").exists()
    genomics("pretrain", *flags, *more, "-o", stopped, "--resume")
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


def test_refusals_of_tokens(genome, tmp_path, error):
    words = ["pretrain", genome, "-o", tmp_path / "r"]
    assert "k is 1; of tokenizer kmer it is 2 to 8" in error(*words, "--tokenizer", "kmer", code=2)
    assert "k is 3; of tokenizer kmer" in error(*words, "--k", 3, code=2)
    assert "vocab_size is 3; it must be at least 20" in error(*words, "--tokenizer", "bpe", "--vocab-size", 3, code=2)


@pytest.mark.gpu
def test_a_gpu_pretrains_to_the_same_bits_by_graph(flags, tmp_path, genomics):
    for name, more in (("plain", []), ("graph", ["--cuda-graph"])):
        genomics("pretrain", *flags[:-1], "cuda", "--epochs", 4, *more, "-o", tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "graph")]
    assert weights[0] == weights[1]


def test_a_masked_model_is_not_recorded(flags, tmp_path, capsys):
    words = [*flags, "--objective", "masked", "--cuda-graph", "-o", str(tmp_path / "run")]
    assert main(["genomics", "pretrain", *words]) == 1
    assert "--cuda-graph" in capsys.readouterr().err
