"""`polymamba bytes eval` and `noise`: how well does a model predict files, and what do noises make of that?"""

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder, require_writable, save_tsv, written_whole
from ...core.terminal import say
from ..commands import Eval, Noise
from ..documents import Documents, find_files, whole_files
from ..evaluation import perplexity
from ..model import ByteLM
from ..noise import TABLE, spoil
from .common import load_causal_model, measure, measure_routing, report


def evaluate(args: Eval) -> None:
    """Measure a model on files."""
    if args.output is not None:
        require_new_folder(args.output)
    documents = _documents(args.files)
    model = load_causal_model(args.run, args.compute)
    result, routing = measure_routing(model, documents, args.compute, "eval", args.chunk)
    if args.output is None:
        report(None, result, documents, routing)
        return
    with new_folder(args.output) as beside:
        report(beside, result, documents, routing)


def noise(args: Noise) -> None:
    """A line for the files as they are, then one for each noise, as soon as it is known."""
    if args.output is not None:
        require_writable(args.output)
    documents = _documents(args.files)
    model = load_causal_model(args.run, args.compute)
    rows: list[list[str]] = []
    for row in _noise_rows(model, documents, args):
        rows.append(row)
        print("\t".join(row), flush=True)
    if args.output is not None:
        save_tsv(args.output, rows[0], rows[1:])


def _noise_rows(model: ByteLM, documents: Documents, args: Noise) -> Iterator[list[str]]:
    """Bits are those of the spoiled bytes; perplexities are all per word of the clean text, as in the paper."""
    yield ["noise", "probability", "bytes", "bits_per_byte", "word_perplexity", "increase"]
    clean = measure(model, documents, args.compute, "clean", args.chunk)
    yield ["none", "0", str(clean.n_bytes), f"{clean.bits_per_byte:.4f}", _said(clean.word_perplexity), "0"]
    for kind in TABLE:
        with TemporaryDirectory() as folder:
            spoiled = []
            for i, document in enumerate(documents.documents):
                path = Path(folder, str(i))
                with written_whole(path) as beside:
                    beside.write_bytes(spoil(document.path.read_bytes(), kind, args.compute.seed))
                spoiled.append(path)
            if not any(path.stat().st_size for path in spoiled):
                raise InputError(f"{kind}: nothing is left of {clean.n_bytes} bytes; give longer files")
            result = measure(model, Documents(whole_files(spoiled)), args.compute, str(kind), args.chunk)
        of_words = perplexity(result.bits, clean.n_words)
        yield [
            *(kind.name, f"{kind.probability:g}", str(result.n_bytes), f"{result.bits_per_byte:.4f}"),
            *(_said(of_words), _said(of_words - clean.word_perplexity)),
        ]


def _said(word_perplexity: float) -> str:
    """Bytes with hardly a word among them have none that is finite."""
    return f"{word_perplexity:.4g}" if math.isfinite(word_perplexity) else "-"


def _documents(words: tuple[Path, ...]) -> Documents:
    files = find_files(words)
    documents = whole_files(files)
    if len(documents) < len(files):
        say(f"{len(files) - len(documents)} empty files passed over")
    return Documents(documents)
