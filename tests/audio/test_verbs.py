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
from polymamba.audio.commands import Eval, Generate
from polymamba.audio.generation import write_on
from polymamba.audio.reading import WRITABLE
from polymamba.audio.verbs import generate
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


def test_a_run_explains_itself(trained):
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


def test_stdout_carries_the_file(run, put, tone, tmp_path, capfdbinary):
    """Prompt and all, in a process of its own, as another program would read it; and without a file just the same."""
    prompt = put("prompt.flac", tone(0.3, 8000), 8000)
    words = [*map(str, ("audio", "generate", run, "--stdout", "--seconds", "0.7", "--seed", "3", "--prompt", prompt))]
    code = "import sys; from polymamba.cli import main; sys.exit(main(sys.argv[1:]))"
    with_file = [sys.executable, "-c", code, *words, "-o", str(tmp_path / "a.wav")]
    done = subprocess.run(with_file, capture_output=True, check=True)
    wave, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert len(wave) == 2000
    assert np.array_equal(np.frombuffer(done.stdout, "<i2"), wave)
    assert b"aplay -f S16_LE -r 2000 -c 1" in done.stderr
    assert main(words) == 0
    assert capfdbinary.readouterr().out == done.stdout


def test_every_format_carries_the_same_sound(model, run, put, tone, heard, tmp_path, capsys):
    """From `generate` through a file to `score`: without loss as wav and flac, about the same as ogg and mp3."""
    model.config = dataclasses.replace(model.config, sample_rate=8000)  # mp3 has no 2000 Hz
    model.save_pretrained(run)
    prompt = tone(0.5, 8000)
    words = ["generate", run, "--seconds", "0.1", "--prompt", put("prompt.wav", prompt, 8000)]
    files, waves = [tmp_path / f"a{suffix}" for suffix in WRITABLE], {}
    for path in files:
        run_ok(*words, "-o", path)
        waves[path.suffix] = heard(path, 8000)
    assert len(waves[".wav"]) == 4800
    assert np.array_equal(waves[".flac"], waves[".wav"])
    assert np.abs(waves[".wav"][:4000] - prompt).max() < 0.02  # of 256 codes
    for suffix in (".ogg", ".mp3"):
        assert len(waves[suffix]) == 4800
        assert np.corrcoef(waves[suffix][:4000], prompt)[0, 1] > 0.99
    capsys.readouterr()
    run_ok("score", run, *files)
    rows = dict(line.split("\t", 1) for line in capsys.readouterr().out.splitlines()[1:-1])
    assert {name: row.split("\t")[1] for name, row in rows.items()} == {str(path): "4800" for path in files}
    assert rows[str(tmp_path / "a.flac")] == rows[str(tmp_path / "a.wav")]


def test_generation_goes_on_from_a_state(run, tmp_path):
    """As from the sound itself, short of the last bits: so nothing is cut off at a threshold here."""
    a, state, every = tmp_path / "a.wav", tmp_path / "state", ["--top-p", "1"]
    run_ok("generate", run, "-o", a, "--seconds", "0.3", "--save-state", state, "--seed", 3)
    run_ok("generate", run, "-o", tmp_path / "b.wav", "--seconds", "0.2", "--state", state, "--seed", 4, *every)
    run_ok("generate", run, "-o", tmp_path / "c.wav", "--seconds", "0.2", "--prompt", a, "--seed", 4, *every)
    (b, _), (c, _) = (soundfile.read(tmp_path / name) for name in ("b.wav", "c.wav"))
    assert np.array_equal(c[600:], b)


@pytest.mark.parametrize(("words", "is_half"), [((), False), (("--precision", "bf16"), True)])
def test_sound_is_made_in_float32_unless_less_is_asked_for(run, tmp_path, monkeypatch, words, is_half):
    """On a GPU too."""
    seen = set()

    def writing(*args, **options):
        seen.add(torch.is_autocast_enabled("cpu"))
        return write_on(*args, **options)

    monkeypatch.setattr(generate, "write_on", writing)
    run_ok("generate", run, "-o", tmp_path / "a.wav", "--seconds", "0.01", *words)
    assert seen == {is_half}
    assert Generate(run=run, stdout=True).compute.precision == Eval(run=run, files=(run,)).compute.precision == "fp32"


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


def test_score_is_the_same_at_any_chunk(run, digits, heard, tmp_path, capsys):
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

    model = AudioModel.from_pretrained(run)
    codes = torch.from_numpy(encode(heard(digits / "hi" / "0.wav", RATE), "mu-law").astype(np.int64))
    with torch.no_grad():
        logits = model(torch.cat((torch.tensor([256]), codes[:-1]))[None], labels=torch.tensor([0]))
        bits = torch.nn.functional.cross_entropy(logits[0], codes).item() / np.log(2)
    assert abs(float(tables[0].splitlines()[1].split("\t")[3]) - bits) < 2e-4


