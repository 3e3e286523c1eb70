"""`polymamba bytes ...` as a user runs it: files in, files out, one clear line when something is wrong."""

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from polymamba.bytes import ByteLM
from polymamba.bytes.noise import TABLE, spoil
from polymamba.cli import main
from polymamba.core import BackboneConfig, InputError, LanguageModel, LanguageModelConfig

FAST = ["--epochs", "2", "--context", "64", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"{i} bottles of béer on the wall, " * (3 + i))
    return folder


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["bytes", "train", str(texts), "-o", str(output), *FAST]) == 0
    return output


def test_train_leaves_a_run_that_explains_itself(run):
    assert {p.name for p in run.iterdir()} >= {
        *("config.json", "model.safetensors", "splits.tsv", "metrics.json", "log.jsonl", "curves.png", "positions.png"),
        *("manifest.json", "corpus"),
    }
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["settings"]["preset"], len(manifest["inputs_sha256"])) == ("tiny", 12)
    rows = [line.split("\t") for line in (run / "splits.tsv").read_text().splitlines()[1:]]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["bytes"] == sum(int(row[3]) for row in rows if row[1] == "test")
    assert metrics["documents"] == len([row for row in rows if row[1] == "test"])
    assert 0 < metrics["bits_per_byte"] < 8
    assert sum(row["bytes"] for row in metrics["by_position"]) == metrics["bytes"]


def test_a_hybrid(texts, tmp_path, capsys):
    run, pattern = tmp_path / "run", ["mamba", "attention", "mlp"]
    words = ["bytes", "train", str(texts), "-o", str(run), *FAST, "--epochs", "1", "--pattern", *pattern]
    assert main(words) == 0
    assert json.loads((run / "config.json").read_text())["backbone"]["pattern"] == pattern
    assert json.loads((run / "manifest.json").read_text())["settings"]["pattern"] == pattern
    assert main([*words, "--resume"]) == 0
    assert main([*words[:-1], "--resume"]) == 1
    capsys.readouterr()
    assert main(["bytes", "generate", str(run), "--prompt", "7 bot", "--max-new-bytes", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out


def test_a_mixture_of_experts(texts, tmp_path, capsys):
    run, pattern = tmp_path / "run", ["mamba", "moe"]
    experts = ["--n-experts", "4", "--top-k", "2", "--d-expert", "16", "--balance-weight", "0.5"]
    words = ["bytes", "train", str(texts), "-o", str(run), *FAST, "--pattern", *pattern, *experts]
    assert main(words) == 0
    out, err = capsys.readouterr()
    total, active = re.search(r"model tiny: ([\d,]+) parameters, ([\d,]+) active for a byte;", err).groups()
    idle = 2 * 2 * (2 * 128 * 16)  # layers, experts that a byte does not reach, their weights
    assert int(total.replace(",", "")) - int(active.replace(",", "")) == idle
    assert "least_used_expert" in out
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [(r["train_loss"], r["aux_loss"]) for r in log if "train_loss" in r]
    assert losses
    assert all(0.95 <= aux / (2 * 0.5 * 2) < 4 for _, aux in losses), "of two layers, top_k each where balanced"
    settings = json.loads((run / "manifest.json").read_text())["settings"]
    assert settings["moe"]["n_experts"] == 4
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--resume", "--n-experts", "5"]) == 1
    assert "cannot resume: setting moe" in capsys.readouterr().err

    rows = [line.split("\t") for line in (run / "splits.tsv").read_text().splitlines()[1:]]
    files = [row[0] for row in rows if row[1] == "test"]
    assert main(["bytes", "eval", str(run), *files, "-o", str(tmp_path / "e"), "--chunk", "50", "--device", "cpu"]) == 0
    summaries = json.loads((tmp_path / "e" / "metrics.json").read_text())["routing"]
    assert [summary["layer"] for summary in summaries] == [1, 3]
    n_read = sum(len(Path(file).read_bytes()) + 1 for file in files)  # a document's mark is routed, too
    by_expert = [line.split("\t") for line in (tmp_path / "e" / "routing.tsv").read_text().splitlines()]
    assert sum(int(row[2]) for row in by_expert[1:]) == 2 * 2 * n_read
    by_byte = [line.split("\t") for line in (tmp_path / "e" / "routing_bytes.tsv").read_text().splitlines()]
    wanted = b"".join(Path(file).read_bytes() for file in files).count(b"b")
    assert [int(row[3]) for row in by_byte[1:] if row[2] == "b"] == [2 * wanted] * 2
    assert (tmp_path / "e" / "routing.png").stat().st_size > 1000
    assert main(["bytes", "generate", str(run), "--prompt", "7 bot", "--max-new-bytes", "5", "--device", "cpu"]) == 0


def test_no_routing_without_experts(run):
    assert not list(run.glob("routing*"))
    assert "routing" not in json.loads((run / "metrics.json").read_text())


def test_eval_of_the_test_part_is_what_train_said(run, tmp_path, capsys):
    rows = [line.split("\t") for line in (run / "splits.tsv").read_text().splitlines()[1:]]
    files = [row[0] for row in rows if row[1] == "test"]
    assert main(["bytes", "eval", str(run), *files, "-o", str(tmp_path / "e"), "--chunk", "7", "--device", "cpu"]) == 0
    assert "xz_bits_per_byte" in capsys.readouterr().out
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "e", run))
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)
    assert {k: v for k, v in ours.items() if "per" not in k and k != "by_position"} == {
        k: v for k, v in theirs.items() if "per" not in k and k != "by_position"
    }
    assert (tmp_path / "e" / "positions.png").stat().st_size > 1000


