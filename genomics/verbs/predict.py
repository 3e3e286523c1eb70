"""`polymamba genomics predict` and `embed`: a model over sequence files, in their order."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ...core.errors import InputError
from ...core.files import require_writable, written_whole
from ...core.terminal import say
from ...core.train import autocast
from ..commands import Embed, Predict
from ..inference import embed as embed_sequences
from ..model import DNAClassifier
from ..sources import records_of, tokens_of
from ..tracks import Piece, write_bed, write_bedgraph
from ..windows import share_of_n, windows_of
from .common import decisions, load_models, mean_predictions, save_tsv, table_rows, tuned_thresholds, write_tsv


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
    pieces, windowed = _pieces(args, models[0], along_records=suffix != ".tsv")
    predictions = mean_predictions(models, [piece.tokens for piece in pieces], args, "predict")
    labels = decisions(predictions, config.classes, config.target, thresholds)

    def write(file: TextIO) -> None:
        if suffix == ".bed":
            write_bed(file, pieces, labels, predictions, config)
        elif suffix == ".bedgraph":
            write_bedgraph(file, pieces, predictions, config)
        else:
            where = _where(pieces, windowed)
            header = [*where, *(["value"] if config.target == "regression" else ["label", *config.classes])]
            rows = zip(*where.values(), labels, predictions, strict=True)
            write_tsv(file, header, table_rows(rows, config.target))

    if args.output is None:
        write(sys.stdout)
        return
    with written_whole(args.output) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        write(file)


def embed(args: Embed) -> None:
    """Write the embedding of every record or window."""
    suffix = args.output.suffix.lower()
    if suffix not in (".npy", ".parquet"):
        raise InputError(f"{args.output}: name it .npy or .parquet, which says what is written")
    require_writable(args.output)
    model = load_models([args.run], args.compute)[0]
    pieces, windowed = _pieces(args, model)
    with autocast(args.compute):
        tokens = [piece.tokens for piece in pieces]
        embeddings = embed_sequences(model, tokens, args.batch_size, args.max_tokens, progress="embed")
    where = _where(pieces, windowed)
    if suffix == ".npy":
        with written_whole(args.output) as beside, beside.open("wb") as file:
            np.save(file, embeddings)
        save_tsv(args.output.with_suffix(".ids.tsv"), list(where), zip(*where.values(), strict=True))
    else:
        _write_parquet(args.output, where, embeddings)


def _where(pieces: Sequence[Piece], windowed: bool) -> dict[str, list[Any]]:
    """The columns that say what a row is about."""
    where: dict[str, list[Any]] = {"id": [p.name for p in pieces]}
    return where | ({"start": [p.start for p in pieces], "end": [p.end for p in pieces]} if windowed else {})


def _write_parquet(path: Path, where: dict[str, list], embeddings: np.ndarray) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow (pip install 'polymamba[parquet]'); or name it .npy") from None
    flat = pa.array(embeddings.reshape(-1))
    columns = {**where, "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])}
    with written_whole(path) as beside:
        pq.write_table(pa.table(columns), beside)


def _pieces(args: Predict | Embed, model: DNAClassifier, *, along_records: bool = False) -> tuple[list[Piece], bool]:
    """Every record, or every window of it that is not mostly N, and whether they are windows.

    along_records: the output tells pieces by the records' names, so two files must not share one.
    """
    window = args.window or model.config.window
    if args.stride is not None and window is None:
        raise InputError("--stride says how far apart windows are; give --window too")
    pieces, files, n_left_out = [], {}, 0
    for path, record in records_of(args.fasta):
        tokens = tokens_of(record, model.config.hard_mask)
        if files.setdefault(record.name, path) != path and along_records:
            raise InputError(f"{path}: record {record.name!r} stands in {files[record.name]} too; rename one of them")
        for start, end in windows_of(len(tokens), window, args.stride):
            if window is not None and share_of_n(tokens[start:end]) > args.max_n:
                n_left_out += 1
            else:
                pieces.append(Piece(record.name, start, end, tokens[start:end]))
    if not pieces:
        raise InputError(f"nothing is left of {' '.join(args.fasta)}: {n_left_out} windows are mostly N; see --max-n")
    if n_left_out:
        say(f"{n_left_out} windows left out: more than {args.max_n:.0%} of their bases are N")
    return pieces, window is not None
