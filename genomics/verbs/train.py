"""`polymamba genomics train`: from labelled sequences to a run folder with a tested model."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ...core.device import autocast, pick_device
from ...core.errors import InputError
from ...core.files import write_json
from ...core.processes import from_first, is_first
from ...core.run_folder import RunFolder
from ...core.terminal import progress_bar, say
from ...core.thresholds import best_thresholds
from ...core.train import settings_of, train_model
from ..commands import Train
from ..config import PRESETS, DNAClassifierConfig
from ..dataset import LabelledSequences
from ..dividing import divide
from ..inference import predict
from ..model import DNAClassifier
from ..sources import read_source
from ..stored import begin_with, read_start
from ..training import TrainDNA, value_scale
from ..windows import cut_windows, moved, without_n_rich
from .common import THRESHOLDS, input_files, report


def train(args: Train) -> None:
    """Train, then test on the test part with the best epoch's model."""
    torch.manual_seed(args.compute.seed)
    start = None if args.init is None else read_start(args.init)
    if args.last_base and start is not None and start.config.bidirectional:
        raise InputError(
            f"--last-base: {args.init} sees both ways, where the last base is like any other; leave it out"
        )
    n_heads = 0 if args.last_base else args.heads
    backbone = start.config if start else PRESETS[args.preset]
    if args.dropout is not None:
        backbone = replace(backbone, dropout=args.dropout)
    records = from_first(
        lambda: divide(
            read_source(args.source, args.target, hard_mask=args.hard_mask), args.dividing, args.compute.seed
        )
    )
    windows = cut_windows(records, args.windows.window, args.windows.stride)
    data, n_dropped = without_n_rich(windows, args.windows.max_n)
    for part, flag in (("train", "--max-n"), ("valid", "--valid-fraction")):
        if not np.any(data.split == part):
            raise InputError(f"no record is left for the {part} part; see {flag}")
    for name, members in data.members().items():
        if not members[data.split == "train"].any():
            raise InputError(f"class {name!r}: no sequence is left for the train part; see --max-n")
    inputs = input_files(args.source, records, args.dividing.splits) + (start.files if start else [])
    run = RunFolder(args.output, _settings(args, data), inputs, resume=args.resume)
    say(data.describe())
    if n_dropped:
        say(f"{n_dropped} left out: more than {args.windows.max_n:.0%} of their bases are N")
    if is_first():
        records.write_splits_tsv(run / "splits.tsv")
        write_json(run / "labels.json", dict(enumerate(data.classes)))

    mean, scale = value_scale(data.subset("train")) if args.target == "regression" else (0.0, 1.0)
    config = DNAClassifierConfig(
        backbone=backbone,
        classes=data.classes,
        target=args.target,
        mean=mean,
        scale=scale,
        window=args.windows.window,
        hard_mask=args.hard_mask,
        n_heads=n_heads,
        head_dropout=0.5 if n_heads else 0.0,  # places are soon learned by heart; a mean is not
        both_strands=args.strands == "both" or (args.strands is None and start is not None and start.both_strands),
        last_base=args.last_base,
    )
    model = DNAClassifier(config)
    if start is not None:
        lr = args.train.lr / 10 if args.backbone_lr is None else args.backbone_lr
        begin_with(model, start, None if args.freeze else lr / args.train.lr)
    n_parameters = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = f"{n_parameters:,} parameters" + (f", {n_trained:,} of them learning" if args.freeze else "")
    say(f"model {args.init or args.preset}: {what}; training on {pick_device(args.compute)}")
    move = None
    if args.windows.window is not None:
        reach = (args.windows.stride or args.windows.window) // 2  # neighbours then leave nothing out, on average
        move = partial(moved, records=records.tokens, reach=reach, max_n=args.windows.max_n)
    task = TrainDNA(
        data,
        args.train,
        args.compute.seed,
        mask_rate=args.mask_rate,
        rc_augment=args.rc_augment,
        balance=args.balance,
        label_smoothing=args.label_smoothing,
        move=move,
        first_window=args.windows.first_window,
        steps_per_epoch=args.steps_per_epoch,
    )
    train_model(model, task, args.train, args.compute, run, resume=args.resume)
    if is_first():
        _test(args, data, run)


def _test(args: Train, data: LabelledSequences, run: RunFolder) -> None:
    """Thresholds from the validation part, then the figures of the test part, by the best epoch's model."""
    model = DNAClassifier.from_pretrained(run.path).to(pick_device(args.compute))
    sizes: Any = {"batch_size": args.train.batch_size, "max_tokens": args.train.max_tokens}
    valid, test = data.subset("valid"), data.subset("test")
    with autocast(args.compute):
        of_valid = predict(model, valid.tokens, **sizes, rc_average=args.rc_average)
        if data.target != "regression":
            thresholds = best_thresholds(valid.labels, of_valid)
            write_json(run / THRESHOLDS, dict(zip(data.classes, thresholds.tolist(), strict=True)))
        if not len(test.names):
            say("no test part: nothing is held out to measure the model on")
            return
        with progress_bar("test", sum(map(len, test.tokens)) * (1 + args.rc_average), "bases") as advance:
            of_test = predict(model, test.tokens, **sizes, rc_average=args.rc_average, advance=advance)
    report(run.path, test, of_test, args.compute.seed)


def _settings(args: Train, data: LabelledSequences) -> dict[str, Any]:
    """What determines the result."""
    groups = {"output", "resume", "source", "windows", "dividing", "train", "compute"}
    return {
        **{name: value for name, value in asdict(args).items() if name not in groups},
        "init": None if args.init is None else str(args.init),
        **asdict(args.windows),
        **{name: value for name, value in asdict(args.dividing).items() if name != "splits"},
        **settings_of(args.train, args.compute, same_kernels=False),
        "classes": list(data.classes),
        "records_sha256": data.digest(),
    }