def test_noise_prints_what_it_writes(run, texts, tmp_path, capsys):
    words = ["bytes", "noise", str(run), str(texts / "3.txt"), "--device", "cpu"]
    assert main([*words, "-o", str(tmp_path / "n.tsv")]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "n.tsv").read_text()
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows[:3]] == ["noise", "none", "drop"]
    assert len(rows) == 12
    assert rows[1][2] == str((texts / "3.txt").stat().st_size)
    assert all(float(row[3]) > 0 for row in rows[1:])
    assert main(words) == 0
    assert capsys.readouterr().out == out  # the same seed


def test_noise_of_one_word_and_of_one_character(run, tmp_path, capsys):
    (tmp_path / "word").write_bytes(bytes(range(128, 256)) * 4)
    assert main(["bytes", "noise", str(run), str(tmp_path / "word"), "--device", "cpu"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[1][4:] == ["-", "0"]
    assert all(row[4:] == ["-", "-"] for row in rows[2:])
    (tmp_path / "character").write_bytes(b"a")
    seed = next(seed for seed in itertools.count() if not spoil(b"a", TABLE[1], seed))
    assert main(["bytes", "noise", str(run), str(tmp_path / "character"), "--device", "cpu", "--seed", str(seed)]) == 1
    assert f"{TABLE[1]}: nothing is left of 1 bytes; give longer files" in capsys.readouterr().err


def generated(capfdbinary, *words: object) -> bytes:
    capfdbinary.readouterr()
    assert main(["bytes", "generate", *map(str, words), "--device", "cpu"]) == 0
    return capfdbinary.readouterr().out


def test_generate(run, tmp_path, capfdbinary, monkeypatch):
    raw = generated(capfdbinary, run, "--prompt", "3 b", "--max-new-bytes", 40, "--bytes", "--temperature", 2)
    text = generated(capfdbinary, run, "--prompt", "3 b", "--max-new-bytes", 40, "--temperature", 2)
    assert 0 < len(raw) <= 40
    assert text == raw.decode("utf-8", "replace").encode()
    (tmp_path / "prompt").write_bytes(b"3 b")
    same = ("--max-new-bytes", 40, "--bytes", "--temperature", 2)
    assert generated(capfdbinary, run, "--prompt-file", tmp_path / "prompt", *same) == raw
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"3 b")))
    assert generated(capfdbinary, run, "--prompt-file", "-", *same) == raw
    other = generated(capfdbinary, run, "--prompt", "3 b", *same, "--seed", 4)
    assert other != raw
    stop = os.fsdecode(raw[3:6])
    if stop.isascii():
        stopped = generated(capfdbinary, run, "--prompt", "3 b", *same, "--stop", stop)
        assert stopped == raw[: raw.index(raw[3:6])]


