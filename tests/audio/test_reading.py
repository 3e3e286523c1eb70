"""Sound files in: every format, rate and number of channels; and what is wrong with files."""

import numpy as np
import pytest
import soundfile
import torch

from polymamba.audio import reading
from polymamba.audio.reading import inspect, resampled, samples
from polymamba.core import InputError

RATE = 2000


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("a.wav", {"subtype": "PCM_16"}, 4e-5),
        ("a.wav", {"subtype": "PCM_24"}, 1e-6),
        ("a.wav", {"subtype": "FLOAT"}, 0),
        ("a.wav", {"subtype": "PCM_U8"}, 0.01),
        ("a.flac", {}, 4e-5),
        ("a.aiff", {}, 4e-5),
        ("a.ogg", {}, 0.1),
        ("a.mp3", {}, 0.1),
    ],
)
def test_formats(put, tone, heard, name, options, error):
    wave = tone(0.5, 8000)
    found = heard(put(name, wave, 8000, **options), 8000)
    assert abs(len(found) - len(wave)) <= (0 if error < 0.1 else 1200)  # mp3's own frames
    n = min(len(found), len(wave))
    assert np.abs(found[:n] - wave[:n]).max() <= error or error == 0.1
    assert 0.3 < np.sqrt((found**2).mean()) < 0.4


def test_channels_are_averaged_or_one_is_taken(put, tone):
    wave = np.stack([tone(0.1, RATE, 100 * (i + 1)) for i in range(8)], 1)
    sound = inspect(put("eight.wav", wave, subtype="FLOAT"))
    assert (sound.n_channels, sound.n_frames, sound.seconds) == (8, 200, 0.1)
    np.testing.assert_allclose(np.concatenate([*samples(sound, RATE)]), wave.mean(1), atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([*samples(sound, RATE, 5)]), wave[:, 5])


@pytest.mark.parametrize(("old", "new"), [(44100, 16000), (8000, 16000), (16000, 44100), (3, 2), (11025, 8000)])
@pytest.mark.parametrize("n", [1, 5, 999, 3001, 20000])
def test_resampling_in_blocks_is_torchaudios_of_the_whole(monkeypatch, old, new, n):
    from torchaudio.functional import resample

    monkeypatch.setattr(reading, "BLOCK", 3000)
    wave = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    blocks = (wave[i : i + 700] for i in range(0, n, 700))
    ours = np.concatenate([np.empty(0), *resampled(blocks, old, new, "x")])
    np.testing.assert_allclose(ours, resample(torch.from_numpy(wave), old, new).numpy(), rtol=0, atol=1e-5)


def test_rates_that_have_nothing_in_common(put, tone, heard):
    with pytest.raises(InputError, match=r"odd\.wav: 44101 Hz cannot be brought to 16000 Hz.*convert it"):
        heard(put("odd.wav", tone(0.1, 44101), 44101), 16000)


def test_one_sample(put, heard):
    assert len(heard(put("one.wav", np.array([0.25])), RATE)) == 1


def test_a_long_file_is_read_in_blocks(put, tone, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 1000)
    wave = tone(5, RATE)
    blocks = list(samples(inspect(put("long.wav", wave)), RATE))
    assert max(map(len, blocks)) == 1000
    np.testing.assert_allclose(np.concatenate(blocks), wave, atol=4e-5)


def test_files_that_cannot_be_read(put, tone, heard, tmp_path):
    for name, content, message in (
        ("empty.wav", b"", "an empty file, of no bytes"),
        ("noise.wav", bytes(range(200)), "cannot be read as sound"),
        ("song.m4a", b"\0\0\0 ftypM4A ", r"m4a files cannot be read; convert it first.*ffmpeg -i song\.m4a song\.flac"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: {message}"):
            inspect(tmp_path / name)
    with pytest.raises(InputError, match=r"none\.wav: no such file"):
        inspect(tmp_path / "none.wav")
    cut = put("cut.flac", tone(3, 8000), 8000)
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cut\.flac: "):
        heard(cut, 8000)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_numbers(put, tone, heard, bad):
    wave = tone(1, RATE)
    wave[1500] = bad
    with pytest.raises(InputError, match=r"nan\.wav: the sample at 0\.750 s is no finite number"):
        heard(put("nan.wav", wave, subtype="FLOAT"), RATE)
    assert soundfile.info(put("ok.wav", tone(1, RATE))).frames == RATE
