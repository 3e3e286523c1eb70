"""From files to a corpus: parts, labels, the cache, windows and what they hold."""

import shutil
import tracemalloc

import numpy as np
import pytest

from polymamba.audio import AudioConfig, UNetConfig, reading, scoring
from polymamba.audio.codec import encode, values
from polymamba.audio.config import START, Dividing
from polymamba.audio.corpus import (
    BLOCK,
    describe,
    divide,
    find_sounds,
    folder_labels,
    open_corpus,
    write_splits_tsv,
)
from polymamba.audio.scoring import order0_bits
from polymamba.audio.training import PADDING, TrainAudio
from polymamba.audio.verbs.common import read_codes
from polymamba.core import InputError, TrainConfig

RATE = 2000


def test_what_counts_as_sound(put, tone, tmp_path, capsys):
    put("set/a.wav", tone(0.1, RATE))
    put("set/b/c.FLAC", tone(0.1, RATE), format="FLAC")
    put("set/nothing.wav", np.empty(0))
    (tmp_path / "set" / "README.txt").write_text("hello")
    sounds = find_sounds([tmp_path / "set"])
    assert [s.path.name for s in sounds] == ["a.wav", "c.FLAC"]
    said = capsys.readouterr().err
    assert "1 files passed over whose endings are none of sound files" in said
    assert "1 files of 0 seconds passed over" in said
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="empty: no sound files in it"):
        find_sounds([tmp_path / "empty"])
    with pytest.raises(InputError, match=r"nothing\.wav: a sound of 0 seconds"):
        find_sounds([tmp_path / "set" / "nothing.wav"])
    (tmp_path / "set" / "x.m4a").write_bytes(b"ftyp")
    with pytest.raises(InputError, match="m4a files cannot be read"):
        find_sounds([tmp_path / "set"])


def test_parts_by_path_or_by_label(put, tone, digits, tmp_path):
    for part in ("train", "valid", "test"):
        for label in ("x", "y"):
            put(f"named/{part}/{label}/a.wav", tone(0.1 + 0.01 * len(part + label), RATE))
    recordings = divide(find_sounds([tmp_path / "named"]), Dividing(), 0)
    assert [(r.part, r.label) for r in recordings] == [
        (part, label) for part in ("test", "train", "valid") for label in ("x", "y")
    ]
    sounds = find_sounds([digits])
    drawn = divide(sounds, Dividing(valid_fraction=0.15, test_fraction=0.15), 3)
    count = {
        (p, k): sum((r.part, r.label) == (p, k) for r in drawn)
        for p in ("train", "valid", "test")
        for k in ("hi", "lo")
    }
    assert count == {("train", k): 10 for k in ("hi", "lo")} | {
        (p, k): 2 for p in ("valid", "test") for k in ("hi", "lo")
    }
    moved = shutil.copytree(digits, tmp_path / "elsewhere")
    again = divide(find_sounds([moved]), Dividing(valid_fraction=0.15, test_fraction=0.15), 3)
    assert sorted((r.sha256, r.part) for r in again) == sorted((r.sha256, r.part) for r in drawn)
    with pytest.raises(InputError, match="1 different files cannot be divided into train and valid and test"):
        divide(sounds[:1], Dividing(), 0)
    assert folder_labels(sounds[:3]) == [""] * 3  # one folder only


def test_parts_by_time(put, tone, heard, tmp_path):
    path = put("long.wav", tone(2, RATE, 7))
    recordings = divide(find_sounds([path]), Dividing(split_by="time"), 0)
    corpus = open_corpus(tmp_path / "corpus", recordings, RATE, "mu-law")
    joined = np.concatenate([corpus[part].codes for part in ("train", "valid", "test")])
    assert np.array_equal(joined, encode(heard(path, RATE), "mu-law"))
    assert [len(corpus[part].codes) for part in ("train", "valid", "test")] == [3200, 400, 400]


def test_channels(put, tone, tmp_path, capsys):
    wave = np.stack([tone(0.2, RATE, 50), tone(0.2, RATE, 90)], 1)
    sounds = find_sounds([put("train/a.wav", wave), put("valid/b.wav", wave[::-1])])
    both = divide(sounds, Dividing(channels="split", test_fraction=0), 0)
    assert "2 files of 2 channels: each channel a recording" in capsys.readouterr().err
    corpus = open_corpus(tmp_path / "corpus", both, RATE, "linear")
    error = corpus["train"].recording(1).astype(int) - encode(wave[:, 1], "linear")
    assert np.abs(error).max() <= 1  # of the file's 16 bits
    mixed = divide(sounds, Dividing(test_fraction=0), 0)
    assert "2 files of 2 channels: their channels averaged" in capsys.readouterr().err
    corpus = open_corpus(tmp_path / "corpus", mixed, RATE, "linear")
    error = corpus["train"].recording(0).astype(int) - encode(wave.mean(1), "linear")
    assert np.abs(error).max() <= 1


