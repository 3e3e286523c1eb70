"""`polymamba genomics predict` and `embed`: a model over sequence files, in their order, in bounded memory."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

import numpy as np

from ...core.device import autocast
from ...core.embeddings import require_embeddings_file, write_embeddings
from ...core.errors import InputError
from ...core.files import require_writable, write_tsv, written_whole
from ...core.terminal import progress_bar, say
from ..commands import Embed, Predict
from ..config import DNAClassifierConfig
from ..inference import embed as embed_sequences
from ..inference import embed_in_record
from ..model import DNAClassifier
from ..pieces import Piece, Pieces, in_chunks
from ..reading.files import files_of
from ..reading.source import opened
from ..tracks import Predicted, write_bed, write_bedgraph
from .common import decisions, load_embedder, load_models, mean_predictions, passes, table_rows, tuned_thresholds


def predict(args: Predict) -> None:
    """Predict for every record or window: a table, or a track along the records."""
    suffix = ".tsv" if args.output is None else args.output.suffix.lower()
    if suffix not in (".tsv", ".bed", ".bedgraph"):
        raise InputError(f"{args.output}: name it .tsv, .bed or .bedgraph, which says what is written")
    if args.output is not None:
        require_writable(args.output)
    models = load_models([args.run, *args.ensemble], args.compute)
    config = models[0].config
    thresholds = tuned_thresholds(args, config) if args.tuned_threshold else None
    with _checked_pieces(args, config, unique_names=suffix != ".tsv") as pieces:
        predicted = _predicted(models, pieces, args, thresholds)
        if args.output is None:
            _write_table(sys.stdout, predicted, pieces, config)
            return
        with written_whole(args.output) as beside, beside.open("w", encoding="utf-8", newline="") as file:
            if suffix == ".bed":
                write_bed(file, predicted, config)
            elif suffix == ".bedgraph":
                write_bedgraph(file, predicted, config, beside.parent)
            else:
                _write_table(file, predicted, pieces, config)


def embed(args: Embed) -> None:
    """Write the embedding of every record or window."""
    require_embeddings_file(args.output)
    model = load_embedder(args.run, args.compute)
    if args.in_record and model.place is not None:
        raise InputError(f"--in-record: {args.run} is told where in a window a base stands; leave the flag out")
    if (args.overlap is not None or args.one_shot) and not model.config.backbone.bidirectional:
        flag = "overlap" if args.overlap is not None else "one-shot"
        raise InputError(f"--{flag} is of models that see both ways; {args.run} carries its state, leave it out")
    with _checked_pieces(args, model.config) as pieces:
        shape = pieces.count, model.config.backbone.d_model
        embedded = _embedded_in_records if args.in_record else _embedded
        write_embeddings(args.output, _columns(pieces), shape, embedded(model, pieces, args))


@contextmanager
def _checked_pieces(
    args: Predict | Embed, config: DNAClassifierConfig, *, unique_names: bool = False
) -> Iterator[Pieces]:
    """Every record, or every window of it that is not mostly N. `unique_names` as for Pieces.check."""
    window = args.window or config.window
    if args.stride is not None and window is None:
        raise InputError("--stride says how far apart windows are; give --window too")
    with ExitStack() as stack:
        files = [stack.enter_context(opened(path)) for path in files_of(args.fasta)]
        pieces = Pieces(files, window=window, stride=args.stride, max_n=args.max_n, hard_mask=config.hard_mask)
        pieces.check(args.max_tokens, unique_names=unique_names)
        if not pieces.count:
            left_out = f"{pieces.n_left_out} windows are mostly N"
            raise InputError(f"nothing is left of {' '.join(args.fasta)}: {left_out}; see --max-n")
        if pieces.n_left_out:
            say(f"{pieces.n_left_out} windows left out: more than {args.max_n:.0%} of their bases are N")
        yield pieces


def _predicted(
    models: list[DNAClassifier], pieces: Pieces, args: Predict, thresholds: np.ndarray | None
) -> Iterator[Predicted]:
    config = models[0].config
    with progress_bar("predict", pieces.n_bases * passes(args), "bases") as advance:
        for chunk in in_chunks(pieces, args.batch_size, args.max_tokens):
            predictions = mean_predictions(models, [piece.tokens for piece in chunk], args, advance)
            labels = decisions(predictions, config.classes, config.target, thresholds)
            yield from zip(chunk, labels, predictions, strict=True)


def _embedded(model: DNAClassifier, pieces: Pieces, args: Embed) -> Iterator[tuple[list[tuple], np.ndarray]]:
    with progress_bar("embed", pieces.n_bases, "bases") as advance:
        for chunk in in_chunks(pieces, args.batch_size, args.max_tokens):
            tokens = [piece.tokens for piece in chunk]
            with autocast(args.compute):
                embeddings = embed_sequences(model, tokens, args.batch_size, args.max_tokens, advance=advance)
            yield [_where(piece, pieces) for piece in chunk], embeddings


def _embedded_in_records(model: DNAClassifier, pieces: Pieces, args: Embed) -> Iterator[tuple[list[tuple], np.ndarray]]:
    if pieces.window is None:
        raise InputError("--in-record: no window to see in its record; give --window")
    overlap = pieces.window if args.overlap is None else args.overlap
    if model.config.backbone.bidirectional:
        say(f"windows of {pieces.window} bases, with {overlap // 2} and {overlap - overlap // 2} more beside them")
    differences: list[float] = []
    with progress_bar("embed", pieces.n_bases, "bases") as advance, autocast(args.compute):
        for record, windows in pieces.by_record():
            if not windows:
                continue
            spans = [(piece.start, piece.end) for piece in windows]
            sizes: Any = {"window": pieces.window, "overlap": overlap, "max_tokens": args.max_tokens}
            whole: Any = {"window": len(record), "overlap": 0, "max_tokens": len(record)}
            in_one = np.concatenate(list(embed_in_record(model, record, spans, **whole))) if args.one_shot else None
            done = 0
            for embeddings in embed_in_record(model, record, spans, **sizes, advance=advance):
                upto = done + len(embeddings)
                yield [_where(piece, pieces) for piece in windows[done:upto]], embeddings
                if in_one is not None:
                    ours = in_one[done:upto]
                    differences += (np.linalg.norm(embeddings - ours, axis=1) / np.linalg.norm(ours, axis=1)).tolist()
                done = upto
    if differences:
        how_far = f"{np.mean(differences):.2%} of their length in the mean, {max(differences):.2%} at most"
        say(f"the windows' embeddings are off those of the records in one piece by {how_far}")


def _write_table(file: TextIO, predicted: Iterator[Predicted], pieces: Pieces, config: DNAClassifierConfig) -> None:
    header = [*_columns(pieces), *(["value"] if config.target == "regression" else ["label", *config.classes])]
    rows = ((*_where(piece, pieces), label, row) for piece, label, row in predicted)
    write_tsv(file, header, table_rows(rows, config.target))


def _columns(pieces: Pieces) -> dict[str, type]:
    """The columns that say what a row is about, and their types."""
    return {"id": str} if pieces.window is None else {"id": str, "start": int, "end": int}


def _where(piece: Piece, pieces: Pieces) -> tuple:
    return (piece.name,) if pieces.window is None else (piece.name, piece.start, piece.end)
