"""`polymamba genomics train-bases`, eval-bases, predict-bases: files in, files out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from polymamba.cli import main
from polymamba.genomics import DNAAnnotator, tokenize

CPU = ("--device", "cpu")
LENGTHS = {"chr1": 6000, "chr2": 1500, "chr3": 1500}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A genome in which GGGTACCTGAG, on either strand, is a site; and a track of numbers."""
    at, rng = tmp_path_factory.mktemp("genome"), np.random.default_rng(0)
    records, sites, values = [], [], []
    for name, n in LENGTHS.items():
        letters = rng.choice(list("ACGT"), n)
        for place in range(20, n - 40, 60):
            start, strand = place + int(rng.integers(20)), "+-"[int(rng.integers(2))]
            letters[start : start + 11] = list("GGGTACCTGAG" if strand == "+" else "CTCAGGTACCC")
            sites.append(f"{name}\t{start}\t{start + 11}\tsite\t0\t{strand}")
            values.append(f"{name}\t{start}\t{start + 11}\t{5 if strand == '+' else -3}")
        letters[100:110] = "N"
        records.append(f">{name}\n{''.join(letters)}\n")
    (at / "g.fa").write_text("".join(records))
    (at / "sites.bed").write_text("\n".join([*sites, "chrX\t1\t2\tsite\t0\t+"]) + "\n")
    (at / "values.bedgraph").write_text("\n".join(values) + "\n")
    return at


def flags(folder: Path, *words: object) -> list[object]:
    parts = ["--valid-chromosomes", "2", "--test-chromosomes", "3", "--window", "128", "--batch-size", "8"]
    return [folder / "g.fa", *parts, "--lr", "3e-2", *CPU, *words]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory, genomics) -> Path:
    output = tmp_path_factory.mktemp("runs") / "sites"
    words = ["--labels", folder / "sites.bed", "--stranded", "--rc-augment", "--epochs", "16", "--balance", "loss"]
    genomics("train-bases", *flags(folder, *words), "-o", output)
    return output


