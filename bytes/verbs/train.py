"""`polymamba bytes train`: from files to a run folder with a tested model."""

from dataclasses import asdict
from typing import Any

import torch

from ...core.device import pick_device
from ...core.moe import parameter_counts
from ...core.parallel import SPLITTABLE
from ...core.processes import first_alone, from_first, is_first
from ...core.run_folder import RunFolder
from ...core.terminal import say
from ...core.train import settings_of, train_model
from ..commands import Train
from ..config import preset_config
from ..corpus import describe, divide, open_corpus, write_splits_tsv
from ..documents import find_files
from ..model import ByteLM
from ..training import TrainBytes
from .common import load_causal_model, measure_routing, report


def train(args: Train) -> None:
    """Train, then measure the best epoch's model on the test part."""
    torch.manual_seed(args.compute.seed)
    files = from_first(lambda: find_files(args.files, leave_out=args.output))
    pieces = from_first(lambda: divide(files, args.dividing, args.compute.seed))
    run = RunFolder(args.output, _settings(args), files, resume=args.resume)
    say(describe(pieces))
    if is_first():
        write_splits_tsv(run / "splits.tsv", pieces)
    with first_alone():
        corpus = open_corpus(args.corpus or run / "corpus", pieces)

    model = ByteLM(preset_config(args.preset, args.dropout, args.pattern, args.moe))
    task = TrainBytes(corpus["train"], corpus["valid"], args.train, args.context, args.compute.seed, args.windows)
    total, active = parameter_counts(model)
    size = f"{total:,} parameters" + (f", {active:,} active for a byte" if active < total else "")
    say(f"model {args.preset}: {size}; training on {pick_device(args.compute)}")
    if task.context < args.context:
        say(f"the training documents are shorter than a window: windows of {task.context} bytes")
    train_model(model, task, args.train, args.compute, run, resume=args.resume)

    if not is_first():
        return
    if not len(corpus["test"]):
        say("no test part: nothing is held out to measure the model on")
        return
    model = load_causal_model(run.path, args.compute)  # the best epoch's
    result, routing = measure_routing(model, corpus["test"], args.compute, "test")
    report(run.path, result, corpus["test"], routing)


def _settings(args: Train) -> dict[str, Any]:
    """What determines the result, beside the files."""
    backbone = preset_config(args.preset, args.dropout, args.pattern, args.moe).backbone
    n_experts = backbone.moe.n_experts if "moe" in backbone.mixers else 0
    cuts = backbone.mixers <= SPLITTABLE
    return {
        "preset": args.preset,
        "pattern": list(backbone.pattern),
        **({"moe": asdict(backbone.moe)} if n_experts else {}),
        "dropout": args.dropout,
        "context": args.context,
        "windows": args.windows,
        **asdict(args.dividing),
        **settings_of(args.train, args.compute, same_kernels=True, cuts=cuts, n_experts=n_experts),
    }