def test_classifier(digits, put, tone, tmp_path, capsys):
    run = tmp_path / "run"
    run_ok("train", digits, "-o", run, "--classifier", *QUICK, "--epochs", "12", "--context", "600")
    assert "accuracy" in capsys.readouterr().out
    assert json.loads((run / "labels.json").read_text()) == {"0": "hi", "1": "lo"}
    assert (run / "confusion.png").exists()
    assert isinstance(AudioClassifier.from_pretrained(run), AudioClassifier)
    run_ok("classify", run, put("low.wav", tone(0.2, RATE, 95)), put("high.wav", tone(0.2, RATE, 390)))
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["file", "label", "hi", "lo"]
    assert [row[1] for row in rows[1:]] == ["hi", "lo"]  # in order of the names
    run_ok("classify", run, digits, "-o", tmp_path / "t.tsv")
    assert "of 28 files" in capsys.readouterr().err
    assert "holds AudioClassifier, but a AudioModel is wanted" in error_of(capsys, "score", run, digits)


def test_plot(digits, put, tmp_path, capsys):
    run_ok("plot", digits, put("one.wav", np.array([0.1])), "-o", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "the first 12 are drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.wav", bytes(range(200)), "a.wav: cannot be read as sound"),
        ("a.flac", b"", "a.flac: an empty file, of no bytes"),
        ("a.m4a", b"\0\0\0 ftypM4A ", "a.m4a: m4a files cannot be read; convert it first, for example with `ffmpeg -i"),
        ("a.wav", lambda tone: (np.empty(0), RATE), "a.wav: a sound of 0 seconds"),
        ("a.wav", lambda tone: (np.full(9, np.nan), RATE), "a.wav: the sample at 0.000 s is no finite"),
        ("a.wav", lambda tone: (tone(0.1, 44101), 44101), "a.wav: 44101 Hz cannot be brought to 2000 Hz"),
    ],
)
def test_bad_sound(run, put, tone, name, content, message, tmp_path, capsys):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        put(name, *content(tone), subtype="FLOAT")
    bad, output = tmp_path / name, tmp_path / "out.wav"
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
    assert "a.mp3: mp3 has no 2000 Hz, which is the model's rate; write .wav" in error_of(
        capsys, "generate", run, "-o", tmp_path / "a.mp3"
    )
    assert "no such file" in error_of(capsys, "generate", run, "-o", out, "--prompt", tmp_path / "no.wav")
    assert "not a state of this model" in error_of(
        capsys, "generate", run, "-o", out, "--state", run / "model.safetensors"
    )
    (tmp_path / "e").mkdir()
    assert "a folder without files" in error_of(capsys, "train", tmp_path / "e", "-o", tmp_path / "t")
    (tmp_path / "e" / "notes.txt").write_text("hello")
    for words in (["train", tmp_path / "e", "-o", tmp_path / "t"], ["score", run, tmp_path / "e"]):
        assert "e: no sound files in it; wav, flac, mp3 and ogg can be read" in error_of(capsys, *words)
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
        (
            ["train", digits, "-o", tmp_path / "t", "--classifier", "--gate", "-30"],
            "a classifier hears every recording",
        ),
        (["score", run], "no files; name at least one file or folder"),
        (["score", run, digits, "--chunk", "0"], "chunk is 0; it must be at least 1"),
    ):
        assert main(["audio", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()
    assert not (tmp_path / "t").exists()


def test_one_sample_eight_channels_and_clipped_sound(put, tmp_path, capsys):
    """They are read as what they are."""
    rng = np.random.default_rng(0)
    one = put("set/train/one.wav", np.array([0.1]))
    eight = put("set/train/eight.wav", rng.uniform(-0.3, 0.3, (900, 8)))
    clipped = put("set/valid/clipped.wav", rng.uniform(-5, 5, 400).clip(-1, 1))
    run_ok("train", tmp_path / "set", "-o", tmp_path / "run", *QUICK, "--test-fraction", "0")
    assert "of all samples are at full scale: these recordings are clipped" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.json").exists()
    run_ok("score", tmp_path / "run", one, eight, clipped)
    out, err = capsys.readouterr()
    rows = [line.split("\t") for line in out.splitlines()[1:]]
    assert [row[2] for row in rows] == ["900", "1", "400", "1301"]  # in order of the names
    assert all(0 < float(row[3]) < 20 for row in rows)
    assert "eight.wav of 8 channels: averaged to mono" in err.replace("\n", " ")
    for prompt, n in ((one, 1), (eight, 900), (clipped, 400)):
        run_ok("generate", tmp_path / "run", "--prompt", prompt, "--seconds", "0.1", "-o", tmp_path / "a.wav")
        assert soundfile.info(tmp_path / "a.wav").frames == n + 200
