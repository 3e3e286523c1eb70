"""`polymamba audio classify`: the label that a classifier gives to each sound file."""

import sys

from ...core.device import autocast
from ...core.files import require_writable, save_tsv, write_tsv
from ...core.terminal import say
from ..commands import Classify
from ..training import classify as logits_of
from ..training import probabilities_of
from .common import load_classifier, read_codes


def classify(args: Classify) -> None:
    """A line for each file, in order: the likeliest label, then the probability of each."""
    if args.output is not None:
        require_writable(args.output)
    model = load_classifier(args.run, args.compute)
    sounds, codes, folders = read_codes(args.files, model.config)
    with autocast(args.compute):
        logits = logits_of(model, codes, model.config.window)
    probabilities = probabilities_of(logits)
    labels = model.config.labels
    rows = [["file", "label", *labels]]
    for sound, p in zip(sounds, probabilities, strict=True):
        rows.append([str(sound.path), labels[int(p.argmax())], *(f"{x:.4f}" for x in p)])
    if args.output is None:
        write_tsv(sys.stdout, rows[0], rows[1:])
    else:
        save_tsv(args.output, rows[0], rows[1:])
    known = [(row[1], folder) for row, folder in zip(rows[1:], folders, strict=True) if folder in labels]
    if known:
        right = sum(label == folder for label, folder in known)
        say(f"{right} of {len(known)} files ({right / len(known):.1%}) have the label that their folder's name says")
