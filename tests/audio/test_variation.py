"""Recordings varied for the training of classifiers."""

import numpy as np
import pytest

from polymamba.audio import variation
from polymamba.audio.variation import varied

RATE = 8000


def tone(n: int, hertz: float) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(n) / RATE)


@pytest.mark.parametrize("n", [1, 2, 7, 4001])
def test_is_finite_at_any_length_and_near_it(n):
    for seed in range(20):
        wave = varied(tone(n, 300.0), np.random.default_rng(seed))
        assert np.isfinite(wave).all()
        assert n / variation.SPEED - 1 <= len(wave) <= n * variation.SPEED + 1


def test_same_random_numbers_same_result_and_input_unchanged():
    wave = tone(1000, 300.0)
    before = wave.copy()
    a, b, c = (varied(wave, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a, b)
    assert np.array_equal(wave, before)
    assert len(a) != len(c) or not np.array_equal(a, c)


def test_speed_moves_a_tone_by_at_most_a_third(monkeypatch):
    monkeypatch.setattr(variation, "BAND", 0.0)
    n, heard = 4000, []
    for seed in range(30):
        wave = varied(tone(n, 500.0), np.random.default_rng(seed))
        spectrum = np.abs(np.fft.rfft(wave, 8 * n))
        heard.append(spectrum.argmax() * RATE / (8 * n))
    assert min(heard) > 500 / variation.SPEED - 10
    assert max(heard) < 500 * variation.SPEED + 10
    assert min(heard) < 430
    assert max(heard) > 580
