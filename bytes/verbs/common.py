"""What the verbs share: the model of a run folder, and the report on documents."""

from pathlib import Path
from typing import Any

from ...core.config import ComputeConfig
from ...core.files import write_json
from ...core.train import autocast, pick_device
from ..documents import Documents
from ..evaluation import CHUNK, Score, check_causality, order0_bits_per_byte, score, xz_bits_per_byte
from ..model import ByteLM
from ..plots import plot_positions
from ..terminal import progress_bar


def load_model(run: Path, compute: ComputeConfig) -> ByteLM:
    return ByteLM.from_pretrained(run).to(pick_device(compute))


def load_causal_model(run: Path, compute: ComputeConfig) -> ByteLM:
    """A model to be measured. Raises InputError if it sees the future."""
    model = load_model(run, compute)
    with autocast(compute):
        check_causality(model)
    return model


def measure(model: ByteLM, documents: Documents, compute: ComputeConfig, work: str, chunk: int = CHUNK) -> Score:
    """`score` in the precision asked for, under a progress bar that `work` names."""
    with autocast(compute), progress_bar(work, documents.n_bytes) as advance:
        return score(model, documents, chunk=chunk, advance=advance)


def report(folder: Path | None, result: Score, documents: Documents) -> None:
    """Figures on stdout; with a folder also metrics.json and positions.png in it."""
    with progress_bar("xz", documents.n_bytes) as advance:
        xz = xz_bits_per_byte(documents, advance=advance)
    order0 = order0_bits_per_byte(documents)
    metrics: dict[str, Any] = {
        "bits_per_byte": result.bits_per_byte,
        "order0_bits_per_byte": order0,
        "xz_bits_per_byte": xz,
        "word_perplexity": result.word_perplexity if result.word_perplexity < float("inf") else None,
        "documents": result.n_documents,
        "bytes": result.n_bytes,
        "words": result.n_words,
    }
    if folder is not None:
        write_json(folder / "metrics.json", {**metrics, "by_position": result.by_position()})
        plot_positions(folder / "positions.png", result, order0, xz)
    for name, value in metrics.items():
        print(f"{name:<22}{_text(value):>16}")


def _text(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value:,}"
    return f"{value:.4f}" if value < 1e6 else f"{value:.4g}"  # text without spaces is one long word
