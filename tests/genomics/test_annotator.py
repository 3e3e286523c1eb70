"""The model of single bases, along a chromosome, and as regions."""

import io

import numpy as np
import pytest
import torch

from polymamba.core import BackboneConfig
from polymamba.genomics import DNAAnnotator, DNAAnnotatorConfig
from polymamba.genomics.along import Along, along
from polymamba.genomics.alphabet import PAD, A, T, reverse_complement
from polymamba.genomics.runs_track import RunsTrack

CLASSES = ("none", "x(+)", "x(-)")


def model(mixer: str, **options) -> DNAAnnotator:
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=8, n_layer=2, d_state=4, pattern=(mixer,))
    made = DNAAnnotator(DNAAnnotatorConfig(backbone=backbone, classes=CLASSES, stranded=True, **options))
    return made.double().eval()


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(A, T + 1, n, dtype=np.uint8)


def logits(annotator: DNAAnnotator, bases: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return annotator(torch.from_numpy(bases.astype(np.int64))[None])[0]


def test_the_other_strand_is_annotated_backwards():
    annotator, bases = model("bimamba", both_strands=True), tokens(37)
    here, there = logits(annotator, bases), logits(annotator, reverse_complement(bases))
    torch.testing.assert_close(there.flip(0)[:, [0, 2, 1]], here, atol=1e-12, rtol=0)
    assert (here[:, 1] - here[:, 2]).abs().max() > 1e-3


@pytest.mark.parametrize("both", [False, True])
def test_padding_changes_nothing(both):
    annotator, bases = model("bimamba", both_strands=both), tokens(21)
    padded = torch.full((2, 30), PAD)
    padded[0, :21] = torch.from_numpy(bases.astype(np.int64))
    padded[1] = torch.from_numpy(tokens(30, 1).astype(np.int64))
    with torch.no_grad():
        found = annotator(padded, padded != PAD)[0, :21]
    torch.testing.assert_close(found, logits(annotator, bases), atol=1e-12, rtol=0)


def run_along(annotator: DNAAnnotator, bases: np.ndarray, start: int, end: int, **options) -> torch.Tensor:
    carried = None if annotator.config.backbone.bidirectional else annotator.carried
    pieces = list(along(Along(annotator, carried, torch.device("cpu")), lambda i, j: bases[i:j], start, end, **options))
    assert [at for at, _ in pieces] == list(np.cumsum([start] + [len(piece) for _, piece in pieces[:-1]]))
    return torch.cat([piece for _, piece in pieces])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_causal_model_carries_its_state(size):
    annotator, bases = model("mamba"), tokens(50)
    found = run_along(annotator, bases, 3, 50, window=9, overlap=4, max_tokens=size)
    torch.testing.assert_close(found, logits(annotator, bases[3:]).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("window", "overlap", "max_tokens"), [(10, 4, 1), (10, 3, 35), (7, 6, 50), (47, 0, 1), (60, 8, 1)]
)
def test_windows_overlap(window, overlap, max_tokens):
    annotator, bases = model("bimamba"), tokens(50)
    found = run_along(annotator, bases, 3, 50, window=window, overlap=overlap, max_tokens=max_tokens)
    inner = window - overlap
    for left in range(3, 50, inner):
        right = min(50, left + inner)
        first, last = max(3, left - overlap // 2), min(50, right + overlap - overlap // 2)
        expected = logits(annotator, bases[first:last])[left - first : right - first]
        torch.testing.assert_close(found[left - 3 : right - 3], expected.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("target", ["multiclass", "multilabel"])
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 13, 2, 18]])
def test_runs(target, sizes):
    backbone = BackboneConfig(d_model=8, n_layer=1, pattern=("bimamba",))
    config = DNAAnnotatorConfig(backbone=backbone, classes=CLASSES, target=target, stranded=True)
    rng = np.random.default_rng(len(sizes))
    p = np.repeat(rng.dirichlet([0.3] * 3, 20), 2, axis=0) if target == "multiclass" else rng.random((40, 3)).round()
    p[[5, 6]] = np.nan
    file, at, pieces = io.StringIO(), 0, []
    for n in sizes:
        pieces.append((at, p[at : at + n]))
        at += n
    RunsTrack(file, config).write("c", pieces)
    found = np.zeros((40, 3), dtype=bool)
    rows = [line.split("\t") for line in file.getvalue().splitlines()]
    for name, start, end, label, score, strand in rows:
        k = CLASSES.index(f"{label}({strand})" if strand != "." else label)
        assert name == "c"
        assert not found[max(0, int(start) - 1) : int(end), k].any()  # neither twice nor in two pieces
        found[int(start) : int(end), k] = True
        assert int(score) == pytest.approx(1000 * p[int(start) : int(end), k].mean(), abs=0.51)
    known = ~np.isnan(p[:, :1])
    p = np.nan_to_num(p)
    expected = p >= 0.5
    if target == "multiclass":
        expected = p.argmax(1)[:, None] == np.arange(3)
        expected[:, 0] = False
    np.testing.assert_array_equal(found, expected & known)


def test_configuration():
    with pytest.raises(ValueError, match="backbones that see both ways"):
        model("mamba", both_strands=True)
    assert model("mamba").config.other_strand == [0, 2, 1]
