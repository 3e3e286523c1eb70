"""Sounds in files, and small models of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from polymamba.audio import AudioConfig, AudioModel, UNetConfig
from polymamba.audio.reading import inspect, samples

RATE = 2000
TINY = UNetConfig(d_model=6, n_blocks=1, pool=(2, 3), d_state=3)


def _tone(seconds: float, rate: int, hertz: float = 200, loudness: float = 0.5) -> np.ndarray:
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def tone() -> Callable[..., np.ndarray]:
    """(seconds, rate, hertz=200, loudness=0.5) -> a sine."""
    return _tone


@pytest.fixture
def heard() -> Callable[..., np.ndarray]:
    """(path, rate) -> a whole file's samples, mono, as the package reads them block by block."""

    def hear(path: str | Path, rate: int) -> np.ndarray:
        return np.concatenate([np.empty(0, np.float32), *samples(inspect(Path(path)), rate)])

    return hear


@pytest.fixture
def put(tmp_path) -> Callable[..., Path]:
    """Write a sound to a file below tmp_path."""

    def write(name: str, wave: np.ndarray, rate: int = RATE, **options) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, rate, **options)
        return path

    return write


@pytest.fixture
def model() -> AudioModel:
    torch.manual_seed(0)
    model = AudioModel(AudioConfig(unet=TINY, sample_rate=RATE, labels=("hi", "lo"))).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


@pytest.fixture
def run(model, tmp_path) -> Path:
    """A folder with that model."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Two kinds of short sounds, a folder for each: high and low tones of many lengths and loudnesses."""
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for kind, hertz in (("hi", 400), ("lo", 90)):
        (folder / kind).mkdir()
        for i in range(14):
            wave = _tone(rng.uniform(0.1, 0.3), RATE, hertz * rng.uniform(0.9, 1.1), rng.uniform(0.1, 0.7))
            soundfile.write(folder / kind / f"{i}.wav", wave, RATE)
    return folder
