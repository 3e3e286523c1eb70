"""What the verbs share: the model of a run folder, and the report on documents."""

from pathlib import Path
from typing import Any

from ...core.config import ComputeConfig
from ...core.device import autocast, pick_device
from ...core.files import write_json
from ...core.routing import LayerRouting, recorded_routing, write_routing
from ...core.routing_plot import plot_routing
from ...core.terminal import progress_bar
from ..config import name_of
from ..documents import Documents
from ..evaluation import CHUNK, Score, check_causality, order0_bits_per_byte, score, xz_bits_per_byte
from ..model import ByteLM
from ..plots import plot_positions


def load_model(run: Path, compute: ComputeConfig) -> ByteLM:
    return ByteLM.from_pretrained(run).to(pick_device(compute))


def load_causal_model(run: Path, compute: ComputeConfig) -> ByteLM:
    """A model to be measured. Raises InputError if it sees the future."""
    model = load_model(run, compute)
    with autocast(compute):
        check_causality(model)
    return model


def measure_routing(
    model: ByteLM, documents: Documents, compute: ComputeConfig, work: str, chunk: int = CHUNK
) -> tuple[Score, list[LayerRouting]]:
    """`measure`, and how the model's mixtures of experts, if it has any, routed the bytes meanwhile."""
    with recorded_routing(model) as routing:
        result = measure(model, documents, compute, work, chunk)
    return result, routing.layers


def measure(model: ByteLM, documents: Documents, compute: ComputeConfig, work: str, chunk: int = CHUNK) -> Score:
    """`score` in the precision asked for, under a progress bar that `work` names."""
    with autocast(compute), progress_bar(work, documents.n_bytes, "bytes") as advance:
        return score(model, documents, chunk=chunk, advance=advance)


def report(folder: Path | None, result: Score, documents: Documents, routing: list[LayerRouting]) -> None:
    """Figures on stdout; with a folder also metrics.json and positions.png in it, and what became of `routing`."""
    with progress_bar("xz", documents.n_bytes, "bytes") as advance:
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
        summaries = {"routing": [layer.summary() for layer in routing]} if routing else {}
        write_json(folder / "metrics.json", {**metrics, "by_position": result.by_position(), **summaries})
        plot_positions(folder / "positions.png", result, order0, xz)
        if routing:
            write_routing(folder / "routing.tsv", folder / "routing_bytes.tsv", routing, name_of)
            plot_routing(folder / "routing.png", routing, name_of)
    for name, value in metrics.items():
        print(f"{name:<22}{_text(value):>16}")
    if routing:
        least = min(layer.share.min() / layer.even_share for layer in routing)
        print(f"{'least_used_expert':<22}{f'{least:.2f} of even':>16}")


def _text(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "-" if value is None else f"{value:,}"
    return f"{value:.4f}" if value < 1e6 else f"{value:.4g}"  # text without spaces is one long word
