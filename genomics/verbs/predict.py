"""`polymamba genomics predict` and `embed`: a model over sequence files, in their order."""

import sys
from pathlib import Path

import numpy as np

from ...core.errors import InputError
from ...core.files import written_whole
from ..commands import Embed, Predict
from ..inference import embed as embed_sequences
from ..inference import predict as predict_sequences
from ..model import DNAClassifier
from ..reading.files import find_files
from ..reading.records import read_records
from ..sources import tokens_of
from ..tracks import Piece, write_bed, write_bedgraph
from ..windows import windows_of
from .common import autocast, decisions, load_models, save_tsv, table_rows, tuned_thresholds, write_tsv


def predict(args: Predict) -> None:
    """Predict for every record or window: a table, or a track along the records."""
    suffix = ".tsv" if args.output is None else args.output.suffix.lower()
    if suffix not in (".tsv", ".bed", ".bedgraph"):
        raise InputError(f"{args.output}: name it .tsv, .bed or .bedgraph, which says what is written")
    models = load_models([args.run, *args.ensemble], args.compute)
    config = models[0].config
    thresholds = tuned_thresholds(args.run, config) if args.tuned_threshold else None
    pieces, windowed = _pieces(args, models[0])
    tokens = [piece.tokens for piece in pieces]
    sizes = (args.batch_size, args.max_tokens)
    with autocast(args.compute):
        each = [
            predict_sequences(model, tokens, *sizes, rc_average=args.rc_average, progress="predict")
            for model in models
        ]
    predictions = np.mean(each, axis=0)
    labels = decisions(predictions, config.classes, config.target, thresholds)
    if suffix == ".bed":
        with written_whole(args.output) as beside, beside.open("w", encoding="utf-8") as file:
            write_bed(file, pieces, labels, predictions, config)
        return
    if suffix == ".bedgraph":
        with written_whole(args.output) as beside, beside.open("w", encoding="utf-8") as file:
            write_bedgraph(file, pieces, predictions, config)
        return
    header = ["id", *(["start", "end"] if windowed else [])]
    header += ["value"] if config.target == "regression" else ["label", *config.classes]
    where = [[p.name, p.start, p.end] if windowed else [p.name] for p in pieces]
    rows = table_rows(([*w, l, row] for w, l, row in zip(where, labels, predictions, strict=True)), config.target)
    if args.output is None:
        write_tsv(sys.stdout, header, rows)
    else:
        save_tsv(args.output, header, rows)


def embed(args: Embed) -> None:
    """Write the embedding of every record or window."""
    suffix = args.output.suffix.lower()
    if suffix not in (".npy", ".parquet"):
        raise InputError(f"{args.output}: name it .npy or .parquet, which says what is written")
    model = load_models([args.run], args.compute)[0]
    pieces, windowed = _pieces(args, model)
    with autocast(args.compute):
        tokens = [piece.tokens for piece in pieces]
        embeddings = embed_sequences(model, tokens, args.batch_size, args.max_tokens, progress="embed")
    where = {"id": [p.name for p in pieces]}
    if windowed:
        where |= {"start": [p.start for p in pieces], "end": [p.end for p in pieces]}
    if suffix == ".npy":
        with written_whole(args.output) as beside, beside.open("wb") as file:
            np.save(file, embeddings)
        save_tsv(args.output.with_suffix(".tsv"), list(where), zip(*where.values(), strict=True))
    else:
        _write_parquet(args.output, where, embeddings)


def _write_parquet(path: Path, where: dict[str, list], embeddings: np.ndarray) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{path}: Parquet needs the package pyarrow (pip install pyarrow); or name it .npy") from None
    flat = pa.array(embeddings.reshape(-1))
    columns = {**where, "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings.shape[1])}
    with written_whole(path) as beside:
        pq.write_table(pa.table(columns), beside)


def _pieces(args: Predict | Embed, model: DNAClassifier) -> tuple[list[Piece], bool]:
    """Every record, or every window of it, and whether they are windows. Raises InputError if there are none."""
    window = args.window or model.config.window
    if args.stride is not None and window is None:
        raise InputError("--stride says how far apart windows are; give --window too")
    if (args.window is not None and args.window < 1) or (args.stride is not None and args.stride < 1):
        raise InputError(f"--window {args.window} and --stride {args.stride} must be at least 1")
    pieces = [
        Piece(record.name, start, end, tokens[start:end])
        for word in args.fasta
        for path in find_files(word)
        for record in read_records(path)
        for tokens in [tokens_of(record, model.config.hard_mask)]
        for start, end in windows_of(len(tokens), window, args.stride)
    ]
    return pieces, window is not None