def test_the_cache(digits, heard, tmp_path, capsys):
    recordings = divide(find_sounds([digits]), Dividing(), 0)
    folder = tmp_path / "corpus"
    corpus = open_corpus(folder, recordings, RATE, "mu-law")
    names = {r.path: r for r in recordings}
    for part, held in corpus.items():
        for i, name in enumerate(held.names):
            assert names[name].part == part
            assert names[name].label == held.labels[i]
            assert np.array_equal(held.recording(i), encode(heard(names[name].path, RATE), "mu-law"))
    train = np.array(corpus["train"].codes)
    power = [(values("mu-law").numpy()[train[i : i + BLOCK]] ** 2).mean() for i in range(0, len(train), BLOCK)]
    np.testing.assert_allclose(corpus["train"].power, power, rtol=1e-5)
    del corpus["train"]  # which maps a file that is now spoilt
    (cache,) = folder.iterdir()
    written = (cache / "train.bin").stat().st_mtime_ns
    open_corpus(folder, recordings, RATE, "mu-law")
    assert (cache / "train.bin").stat().st_mtime_ns == written
    (cache / "train.bin").write_bytes(b"spoilt")
    again = open_corpus(folder, recordings, RATE, "mu-law")
    assert "train.bin is damaged (its checksum is another one); building it anew" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert np.array_equal(again["train"].codes, train)
    open_corpus(folder, recordings, RATE, "linear")
    assert len(list(folder.iterdir())) == 2
    write_splits_tsv(tmp_path / "splits.tsv", recordings)
    assert len((tmp_path / "splits.tsv").read_text().splitlines()) == 29
    assert "train        22 recordings" in describe(recordings, again, RATE)


def test_a_long_file_takes_no_more_memory_than_a_short_one(put, heard, tmp_path, monkeypatch):
    """In training and in what only reads; resampled and not. A short stand-in for hours, with small blocks."""
    monkeypatch.setattr(reading, "BLOCK", 4000)
    monkeypatch.setattr(scoring, "AT_ONCE", 4000)
    wave = np.random.default_rng(0).uniform(-0.3, 0.3, 1_000_000)
    sounds = find_sounds([put("train/a.wav", wave), put("valid/b.wav", wave[:9])])
    recordings = divide(sounds, Dividing(test_fraction=0), 0)
    for rate in (RATE, RATE // 2):
        n, config = len(wave) * rate // RATE, AudioConfig(unet=UNetConfig(d_model=4, n_blocks=1), sample_rate=rate)
        heard(sounds[1].path, rate)  # imports what it needs
        tracemalloc.start()
        codes = open_corpus(tmp_path / "corpus", recordings, rate, "mu-law")["train"].codes
        _, (read, _), _ = read_codes([tmp_path / "train", tmp_path / "valid"], config)
        order0_bits([read])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(codes) == n
        assert peak < len(wave) / 2, f"{peak} bytes for {len(wave)} samples of the file"
        truth = encode(heard(sounds[0].path, rate), "mu-law")
        assert np.array_equal(codes, truth)
        assert np.array_equal(read, truth)


def test_a_file_that_changes_meanwhile(put, tone, tmp_path):
    sounds = find_sounds([put("train/a.wav", tone(1, RATE)), put("valid/b.wav", tone(1, RATE))])
    recordings = divide(sounds, Dividing(test_fraction=0), 0)
    put("train/a.wav", tone(1, RATE, 99))
    with pytest.raises(InputError, match=r"a\.wav: changed while it was read"):
        open_corpus(tmp_path / "corpus", recordings, RATE, "mu-law")
    assert not list((tmp_path / "corpus").glob("*"))


def test_clipped_sound_is_told(put, tmp_path, capsys):
    wave = np.clip(3 * np.sin(np.arange(4000) / 9), -1, 1)
    sounds = find_sounds([put("train/a.wav", wave), put("valid/b.wav", wave[:99])])
    open_corpus(tmp_path / "corpus", divide(sounds, Dividing(test_fraction=0), 0), RATE, "mu-law")
    assert "of all samples are at full scale: these recordings are clipped" in capsys.readouterr().err


def task_of(tmp_path, words, context, gate=0.0, labels=()):
    recordings = divide(find_sounds(words), Dividing(), 0)
    corpus = open_corpus(tmp_path / "corpus", recordings, RATE, "mu-law")
    config = TrainConfig(batch_size=3, max_tokens=10_000)
    return TrainAudio(corpus["train"], corpus["valid"], labels, config, context, gate, seed=0)


@pytest.mark.parametrize("context", [37, 400, 100_000])
def test_windows_hold_every_sample_once_after_the_true_one_before(digits, tmp_path, context):
    task = task_of(tmp_path, [digits], context, labels=("hi", "lo"))
    for epoch in (0, 1):
        seen = np.zeros(len(task.train.codes), int)
        for description in task.plan(epoch):
            batch = task.batch(description, epoch)
            codes = batch["codes"].numpy()
            for row, (begin, size, at_start, label) in zip(codes, description, strict=True):
                recording = np.searchsorted(task.train.starts, begin, side="right") - 1
                assert at_start == (begin == task.train.starts[recording])
                assert begin + size <= task.train.starts[recording + 1]
                assert row[0] == (START if at_start else task.train.codes[begin - 1])
                assert np.array_equal(row[1 : size + 1], task.train.codes[begin : begin + size])
                assert (row[size + 1 :] == PADDING).all()
                assert size <= context
                assert label in (2, task.label_ids[recording])
                seen[begin : begin + size] += 1
        assert (seen == 1).all()
    unlabelled = np.concatenate([d[:, 3] == 2 for d in task.plan(0)])
    assert context > 400 or 0.02 < unlabelled.mean() < 0.25
    if context < 400:
        assert not np.array_equal(np.concatenate(task.plan(0))[:20], np.concatenate(task.plan(1))[:20])


def test_the_silence_gate(put, tone, tmp_path):
    loud, quiet = tone(2, RATE), np.zeros(6 * RATE, np.float32)
    for i in range(12):
        put(f"set/{i}.wav", np.concatenate((loud * (1 + i) / 13, quiet)))
    words = [tmp_path / "set"]
    n_all = sum(map(len, task_of(tmp_path, words, 1000).plan(0)))
    n_loud = sum(map(len, task_of(tmp_path, words, 1000, gate=0.001).plan(0)))
    assert 0.2 < n_loud / n_all < 0.45
