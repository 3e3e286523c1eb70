"""`polymamba audio eval`: how well a model predicts recordings, and how near to them what it makes is."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...core.device import autocast
from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder, sha256, write_json, write_text
from ...core.hub import WEIGHTS
from ...core.terminal import progress_bar, say
from ..codec import decode
from ..commands import Eval
from ..generation import Watchdog, begin, write_on
from ..metrics import (
    KEPT,
    am_score,
    frechet,
    inception_score,
    mel_embedding,
    modified_inception_score,
    of_middling_likelihood,
)
from ..model import AudioClassifier, AudioModel, Guided
from ..plots import plot_sounds
from ..scoring import bits_of
from ..training import classify, probabilities_of
from .common import load_causal_model, load_classifier, read_codes

COLUMNS = ("sounds", "n", "FAD_mel", "FID", "IS", "mIS", "AM", "recognised")
DRAWN = 9  # sounds in the picture


def evaluate(args: Eval) -> None:
    """Bits per sample of the files; then a table: the files themselves, what the model makes, and a part of that."""
    if args.output is not None:
        require_new_folder(args.output)
    model = load_causal_model(args.run, args.compute)
    config = model.config
    classifier = None if args.classifier is None else _classifier_like(args, model)
    _, recorded, folders = read_codes(args.files, config)
    if len(recorded) < 4 or args.n < 4:
        raise InputError(f"{len(recorded)} files and --n {args.n}; sets of fewer than 4 sounds are not to be compared")
    places = {label: i for i, label in enumerate(config.labels)}
    labels = [places.get(folder, len(places)) for folder in folders]
    n_samples = round(args.seconds * config.sample_rate) if args.seconds else int(np.median([len(r) for r in recorded]))
    with autocast(args.compute):
        with progress_bar("scoring", sum(map(len, recorded)), "samples") as advance:
            bits = bits_of(model, recorded, labels, advance=advance)
        made, asked = _make(args, model, n_samples)
        with progress_bar("scoring what was made", args.n * n_samples, "samples") as advance:
            likelihood = bits_of(model, made, asked, advance=advance) / n_samples
        kept = of_middling_likelihood(likelihood)
        # As a yardstick: how far two halves of the same are apart.
        one, other = recorded[::2], recorded[1::2]
        middling = [m for m, is_kept in zip(made, kept, strict=True) if is_kept]
        rows = [
            {"sounds": name, "n": len(sounds), **_figures(args, model, classifier, sounds, reference, wanted)}
            for name, sounds, reference, wanted in (
                ("one half of the files against the other", one, other, None),
                ("made", made, recorded, asked),
                ("made, of middling likelihood", middling, recorded, asked[kept]),
            )
        ]
    result: dict[str, Any] = {
        "bits_per_sample": float(bits.sum() / sum(map(len, recorded))),
        "bits_per_sample_of_made": float(likelihood.mean()),
        "protocol": _protocol(args, model, n_samples, len(recorded)),
        "rows": rows,
    }
    print(f"bits_per_sample\t{result['bits_per_sample']:.4f}")
    lines = ["\t".join(COLUMNS), *("\t".join(_cell(row.get(c)) for c in COLUMNS) for row in rows)]
    table = "\n".join(lines)
    print(table)
    if args.output is not None:
        with new_folder(args.output) as beside:
            write_json(beside / "metrics.json", json.loads(json.dumps(result)))
            write_text(beside / "table.tsv", table + "\n")
            _draw(beside, model, made, asked)
        say(f"metrics.json, table.tsv and made.png are in {args.output}")


def _classifier_like(args: Eval, model: AudioModel) -> AudioClassifier:
    """The classifier, which has to hear what the model makes: raises InputError if rate or codec are others."""
    assert args.classifier is not None
    classifier = load_classifier(args.classifier, args.compute)
    its, models = (f"{config.sample_rate} Hz, {config.codec}" for config in (classifier.config, model.config))
    if its != models:
        raise InputError(f"{args.classifier}: a classifier of {its}; the model has {models}")
    return classifier


def _protocol(args: Eval, model: AudioModel, n_samples: int, n_files: int) -> dict[str, Any]:
    """What the figures are of, in words, for metrics.json."""
    run = args.classifier
    checksum = sha256(run / WEIGHTS) if run is not None and run.is_dir() else None
    return {
        "made": f"{args.n} sounds of {n_samples} samples, seed {args.compute.seed}",
        "sampling": str(args.sampling),
        "labels": "each in turn" if model.config.labels else "none",
        "middling likelihood": f"without the likeliest {KEPT[0]:.0%} and the least likely {1 - KEPT[1]:.0%}",
        "reference": f"{n_files} files",
        "FAD_mel": "Frechet distance of means and deviations of 32 log mel bands",
        "classifier": None if run is None else {"run": str(run), "sha256": checksum},
    }


def _make(args: Eval, model: AudioModel, n_samples: int) -> tuple[list[np.ndarray], np.ndarray]:
    """(codes of each sound, the label that each was asked for)."""
    wanted: list[int | None] = [None] if not model.config.labels else list(range(len(model.config.labels)))
    guided = model if args.guidance == 1 else Guided(model, args.guidance)
    watchdog, made, asked, seed = Watchdog(model.config), [], [], args.compute.seed
    with progress_bar("making", args.n * n_samples / model.config.sample_rate, "s") as advance:
        for i, label in enumerate(wanted):
            n = args.n // len(wanted) + (i < args.n % len(wanted))
            if n == 0:
                continue
            begun, seeds = begin(guided, None, label), range(seed, seed + n)
            seed += n
            pieces = []
            for codes, _ in write_on(guided, begun, n_samples, args.sampling, seeds, block=2048, watchdog=watchdog):
                pieces.append(codes)
                advance(codes.size / model.config.sample_rate)
            made += list(np.concatenate(pieces, 1).astype(np.uint8))
            asked += [model.no_label if label is None else label] * n
    return made, np.array(asked)


def _figures(
    args: Eval,
    model: AudioModel,
    classifier: Any,
    sounds: list[np.ndarray],
    reference: list[np.ndarray],
    wanted: np.ndarray | None,
) -> dict[str, float]:
    config = model.config

    def mel(some: list[np.ndarray]) -> np.ndarray:
        return np.stack([mel_embedding(decode(s, config.codec), config.sample_rate) for s in some])

    figures = {"FAD_mel": frechet(mel(sounds), mel(reference))}
    if classifier is None:
        return figures
    window = classifier.config.window
    features = [classify(classifier, some, window, features=True) for some in (sounds, reference)]
    logits = [classify(classifier, some, window) for some in (sounds, reference)]
    p, p_reference = map(probabilities_of, logits)
    figures |= {
        "FID": frechet(*features),
        "IS": inception_score(p),
        "mIS": modified_inception_score(p, args.compute.seed),
        "AM": am_score(p, p_reference),
    }
    if wanted is not None and config.labels:
        heard = np.array(classifier.config.labels)[p.argmax(1)]
        figures["recognised"] = float((heard == np.array(config.labels)[wanted]).mean())
    return figures


def _draw(folder: Path, model: AudioModel, made: list[np.ndarray], asked: np.ndarray) -> None:
    chosen = np.linspace(0, len(made) - 1, DRAWN).round().astype(int)
    names = [f"made {i}" + (f": {model.config.labels[asked[i]]}" if model.config.labels else "") for i in chosen]
    waves = [decode(made[i], model.config.codec) for i in chosen]
    plot_sounds(folder / "made.png", waves, [model.config.sample_rate] * len(chosen), names)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
