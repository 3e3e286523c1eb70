"""Figures of generated sets against their formulas, and the verb that prints them."""

import json

import numpy as np
import pytest
from scipy.linalg import sqrtm

from polymamba.audio.metrics import (
    am_score,
    frechet,
    inception_score,
    mel_embedding,
    modified_inception_score,
    of_middling_likelihood,
)
from polymamba.cli import main


def test_frechet_is_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4)), rng.standard_normal((30, 4)) + 0.5
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(a, a) < 1e-9
    assert frechet(a[:, :1], a[:, :1] + 3) == pytest.approx(9)
    assert frechet(a[:3], b) >= 0  # fewer sounds than dimensions
    with pytest.raises(ValueError, match="1 and 30 embeddings"):
        frechet(a[:1], b)


def test_scores_of_sure_and_unsure_classifiers():
    sure, unsure = np.eye(4)[np.arange(40) % 4], np.full((40, 4), 0.25)
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(unsure) == pytest.approx(1)
    assert modified_inception_score(unsure) == pytest.approx(1)
    assert modified_inception_score(sure) > 1e6
    assert am_score(sure, sure) == pytest.approx(0, abs=1e-9)
    assert am_score(unsure, sure) == pytest.approx(np.log(4))
    one = np.eye(4)[np.zeros(40, int)]  # sure, and always of the same
    assert inception_score(one) == pytest.approx(1)
    assert am_score(one, sure) > 5


def test_middling_likelihood():
    bits = np.random.default_rng(0).permutation(100).astype(float)
    kept = of_middling_likelihood(bits)
    assert sorted(bits[kept]) == list(range(5, 60))


def test_mel_embedding_tells_pitch_and_takes_any_length(tone):
    low, high, short = (mel_embedding(tone(s, 8000, hz), 8000) for s, hz in ((0.5, 200), (0.5, 2000), (0.001, 200)))
    assert low.shape == high.shape == short.shape == (64,)
    assert low[:32].argmax() < high[:32].argmax()
    assert np.isfinite(short).all()
    assert np.isfinite(mel_embedding(np.zeros(100), 16000)).all()


def test_eval(run, digits, tmp_path, capsys):
    quick = ["--epochs", "2", "--batch-size", "8", "--context", "600", "--device", "cpu"]
    judge = tmp_path / "judge"
    assert main(["audio", "train", str(digits), "-o", str(judge), "--classifier", *quick]) == 0
    capsys.readouterr()
    words = ["audio", "eval", str(run), str(digits), "--n", "10", "--seconds", "0.1", "--classifier", str(judge)]
    assert main([*words, "-o", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bits_per_sample\t")
    assert lines[1].split("\t") == ["sounds", "n", "FAD_mel", "FID", "IS", "mIS", "AM", "recognised"]
    assert [line.split("\t")[:2] for line in lines[2:]] == [
        ["one half of the files against the other", "14"],
        ["made", "10"],
        ["made, of middling likelihood", "5"],
    ]
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["protocol"]["made"] == "10 sounds of 200 samples, seed 0"
    assert len(result["protocol"]["classifier"]["sha256"]) == 64
    assert 0 <= result["rows"][1]["recognised"] <= 1
    assert (tmp_path / "out" / "made.png").exists()
    assert main([*words[:4], "--n", "2"]) == 1
    assert "sets of fewer than 4 sounds" in capsys.readouterr().err
