"""`polymamba audio ...` as a user runs it, and what it says when something is wrong."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from polymamba.audio import AudioClassifier, AudioModel
from polymamba.cli import main

RATE = 2000
QUICK = ["--epochs", "2", "--batch-size", "4", "--context", "300", "--device", "cpu", "--save-every", "3"]


def run_ok(*words) -> None:
    assert main(["audio", *map(str, words)]) == 0


def error_of(capsys, *words) -> str:
    capsys.readouterr()
    assert main(["audio", *map(str, words)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_ok("train", digits, "-o", folder / "run", "--labels", *QUICK)
    return folder / "run"


def test_a_run_explains_itself(trained, digits):
    names = {path.name for path in trained.iterdir()}
    assert names >= {"model.safetensors", "config.json", "metrics.json", "log.jsonl", "curves.png", "manifest.json"}
    assert names >= {"splits.tsv", "checkpoints"}
    model = AudioModel.from_pretrained(trained)
    assert model.config.labels == ("hi", "lo")
    assert model.config.sample_rate == RATE
    assert 0.1 < model.config.loudest < 0.6
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 < metrics["bits_per_sample"] < 8.5
    assert metrics["recordings"] == 3
    manifest = json.loads((trained / "manifest.json").read_text())
    assert len(manifest["inputs_sha256"]) == 28


def test_training_resumes_to_the_same_numbers(trained, digits, tmp_path, monkeypatch):
    from polymamba.audio.training import TrainAudio

    loss, calls = TrainAudio.loss, []

    def failing(self, model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    words = ["train", digits, "-o", tmp_path / "run", "--labels", *QUICK]
    monkeypatch.setattr(TrainAudio, "loss", failing)
    assert main(["audio", *map(str, words)]) == 1
    monkeypatch.setattr(TrainAudio, "loss", loss)
    run_ok(*words, "--resume")
    for name in ("model.safetensors", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_generate(trained, tmp_path, suffix, capsys):
    path = tmp_path / f"out{suffix}"
    run_ok("generate", trained, "-o", path, "--seconds", "0.5", "--label", "lo", "--guidance", "1.5", "--top-p", "0.95")
    wave, rate = soundfile.read(path)
    assert (rate, len(wave)) == (RATE, 1000)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "samples/s" in capsys.readouterr().err


def test_generate_mp3(model, run, tmp_path, capsys):
    words = ["generate", run, "-o", tmp_path / "a.mp3", "--seconds", "0.2"]
    assert "a.mp3: mp3 has no 2000 Hz, which is the model's rate; write .wav" in error_of(capsys, *words)
    model.config = dataclasses.replace(model.config, sample_rate=8000)
    model.save_pretrained(run)
    run_ok(*words)
    assert soundfile.info(tmp_path / "a.mp3").samplerate == 8000


def test_stdout_carries_the_file(run, tmp_path):
    """In a process of its own, as another program would read it."""
    words = ["generate", run, "-o", tmp_path / "a.wav", "--stdout", "--seconds", "0.7", "--seed", "3"]
    code = "import sys; from polymamba.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "audio", *map(str, words)], capture_output=True, check=True)
    wave, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert np.array_equal(np.frombuffer(done.stdout, "<i2"), wave)
    assert b"aplay -f S16_LE -r 2000 -c 1" in done.stderr


def test_generation_goes_on_from_a_state(run, tmp_path):
    """As from the sound itself, short of the last bits: so nothing is cut off at a threshold here."""
    a, state, every = tmp_path / "a.wav", tmp_path / "state", ["--top-p", "1"]
    run_ok("generate", run, "-o", a, "--seconds", "0.3", "--save-state", state, "--seed", 3)
    run_ok("generate", run, "-o", tmp_path / "b.wav", "--seconds", "0.2", "--state", state, "--seed", 4, *every)
    run_ok("generate", run, "-o", tmp_path / "c.wav", "--seconds", "0.2", "--prompt", a, "--seed", 4, *every)
    (b, _), (c, _) = (soundfile.read(tmp_path / name) for name in ("b.wav", "c.wav"))
    assert np.array_equal(c[600:], b)


def test_several_at_once_are_those_alone(run, tmp_path):
    run_ok("generate", run, "-o", tmp_path / "x.wav", "--n", "3", "--seconds", "0.2", "--seed", "5")
    run_ok("generate", run, "-o", tmp_path / "alone.wav", "--seconds", "0.2", "--seed", "6")
    (second, _), (alone, _) = (soundfile.read(tmp_path / name) for name in ("x-2.wav", "alone.wav"))
    assert np.array_equal(second, alone)
    assert sorted(p.name for p in tmp_path.glob("x-*.png")) == ["x-1.png", "x-2.png", "x-3.png"]


def test_a_prompt_of_another_rate_is_resampled_and_told(run, put, tone, tmp_path, capsys):
    prompt = put("prompt.wav", np.stack([tone(1, 8000)] * 2, 1), 8000)
    words = [
        "generate",
        run,
        "-o",
        tmp_path / "a.wav",
        "--seconds",
        "0.1",
        "--prompt",
        prompt,
        "--prompt-seconds",
        "0.6",
    ]
    run_ok(*words)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "prompt.wav of 8000 Hz: resampled to 2000 Hz" in said
    assert "prompt.wav of 2 channels: averaged to mono" in said
    wave, _ = soundfile.read(tmp_path / "a.wav")
    assert len(wave) == 1400
    assert np.abs(wave[:1200] - tone(0.6, RATE)).max() < 0.08


def test_score_is_the_same_at_any_chunk(run, digits, tmp_path, capsys):
    tables = []
    for chunk in (7, 100, 16384):
        run_ok("score", run, digits / "hi" / "0.wav", digits / "lo", "--chunk", chunk, "-o", tmp_path / "t.tsv")
        out = capsys.readouterr().out
        assert out == (tmp_path / "t.tsv").read_text()
        tables.append(out)
    assert tables[0] == tables[1] == tables[2]
    last = tables[0].splitlines()[-1].split("\t")
    assert last[0] == "all"
    assert len(tables[0].splitlines()) == 17
    # one file, by hand
    from polymamba.audio.codec import encode
    from polymamba.audio.reading import read_all

    model = AudioModel.from_pretrained(run)
    codes = torch.from_numpy(encode(read_all(digits / "hi" / "0.wav", RATE), "mu-law").astype(np.int64))
    with torch.no_grad():
        logits = model(torch.cat((torch.tensor([256]), codes[:-1]))[None], labels=torch.tensor([0]))
        bits = torch.nn.functional.cross_entropy(logits[0], codes).item() / np.log(2)
    assert abs(float(tables[0].splitlines()[1].split("\t")[3]) - bits) < 2e-4


def test_classifier(digits, put, tone, tmp_path, capsys):
    run = tmp_path / "run"
    run_ok("train", digits, "-o", run, "--classifier", *QUICK, "--epochs", "12", "--context", "600")
    assert "accuracy" in capsys.readouterr().out
    assert json.loads((run / "labels.json").read_text()) == ["hi", "lo"]
    assert (run / "confusion.png").exists()
    assert isinstance(AudioClassifier.from_pretrained(run), AudioClassifier)
    run_ok("classify", run, put("low.wav", tone(0.2, RATE, 95)), put("high.wav", tone(0.2, RATE, 390)))
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["file", "label", "hi", "lo"]
    assert [row[1] for row in rows[1:]] == ["hi", "lo"]  # in order of the names
    run_ok("classify", run, digits, "-o", tmp_path / "t.tsv")
    assert "of 28 files" in capsys.readouterr().err
    assert "holds AudioClassifier, but a AudioModel is wanted" in error_of(capsys, "score", run, digits)


def test_plot(digits, put, tone, tmp_path, capsys):
    run_ok("plot", digits, put("one.wav", np.array([0.1])), "-o", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "the first 12 are drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda put, tone: put("a.wav", np.empty(0)), r"a.wav: a sound of 0 seconds"),
        (
            lambda put, tone: put("a.wav", np.full(9, np.nan), subtype="FLOAT"),
            "a.wav: the sample at 0.000 s is no finite",
        ),
        (lambda put, tone: put("a.wav", tone(0.1, 44101), 44101), "a.wav: 44101 Hz cannot be brought to 2000 Hz"),
    ],
)
def test_bad_sound(run, put, tone, make, message, tmp_path, capsys):
    bad = make(put, tone)
    output = tmp_path / "out.wav"
    assert message in error_of(capsys, "score", run, bad)
    assert message in error_of(capsys, "generate", run, "--prompt", bad, "-o", output, "--seconds", "0.1")
    assert message in error_of(capsys, "train", bad, "-o", tmp_path / "t", "--split-by", "time", "--sample-rate", RATE)
    assert not output.exists()
    assert not list(tmp_path.glob("*.tsv"))


def test_bad_words(run, digits, put, tone, tmp_path, capsys):
    out = tmp_path / "a.wav"
    assert "--label me: not a label of this model; it knows hi, lo" in error_of(
        capsys, "generate", run, "-o", out, "--label", "me"
    )
    assert "its ending must be one of .wav, .flac" in error_of(capsys, "generate", run, "-o", tmp_path / "a.m4a")
    assert "no such file" in error_of(capsys, "generate", run, "-o", out, "--prompt", tmp_path / "no.wav")
    assert "not a state of this model" in error_of(
        capsys, "generate", run, "-o", out, "--state", run / "model.safetensors"
    )
    (tmp_path / "e").mkdir()
    assert "a folder without files" in error_of(capsys, "train", tmp_path / "e", "-o", tmp_path / "t")
    one = put("one/a.wav", tone(0.1, RATE))
    assert "1 different files cannot be divided" in error_of(capsys, "train", one, "-o", tmp_path / "t")
    said = error_of(capsys, "train", digits / "hi", "-o", tmp_path / "t", "--classifier")
    assert "--classifier takes the folders' names as labels, and there is only none" in said
    for words, message in (
        (["generate", run], "nowhere to write; give -o FILE, or --stdout"),
        (["generate", run, "-o", out, "--guidance", "2"], "give a --label, too"),
        (["generate", run, "--stdout", "--n", "2"], "stdout carries one sound, not 2"),
        (["generate", run, "-o", out, "--state", "s", "--label", "hi"], "give neither --prompt nor --label"),
        (["train", digits, "-o", tmp_path / "t", "--gate", "3"], "gate is 3.0; it must be 0 dB or less"),
        (
            ["train", digits, "-o", tmp_path / "t", "--labels", "--classifier"],
            "labels and classifier exclude each other",
        ),
        (["score", run, digits, "--chunk", "0"], "chunk is 0; it must be at least 1"),
    ):
        assert main(["audio", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert not (tmp_path / "t").exists()


def test_a_recording_of_one_sample_and_one_of_eight_channels(digits, put, tmp_path):
    """They are read as what they are."""
    put("set/train/one.wav", np.array([0.1]))
    put("set/train/eight.wav", np.random.default_rng(0).uniform(-0.3, 0.3, (900, 8)))
    put("set/valid/a.wav", np.random.default_rng(0).uniform(-0.3, 0.3, 400))
    run_ok("train", tmp_path / "set", "-o", tmp_path / "run", *QUICK, "--test-fraction", "0")
    assert not (tmp_path / "run" / "metrics.json").exists()
