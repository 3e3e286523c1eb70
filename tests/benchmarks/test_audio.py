"""The benchmark's training: what is compared is one and the same model."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_all_kernels_have_the_loss_of_one_model(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    spec = importlib.util.spec_from_file_location("benchmarks_audio", FOLDER / "audio.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = [
        dict(zip(benchmark.TRAINING_HEADS, row, strict=True)) for row in benchmark.trainings("tiny", "cpu", 2, 32, 16)
    ]
    whole, crops = rows[:2], rows[2:]
    assert [row["batch"] for row in rows] == ["2 x 32"] * 2 + ["2 x 16"] * 3
    losses = [float(row["loss before the first"]) for row in crops]
    assert max(losses) - min(losses) < 2e-5
    assert abs(losses[0] - float(whole[1]["loss before the first"])) > 1e-3  # other codes, so another loss
