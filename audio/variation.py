"""A recording as another voice, microphone and room might have made it: for training classifiers.

Speed perturbation (Ko et al. 2015, for voices and tempi), a random equaliser with a band left out and a stretch left
silent (as SpecAugment's masks, arXiv 1904.08779, on the waveform), loudness and noise.
"""

import numpy as np

SPEED = 1.33  # at most so many times as fast, or as slow; pitch and formants with it
KNOTS, DECIBELS = 8, 6.0  # of the equaliser, evenly over the spectrum; their standard deviation
BAND, STRETCH = 0.2, 0.15  # largest share of the spectrum that is left out, and of the time that is silent
GAIN = 12.0  # dB, up or down
NOISE = (-4.0, -2.0)  # powers of ten: RMS, full scale being 1


def varied(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """wave float (L,), in [-1, 1] -> float (about L, at most SPEED times); what is outside [-1, 1] is to be clipped."""
    n = max(1, round(len(wave) * SPEED ** rng.uniform(-1, 1)))
    wave = np.interp(np.linspace(0, len(wave) - 1, n), np.arange(len(wave)), wave)
    spectrum = np.fft.rfft(wave)
    at = np.linspace(0, 1, len(spectrum))
    gain = 10 ** (np.interp(at * (KNOTS - 1), np.arange(KNOTS), rng.normal(0, DECIBELS, KNOTS)) / 20)
    gain[np.abs(at - rng.uniform()) < rng.uniform(0, BAND / 2)] = 0
    wave = np.fft.irfft(spectrum * gain, n)
    first = rng.integers(n)
    wave[first : first + int(n * rng.uniform(0, STRETCH))] = 0
    wave *= 10 ** (rng.uniform(-GAIN, GAIN) / 20)
    return wave + rng.standard_normal(n) * 10 ** rng.uniform(*NOISE)
