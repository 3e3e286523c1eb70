"""Language models on the command line: a genome, runs of `pretrain` on it to be read only, what tests share."""

from pathlib import Path

import numpy as np
import pytest
import torch

from polymamba.cli import main


@pytest.fixture(scope="session")
def sequences() -> dict[str, str]:
    """Of an order-2 process, which is soon learned."""
    rng = np.random.default_rng(3)
    likely = rng.dirichlet([0.3] * 4, 16).cumsum(1)
    found = {}
    for name, n in (("chr1", 1500), ("chr2", 700), ("chr3", 500)):
        letters = [0, 1]
        for u in rng.random(n - 2):
            letters.append(int(np.searchsorted(likely[4 * letters[-2] + letters[-1]], u * 0.999)))
        found[name] = "".join("ACGT"[i] for i in letters)
    found["chr1"] = found["chr1"][:1000] + "N" * 100 + found["chr1"][1100:1300] + found["chr1"][1300:].lower()
    return found


@pytest.fixture(scope="session")
def genome(sequences, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text("".join(f">{name} x\n{text}\n" for name, text in sequences.items()))
    return path


@pytest.fixture(scope="session")
def flags(genome) -> list[str]:
    """Of a pretraining that takes a second."""
    training = ["--length", "32", "--batch-size", "16", "--epochs", "3", "--lr", "1e-2", "--save-every", "2"]
    return [str(genome), "--valid-chromosomes", "2", "--test-chromosomes", "3", *training, "--device", "cpu"]


@pytest.fixture(scope="session")
def run(flags, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "causal"
    more = ["--first-length", "16", "--rc-augment", "--lower-case-weight", "0.5"]
    assert main(["genomics", "pretrain", *flags, *more, "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def masked_run(flags, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "masked"
    assert main(["genomics", "pretrain", *flags, "--objective", "masked", "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def log_p():
    """Of a model and a sequence of its tokens: the log-probabilities (L, vocabulary) of the token after each."""

    def found(model, inputs: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([inputs]))[0].double().log_softmax(-1).numpy()

    return found