def test_it_learns(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert json.loads((run / "labels.json").read_text()) == {"0": "none", "1": "site(+)", "2": "site(-)"}
    assert metrics["bases"] == LENGTHS["chr3"] - 10
    assert metrics["balanced_accuracy"]["value"] > 0.9
    assert (run / "confusion.tsv").is_file()


def test_eval_says_the_same(run, folder, tmp_path, genomics):
    genomics(
        "eval-bases", run, folder / "g.fa", "--labels", folder / "sites.bed", "--regions", run / "splits.bed",
        "--part", "test", "-o", tmp_path / "e", *CPU,
    )  # fmt: skip
    found, trained = (json.loads((at / "metrics.json").read_text()) for at in (tmp_path / "e", run))
    assert found["confusion"] == trained["confusion"]


def expected(run: Path, folder: Path) -> dict[str, np.ndarray]:
    """Probabilities (n, 2) of each record in one shot, nan at N."""
    model = DNAAnnotator.from_pretrained(run)
    found = {}
    for record in (folder / "g.fa").read_text().split(">")[1:]:
        name, text = record.split()
        with torch.no_grad():
            logits = model(torch.from_numpy(tokenize(text).astype(np.int64))[None])[0]
        p = logits.double().softmax(-1).numpy()[:, 1:]
        p[np.array(list(text)) == "N"] = np.nan
        found[name] = p
    return found


def test_tracks(run, folder, tmp_path, capsys, genomics):
    output = tmp_path / "p.bedgraph"
    genomics("predict-bases", run, folder / "g.fa", "-o", output, "--window", "8000", "--overlap", "0", *CPU)
    truth = expected(run, folder)
    found = {name: np.full((n, 2), np.nan) for name, n in LENGTHS.items()}
    k = -1
    for line in output.read_text().splitlines():
        if line.startswith("track"):
            k += 1
            assert line == f'track type=bedGraph name="site({"+-"[k]})"'
            continue
        name, start, end, value = line.split("\t")
        found[name][int(start) : int(end), k] = float(value)
    for name in LENGTHS:
        np.testing.assert_allclose(found[name], truth[name], atol=6e-5)
    capsys.readouterr()
    genomics("predict-bases", run, folder / "g.fa", "-o", tmp_path / "p.bed", "--one-shot", *CPU)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "windows of 128 bases, overlapping by 64; from one shot " in said
    rows = [line.split("\t") for line in (tmp_path / "p.bed").read_text().splitlines()]
    sites = {tuple(line.split("\t")) for line in (folder / "sites.bed").read_text().splitlines()}
    exact = {(name, start, end, label, "0", strand) for name, start, end, label, _, strand in rows} & sites
    assert len(exact) > 0.7 * len(sites)


def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path, at_step, genomics):
    words = ["--labels", folder / "sites.bed", "--target", "multilabel", "--rc-augment", "--steps-per-epoch", "3"]
    words = ["train-bases", *flags(folder, *words, "--epochs", "2", "--save-every", "2"), "-o"]
    genomics(*words, tmp_path / "whole")

    def interrupt() -> None:
        raise KeyboardInterrupt

    with at_step(4, interrupt):
        assert main(["genomics", *map(str, words), str(tmp_path / "stopped")]) == 1
    genomics(*words, tmp_path / "stopped", "--resume")
    for name in ("model.safetensors", "metrics.json", "splits.bed"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_values_by_a_causal_model(folder, tmp_path, genomics):
    fasta, bedgraph = folder / "g.fa", folder / "values.bedgraph"
    parts = ["--valid-chromosomes", "2", "--test-chromosomes", "3", *CPU]
    short = ["--length", "64", "--epochs", "1", "--steps-per-epoch", "2", "--no-baselines"]
    genomics("pretrain", fasta, *parts, *short, "-o", tmp_path / "lm")
    words = ["--labels", bedgraph, "--target", "regression", "--init", tmp_path / "lm", "--epochs", "2"]
    genomics("train-bases", *flags(folder, *words, "--dropout", "0.1"), "-o", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["backbone"]["dropout"] == 0.1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    spans = [line.split("\t") for line in bedgraph.read_text().splitlines() if line.startswith("chr3")]
    text = fasta.read_text().split("chr3\n")[1]
    assert metrics["bases"] == sum(11 - text[int(start) : int(end)].count("N") for _, start, end, _ in spans)
    assert metrics["rmse"]["value"] < 6
    tracks = []
    for size in (100, 100_000):
        genomics("predict-bases", tmp_path / "run", folder / "g.fa", "-o", tmp_path / f"{size}.bedgraph", *CPU,
                 "--max-tokens", size, "--bin", "10")  # fmt: skip
        tracks.append([line.split("\t") for line in (tmp_path / f"{size}.bedgraph").read_text().splitlines()[1:]])
    assert [row[:3] for row in tracks[0]] == [row[:3] for row in tracks[1]]
    a, b = (np.array([float(row[3]) for row in rows]) for rows in tracks)
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_errors(run, folder, error):
    bed, fasta = folder / "sites.bed", folder / "g.fa"
    predict = ["predict-bases", run, fasta, "-o"]
    assert "name it .bed or .bedgraph" in error(*predict, "x.tsv")
    assert "--bin says what the lines of a .bedgraph are" in error(*predict, "x.bed", "--bin", "5")
    assert "--overlap 128: must be at least 0 and less" in error(*predict, "x.bed", "--overlap", "128", *CPU)
    assert "config.json" in error("predict-bases", folder, fasta, "-o", "x.bed", *CPU)
    evaluate = ["eval-bases", run, fasta, "--labels", bed, "--part", "valid", "-o", "e", *CPU]
    assert "--part valid: nothing of the genome is of this part" in error(*evaluate)