@pytest.mark.parametrize("draft", ["ngram", "itself"])
def test_generate_with_drafts(run, capfdbinary, draft):
    """Greedy, so that the bytes are those without; a model that drafts for itself is always right."""
    words = (run, "--prompt", "3 bottles of béer on the wall, 3 bott", "--max-new-bytes", 40, "--bytes")
    draft = ("--draft", draft if draft == "ngram" else run)
    plain = generated(capfdbinary, *words, "--temperature", 0)
    assert main(["bytes", "generate", *map(str, words), "--temperature", "0", *map(str, draft), "--device", "cpu"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == plain
    kept, drafted, rate = re.search(r"drafts: (\d+) of (\d+) bytes kept \((\d+)%\), ", err.decode()).groups()
    assert 0 < int(kept) <= int(drafted)
    assert draft[1] == "ngram" or (kept, rate) == (drafted, "100")
    for options in (("--acceptance", "top3"), ("--draft-length", 3), ("--repetition-penalty", 1.2)):
        assert 0 < len(generated(capfdbinary, *words, "--temperature", 0.5, *draft, *options)) <= 40


def test_help_does_not_load_torch():
    for words in (["bytes", "--help"], ["bytes", "generate", "--help"]):
        code = f"import sys; from polymamba.cli import main; sys.exit(main({words}) or 'torch' in sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "generate" in result.stdout


# One clear line


@pytest.fixture
def error(capsys):
    """Run the command line; return its one line of error after checking exit code 1 and silence on stdout."""

    def run_main(*words: object) -> str:
        capsys.readouterr()
        assert main(["bytes", *map(str, words)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run_main


def test_files_that_cannot_be_used(error, texts, run, tmp_path):
    output = ("-o", tmp_path / "run")
    assert f"{tmp_path}/no: no such file" in error("train", tmp_path / "no", *output)
    (tmp_path / "empty").touch()
    assert "empty: empty" in error("train", tmp_path / "empty", *output)
    assert "cannot be divided" in error("train", texts / "0.txt", *output)
    assert not (tmp_path / "run").exists()
    assert "empty: empty" in error("eval", run, tmp_path / "empty")
    assert "already holds a run" in error("train", texts, "-o", run)
    changed = shutil.copytree(texts, tmp_path / "changed")
    (changed / "new").write_text("new")
    assert "cannot resume" in error("train", changed, "-o", run, *FAST, "--resume")
    assert "not an empty folder" in error("eval", run, texts, "-o", texts)


def test_models_and_prompts_that_cannot_be_used(error, run, tmp_path):
    assert "no config.json" in error("generate", tmp_path)
    assert "give one of them" in error("generate", run, "--prompt", "a", "--prompt-file", "-")
    assert "no.txt: cannot be read" in error("generate", run, "--prompt-file", tmp_path / "no.txt")
    assert "--stop: an empty text" in error("generate", run, "--stop", "")
    words = LanguageModelConfig(backbone=BackboneConfig(d_model=8, n_layer=1), vocab_size=320)
    LanguageModel(words).save_pretrained(tmp_path / "words")
    assert "words/config.json: holds LanguageModel, but a ByteLM is wanted" in error(
        "generate", run, "--draft", tmp_path / "words"
    )
    assert "no config.json" in error("generate", run, "--draft", tmp_path)


def test_no_figures_of_a_model_that_sees_the_future(error, run, texts, tmp_path, monkeypatch):
    def refuse(model):
        raise InputError("the model sees the future")

    monkeypatch.setattr("polymamba.bytes.verbs.common.check_causality", refuse)
    for words in (("eval", run, texts, "-o", tmp_path / "e"), ("eval", run, texts)):
        assert "sees the future" in error(*words)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "-o", "x"],
        ["train", "f", "-o", "x", "--context", "0"],
        ["train", "f", "-o", "x", "--dropout", "1"],
        ["train", "f", "-o", "x", "--valid-fraction", "0"],
        ["train", "f", "-o", "x", "--preset", "huge"],
        ["train", "f", "-o", "x", "--pattern", "bimamba"],
        ["train", "f", "-o", "x", "--n-experts", "4"],
        ["train", "f", "-o", "x", "--pattern", "mamba", "moe", "--n-experts", "2", "--top-k", "3"],
        ["train", "f", "-o", "x", "--pattern", "mamba+moe", "--d-expert", "20"],
        ["eval", "run"],
        ["eval", "run", "f", "--chunk", "0"],
        ["generate", "run", "--max-new-bytes", "0"],
        ["generate", "run", "--top-p", "2"],
        ["generate", "run", "--draft", "ngram", "--draft-length", "0"],
        ["generate", "run", "--draft", "ngram", "--acceptance", "top2"],
        ["generate", "run", "--acceptance", "top3"],
    ],
)
def test_bad_usage(words, capsys):
    assert main(["bytes", *words]) == 2
    assert not Path("x").exists()
    capsys.readouterr()


def test_from_pretrained_reads_the_run_folder(run):
    assert ByteLM.from_pretrained(run).config.vocab_size == 320


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [["mamba"], ["mamba", "moe"]])
def test_a_gpu_trains_to_the_same_bits_by_graph(texts, tmp_path, pattern):
    words = ["bytes", "train", str(texts), *FAST[:-1], "cuda", "--windows", "packed", "--pattern", *pattern]
    for name, more in (("plain", []), ("graph", ["--cuda-graph"])):
        assert main([*words, "-o", str(tmp_path / name), *more]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "graph")]
    assert weights[0] == weights[1]


@pytest.mark.gpu
def test_a_mixture_that_waits_for_the_host_is_not_recorded(texts, tmp_path, capsys):
    words = ["bytes", "train", str(texts), "-o", str(tmp_path / "run"), *FAST[:-1], "cuda", "--pattern", "mamba", "moe"]
    assert main([*words, "--precision", "fp32", "--cuda-graph"]) == 1
    assert "--cuda-graph" in capsys.readouterr().err
