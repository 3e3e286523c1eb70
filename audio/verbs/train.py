"""`polymamba audio train`: from sound files to a run folder with a tested model."""

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ...core.device import autocast, pick_device
from ...core.errors import InputError
from ...core.files import write_json
from ...core.metrics import classification_metrics, format_table, write_confusion_tsv
from ...core.plots import plot_confusion
from ...core.processes import first_alone, from_first, is_first
from ...core.run_folder import RunFolder
from ...core.terminal import say
from ...core.train import settings_of, train_model
from ..commands import Train
from ..config import AudioConfig, ClassifierConfig
from ..corpus import Recordings, describe, divide, find_sounds, open_corpus, write_splits_tsv
from ..model import AudioClassifier, AudioModel
from ..reading import Sound
from ..scoring import order0_bits
from ..training import TrainAudio, TrainClassifier, classify, label_ids, measure, probabilities_of
from .common import load_causal_model, load_classifier


def train(args: Train) -> None:
    """Train, then measure the best epoch's model on the test part."""
    torch.manual_seed(args.compute.seed)
    sounds = from_first(lambda: find_sounds(args.files, leave_out=args.output))
    rate = args.sample_rate or Counter(sound.rate for sound in sounds).most_common(1)[0][0]
    recordings = from_first(lambda: divide(sounds, args.dividing, args.compute.seed))
    labels = tuple(sorted({r.label for r in recordings if r.part == "train"} - {""}))
    _require_labels(args, labels)
    options: dict[str, Any] = {"unet": args.unet(), "sample_rate": rate, "codec": args.codec}
    if args.classifier:
        config = ClassifierConfig(labels=labels, window=args.context, **options)
    else:
        config = AudioConfig(labels=labels if args.labels else (), **options)
    run = RunFolder(args.output, _settings(args, rate), [sound.path for sound in sounds], resume=args.resume)
    _tell_rates(sounds, rate)
    if is_first():
        write_splits_tsv(run / "splits.tsv", recordings)
    with first_alone():
        corpus = open_corpus(args.corpus or run / "corpus", recordings, rate, args.codec)
    say(describe(recordings, corpus, rate))
    if not len(corpus["valid"]):
        raise InputError("the valid part has no samples; give longer recordings, or more of them")
    if isinstance(config, ClassifierConfig):
        _train_classifier(args, config, corpus, run)
    else:
        _train_model(args, config, corpus, run)


def _train_model(args: Train, config: AudioConfig, corpus: dict[str, Recordings], run: RunFolder) -> None:
    loudest = _loudest(corpus["train"], config.sample_rate)
    model = AudioModel(replace(config, loudest=loudest))
    gate = 10 ** (args.gate / 20)
    task = TrainAudio(
        corpus["train"], corpus["valid"], config.labels, args.train, args.context, gate, args.compute.seed
    )
    _tell_model(args, model)
    train_model(model, task, args.train, args.compute, run, resume=args.resume)
    if not is_first():
        return
    test = corpus["test"]
    if not len(test):
        say("no test part: nothing is held out to measure the model on")
        return
    model = load_causal_model(run.path, args.compute)  # the best epoch's
    with autocast(args.compute):
        bits = measure(model, test, "test")
    order0 = order0_bits([test.recording(i) for i in range(len(test))])
    figures = {"bits_per_sample": bits, "order0_bits_per_sample": order0}
    figures |= {"recordings": len(test), "samples": int(test.starts[-1])}
    write_json(run / "metrics.json", figures)
    for name, value in figures.items():
        print(f"{name:<24}{value:>14,.4f}" if isinstance(value, float) else f"{name:<24}{value:>14,}")


def _train_classifier(args: Train, config: ClassifierConfig, corpus: dict[str, Recordings], run: RunFolder) -> None:
    model = AudioClassifier(config)
    settings = config.labels, args.train, args.context, config.codec, args.compute.seed
    task = TrainClassifier(corpus["train"], corpus["valid"], *settings)
    _tell_model(args, model)
    train_model(model, task, args.train, args.compute, run, resume=args.resume)
    if not is_first():
        return
    write_json(run / "labels.json", dict(enumerate(config.labels)))
    test = corpus["test"]
    if not len(test):
        say("no test part: nothing is held out to measure the model on")
        return
    model = load_classifier(run.path, args.compute)
    with autocast(args.compute):
        logits = classify(model, [test.recording(i) for i in range(len(test))], args.context)
    truth = label_ids(test, config.labels)
    known = truth < len(config.labels)
    if not known.any():
        say("no test recording has a label that the model knows: nothing to measure")
        return
    probabilities = probabilities_of(logits)[known]
    truth = truth[known]
    figures = classification_metrics(truth, probabilities, list(config.labels))
    write_json(run / "metrics.json", figures)
    confusion = np.zeros((len(config.labels),) * 2, np.int64)
    np.add.at(confusion, (truth, probabilities.argmax(1)), 1)
    write_confusion_tsv(run / "confusion.tsv", confusion, config.labels)
    plot_confusion(run / "confusion.png", confusion, config.labels)
    print(format_table(figures))


def _require_labels(args: Train, labels: tuple[str, ...]) -> None:
    wanted = "--classifier" if args.classifier else "--labels"
    if (args.classifier or args.labels) and len(labels) < 2:
        raise InputError(
            f"{args.files[0]}: {wanted} takes the folders' names as labels, and there is only "
            f"{repr(labels[0]) if labels else 'none'}; sort the files into a folder for each label"
        )


def _tell_rates(sounds: list[Sound], rate: int) -> None:
    others = Counter(sound.rate for sound in sounds if sound.rate != rate)
    for other, n in sorted(others.items()):
        say(f"{n} files of {other} Hz: resampled to {rate} Hz")


def _tell_model(args: Train, model: torch.nn.Module) -> None:
    n_parameters = sum(p.numel() for p in model.parameters())
    say(f"model {args.preset}: {n_parameters:,} parameters; training on {pick_device(args.compute)}")


def _loudest(train: Recordings, rate: int) -> float:
    """The largest RMS of a quarter of a second."""
    starts = np.arange(0, train.starts[-1], max(1, rate // 4))
    return float(train.loudness(starts, np.minimum(starts + rate // 4, train.starts[-1])).max())


def _settings(args: Train, rate: int) -> dict[str, Any]:
    """What determines the result, beside the files."""
    names = ("preset", "layout", "real", "codec", "dropout", "context", "gate", "labels", "classifier")
    return {
        **{name: getattr(args, name) for name in names},
        "stages": list(args.stages),
        "sample_rate": rate,
        **asdict(args.dividing),
        **settings_of(args.train, args.compute, same_kernels=False),
    }
