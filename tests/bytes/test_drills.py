"""What goes wrong on real machines: a kill, a full disk, a damaged cache, empty files, a prompt of many megabytes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from polymamba.bytes import ByteLM
from polymamba.bytes.training import TrainBytes
from polymamba.cli import main
from polymamba.core.generation import CHUNK

FLAGS = [
    *("--epochs", "2", "--context", "64", "--batch-size", "8", "--windows", "apart"),
    *("--dropout", "0.1", "--save-every", "4", "--device", "cpu"),
]
RESULTS = ("model.safetensors", "config.json", "metrics.json", "splits.tsv")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"{i} bottles of béer on the wall, " * (7 + 2 * i))
    return folder


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory) -> Path:
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(texts, output) == 0
    return output


def words(texts: Path, output: Path, *more: str) -> list[str]:
    return ["bytes", "train", str(texts), "-o", str(output), *FLAGS, *more]


def train(texts: Path, output: Path, *more: str) -> int:
    return main(words(texts, output, *more))


def curve(run: Path) -> list[dict[str, float]]:
    """What was logged: losses, learning rates and validation bits per byte by step; not how long it took."""
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_results(one: Path, other: Path) -> None:
    for name in RESULTS:
        same = (one / name).read_bytes() == (other / name).read_bytes()  # of megabytes pytest would print a diff
        assert same, name
    assert curve(one) == curve(other)


def last_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1]


def at_loss(patch: pytest.MonkeyPatch, number: int, act) -> None:
    """Call act() when the loss is asked for for the time of this number, counted from 1."""
    loss, count = TrainBytes.loss, [0]

    def counted(self, model, batch):
        count[0] += 1
        if count[0] == number:
            act()
        return loss(self, model, batch)

    patch.setattr(TrainBytes, "loss", counted)


def killed_at(number: int, arguments: list[str]) -> None:
    """Run the command line in a process of its own, which kills itself at this step, between two checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        at_loss(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        main(arguments)


@pytest.mark.parametrize(
    "step",
    [pytest.param(2, marks=pytest.mark.slow), 14],  # before the first checkpoint; in the second epoch or later
)
def test_a_kill(step, texts, whole, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {Path(__file__).stem} as drills; "
    code += f"drills.killed_at({step}, {words(texts, tmp_path / 'run')})"
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert train(texts, tmp_path / "run", "--resume") == 0
    assert_same_results(whole, tmp_path / "run")


# A full disk


# 5000: the manifest of the run fits, the corpus does not
@pytest.mark.parametrize(("limit", "file"), [(64, "manifest.json"), (5000, "train.bin")])
def test_a_disk_too_full_for_the_corpus(full_disk, limit, file, texts, whole, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    with full_disk(limit):
        assert train(texts, tmp_path / "run", "--corpus", str(corpus)) == 1
    line = last_line(capsys)
    assert line.startswith("error: ")
    assert f"{file}: cannot be written (File too large)" in line
    assert not corpus.exists() or list(corpus.iterdir()) == []
    resume = ["--resume"] if (tmp_path / "run" / "manifest.json").exists() else []
    assert train(texts, tmp_path / "run", "--corpus", str(corpus), *resume) == 0
    assert_same_results(whole, tmp_path / "run")


def test_a_disk_that_fills_up_in_training(texts, whole, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        at_loss(patch, 10, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard)))
        try:
            assert train(texts, tmp_path / "run") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = last_line(capsys)
    assert "File too large" in line
    assert line.endswith("the same command with --resume goes on from the last checkpoint")
    assert train(texts, tmp_path / "run", "--resume") == 0
    assert_same_results(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("verb", "limit"),
    [("eval", 64), ("noise", 64), ("noise", 300)],  # 64: the spoiled text, already, cannot be laid down; 300: it can
)
def test_a_full_disk_leaves_what_was_there(full_disk, verb, limit, texts, whole, tmp_path, capsys):
    output = tmp_path / "output"
    if verb == "noise":
        output.write_text("precious")
    with full_disk(limit):
        assert main(["bytes", verb, str(whole), str(texts / "1.txt"), "-o", str(output), "--device", "cpu"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "cannot be written (File too large)" in line
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"] * (verb == "noise")


# Files


def test_a_damaged_corpus_is_made_anew(texts, whole, tmp_path, capsys):
    """One that two runs share; the second run is as if nothing had been."""
    shutil.copytree(whole / "corpus", tmp_path / "corpus")
    (cache,) = (tmp_path / "corpus").iterdir()
    (cache / "train.bin").write_bytes((cache / "train.bin").read_bytes()[:-7])
    assert train(texts, tmp_path / "second", "--corpus", str(tmp_path / "corpus")) == 0
    assert "train.bin is damaged (its checksum is another one); building it anew" in capsys.readouterr().err
    assert_same_results(whole, tmp_path / "second")


def test_empty_files_are_passed_over_and_counted(texts, whole, tmp_path, capsys):
    for file in texts.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["bytes", "eval", str(whole), str(tmp_path), "--device", "cpu"]) == 0
    without = capsys.readouterr()
    (tmp_path / "3a.txt").touch()
    (tmp_path / "3b.txt").touch()
    assert main(["bytes", "eval", str(whole), str(tmp_path), "--device", "cpu"]) == 0
    assert capsys.readouterr() == (without.out, f"2 empty files passed over\n{without.err}")


def test_a_long_prompt_takes_bounded_memory(whole, tmp_path, capfdbinary, monkeypatch):
    """A stand-in for 10 MB: it is read in pieces, each at most CHUNK long, and no logits are kept of them."""
    prompt, pieces = bytes(range(256)) * 18, []
    (tmp_path / "prompt").write_bytes(prompt)
    forward = ByteLM.forward

    def seen(self, tokens, *args, **options):
        pieces.append(tuple(tokens.shape))
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(ByteLM, "forward", seen)
    words = ["bytes", "generate", str(whole), "--prompt-file", str(tmp_path / "prompt"), "--bytes", "--device", "cpu"]
    assert main([*words, "--max-new-bytes", "3"]) == 0
    assert len(capfdbinary.readouterr().out) <= 3
    assert pieces == [(1, CHUNK)] * 2 + [(1, 1 + len(prompt) - 2 * CHUNK)]
