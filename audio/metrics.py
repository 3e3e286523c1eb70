"""How near generated sounds are to recorded ones, as sets.

    frechet   |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) of embeddings: 0 for equal means and covariances
              (FID, arXiv 1706.08500; of sound FAD, arXiv 1812.08466)
    IS        exp E KL(p(y|x) | p(y))                                        inception score, arXiv 1606.03498
    mIS       exp E KL(p(y|x1) | p(y|x2)) over random pairs                  modified IS, arXiv 1708.03088
    AM        KL(p_train(y) | p(y)) + E H(p(y|x)): less is better            activation maximisation, arXiv 1703.02000

p(y|x) is a classifier's. All depend on the classifier, and the Frechet distance on the number of sounds too (few make
it larger): compare only what was measured alike. Letters: n sounds, K labels, D embedding.
"""

import numpy as np

KEPT = (0.05, 0.6)  # of the official protocol's sounds, by likelihood: the likeliest 5 % and the least likely 40 % go


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Of embeddings (n, D) and (m, D); ValueError for fewer than 2 of either."""
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} embeddings; a covariance needs 2 at least")
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    mean = float(np.sum((a.mean(0) - b.mean(0)) ** 2))
    return max(0.0, mean + float(np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def inception_score(p: np.ndarray) -> float:
    """Of probabilities (n, K)."""
    return float(np.exp(np.sum(p * (_log(p) - _log(p.mean(0))), axis=1).mean()))


def modified_inception_score(p: np.ndarray, seed: int = 0, pairs: int = 10_000) -> float:
    """Of probabilities (n, K): exp of the mean divergence of one sound's from another's, over random pairs."""
    rng = np.random.default_rng(seed)
    one, other = p[rng.integers(len(p), size=pairs)], p[rng.integers(len(p), size=pairs)]
    return float(np.exp(np.sum(one * (_log(one) - _log(other)), axis=1).mean()))


def am_score(p: np.ndarray, of_training: np.ndarray) -> float:
    """Of probabilities (n, K), and those (m, K) of the training set."""
    train, mean = of_training.mean(0), p.mean(0)
    return float(np.sum(train * (_log(train) - _log(mean))) - np.sum(p * _log(p), axis=1).mean())


def of_middling_likelihood(bits_per_sample: np.ndarray) -> np.ndarray:
    """Which of n sounds, bool (n,), SaShiMi's protocol scores: neither the likeliest nor the least likely."""
    rank = np.empty(len(bits_per_sample), int)
    rank[np.argsort(bits_per_sample, kind="stable")] = np.arange(len(bits_per_sample))
    return (rank >= KEPT[0] * len(rank)) & (rank < KEPT[1] * len(rank))


def mel_embedding(wave: np.ndarray, rate: int) -> np.ndarray:
    """Mean and deviation over time of the log energies of 32 mel bands, float32 (64,): no model's, always at hand."""
    from scipy.signal import ShortTimeFFT
    from scipy.signal.windows import hann

    width = max(64, 1 << round(np.log2(0.032 * rate)))
    wave = np.pad(wave.astype(np.float64), (0, max(0, 2 * width - len(wave))))
    transform = ShortTimeFFT(hann(width), width // 2, rate, scale_to="magnitude")
    power = np.abs(transform.stft(wave)) ** 2  # (bins, frames)
    mel = 2595 * np.log10(1 + transform.f / 700)
    edges = np.linspace(0, mel[-1], 34)
    distance = np.minimum((mel - edges[:-2, None]), (edges[2:, None] - mel)) / (edges[1] - edges[0])
    bands = np.log(np.maximum(distance, 0) @ power + 1e-8)
    return np.concatenate((bands.mean(1), bands.std(1))).astype(np.float32)


def _log(p: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(p, 1e-12))
