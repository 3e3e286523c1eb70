"""`polymamba audio score`: what a model makes of sound files, in bits per sample."""

import sys

from ...core.device import autocast
from ...core.files import require_writable, save_tsv, write_tsv
from ...core.terminal import progress_bar, say
from ..commands import Score
from ..scoring import bits_of, order0_bits
from .common import load_causal_model, read_codes


def score(args: Score) -> None:
    """A line for each file, then one for all."""
    if args.output is not None:
        require_writable(args.output)
    model = load_causal_model(args.run, args.compute)
    sounds, codes, folders = read_codes(args.files, model.config)
    places = {label: i for i, label in enumerate(model.config.labels)}
    labels = [places.get(folder, len(places)) for folder in folders]
    if places:
        n = sum(label < len(places) for label in labels)
        say(f"{n} of {len(labels)} files have a label that the model knows, by the folder's name; it is told to it")
    total = sum(map(len, codes))
    with autocast(args.compute), progress_bar("scoring", total, "samples") as advance:
        bits = bits_of(model, codes, labels, chunk=args.chunk, advance=advance)
    rows = [["file", "seconds", "samples", "bits_per_sample"]]
    for sound, c, b in zip(sounds, codes, bits, strict=True):
        rows.append([str(sound.path), f"{sound.seconds:.3f}", str(len(c)), f"{b / len(c):.4f}"])
    seconds = total / model.config.sample_rate
    rows.append(["all", f"{seconds:.3f}", str(total), f"{bits.sum() / total:.4f}"])
    write_tsv(sys.stdout, rows[0], rows[1:])
    say(f"entropy of their codes, no context known: {order0_bits(codes):.4f} bits per sample")
    if args.output is not None:
        save_tsv(args.output, rows[0], rows[1:])
