"""`polymamba genomics score` and `perplexity`: how probable does a language model find these sequences?"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ...core.device import autocast
from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder, require_writable, save_tsv, write_tsv, written_whole
from ...core.terminal import progress_bar, say
from ..binned_track import BinnedTracks
from ..evaluation import Reader, bits_in_context, causal_bits, masked_bits
from ..evaluation import Score as Cost
from ..language_commands import Perplexity, Score
from ..parts import parts_given
from ..plots import plot_perplexity
from ..reading.files import files_of
from ..reading.genome import Genome
from .genome import require_unlike_names, window_and_overlap
from .language import load_reader

CONTEXT_TOKENS = 1 << 18  # in a batch of `perplexity`


def score(args: Score) -> None:
    """A line for each record, as soon as it is known; perhaps a track."""
    for path in (args.output, args.track):
        if path is not None:
            require_writable(path)
    reader = load_reader(args.run, args.compute)
    masked = reader.objective == "masked"
    for name in ("window", "overlap", "one_shot"):
        if getattr(args, name) and not masked:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is of masked models; {args.run} carries its state along a record, leave it out")
    window, overlap = window_and_overlap(args.window or reader.model.config.window, args.overlap)
    header = ["id", "bases", "scored", "log_likelihood", "bits_per_base", "perplexity"]
    header += ["mean_difference", "largest_difference"] if args.one_shot else []
    with ExitStack() as stack:
        genome = stack.enter_context(Genome(files_of(args.fasta)))
        track = None
        if args.track is not None:
            require_unlike_names(genome)
            beside = stack.enter_context(written_whole(args.track))
            track = BinnedTracks([stack.enter_context(beside.open("w", encoding="utf-8"))], ["bits per base"], args.bin)
        stack.enter_context(autocast(args.compute))
        rows = _rows(args, reader, genome, (window, overlap), track)
        if args.output is None:
            write_tsv(sys.stdout, header, rows)
        else:
            save_tsv(args.output, header, rows)
    if masked:
        say(f"windows of {window} bases, overlapping by {overlap}")


def _rows(
    args: Score, reader: Reader, genome: Genome, geometry: tuple[int, int], track: BinnedTracks | None
) -> Iterator[list[Any]]:
    window, overlap = geometry
    with progress_bar("score", genome.n_bases, "bases") as advance:
        for i, contig in enumerate(genome.contigs):

            def bits_by(window: int, overlap: int, i: int = i, length: int = contig.length):
                if reader.objective == "next":
                    return causal_bits(reader, genome.pieces(i, 0, length, args.chunk))
                sizes: Any = {"window": window, "overlap": overlap, "max_tokens": args.chunk}
                return masked_bits(reader, genome, i, 0, length, **sizes)

            total = Cost(0, 0.0)
            kept: list[np.ndarray] = []

            def counted(pieces: Iterator[tuple[int, np.ndarray]], kept: list[np.ndarray] = kept):
                nonlocal total
                for start, bits in pieces:
                    total = total.plus(bits)
                    advance(len(bits))
                    if args.one_shot:
                        kept.append(bits)
                    yield start, bits

            pieces = counted(bits_by(window, overlap))
            if track is not None:
                track.write(contig.name, ((start, bits[:, None]) for start, bits in pieces))
            else:
                for _ in pieces:
                    pass
            row = [contig.name, contig.length, total.n_bases, f"{total.log_likelihood:.4f}"]
            row += [f"{total.bits_per_base:.5f}", f"{total.perplexity:.5f}"] if total.n_bases else [".", "."]
            if args.one_shot:
                whole = np.concatenate([bits for _, bits in bits_by(contig.length, 0)])
                differences = np.abs(np.concatenate(kept) - whole)
                known = differences[~np.isnan(differences)]
                row += [f"{x:.5f}" for x in (known.mean(), known.max())] if len(known) else [".", "."]
            yield row


def perplexity(args: Perplexity) -> None:
    """Of the same bases after more and more context: a table and a picture."""
    require_new_folder(args.output)
    reader = load_reader(args.run, args.compute)
    longest = args.contexts[-1]
    before = longest if reader.objective == "next" else longest // 2
    with Genome(files_of(args.fasta)) as genome:
        stretches = [s for s in parts_given(genome, args.regions) if args.part in (None, s.part)]
        places = [
            (s.contig, at)
            for s in stretches
            for at in range(s.start + before, s.end - args.target - (longest - before) + 1, args.target)
        ]
        if not places:
            of_part = f"of the {args.part} part " if args.part else ""
            raise InputError(
                f"no stretch {of_part}has {longest + args.target} bases; give shorter --contexts than {longest}"
            )
        chosen = np.linspace(0, len(places) - 1, min(args.stretches, len(places))).round().astype(int)
        places = [places[i] for i in chosen]
        sizes = [args.target + context for context in args.contexts]
        found = []
        with autocast(args.compute), progress_bar("perplexity", sum(sizes) * len(places), "bases") as advance:
            for context in args.contexts:
                options: Any = {"advance": advance}
                found.append(bits_in_context(reader, genome, places, args.target, context, CONTEXT_TOKENS, **options))
    header = ["context", "bits_per_base", "perplexity", "change", "low", "high", "bases", "stretches"]
    rows = _changes(args.contexts, np.stack(found), args.compute.seed)
    with new_folder(args.output) as folder:
        save_tsv(folder / "perplexity.tsv", header, rows)
        plot_perplexity(folder / "perplexity.png", rows, reader.model.config.window)
    write_tsv(sys.stdout, header, rows)


def _changes(contexts: Sequence[int], bits: np.ndarray, seed: int, n_resamples: int = 1000) -> list[list[Any]]:
    """The table's lines. bits (contexts, stretches, n), nan for N.

    change is that of bits per base from the shortest context, over the very same bases; low and high are its 95 %
    interval, for which stretches are drawn anew.
    """
    sums, counts = np.nansum(bits, axis=2), np.sum(~np.isnan(bits[0]), axis=1)
    drawn = np.random.default_rng(seed).integers(len(counts), size=(n_resamples, len(counts)))
    rows = []
    for context, of_stretch in zip(contexts, sums, strict=True):
        mean = of_stretch.sum() / counts.sum()
        difference = of_stretch - sums[0]
        change = difference.sum() / counts.sum()
        low, high = np.quantile(difference[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1), [0.025, 0.975])
        figures = [f"{x:.5f}" for x in (mean, 2**mean, change, low, high)]
        rows.append([context, *figures, int(counts.sum()), len(counts)])
    return rows
