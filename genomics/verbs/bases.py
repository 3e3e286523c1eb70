"""`polymamba genomics train-bases`, eval-bases and predict-bases: what is each base of a genome?"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch

from ...core.config import ComputeConfig
from ...core.device import autocast, pick_device
from ...core.errors import InputError
from ...core.files import new_folder, require_new_folder, require_writable, write_json, written_whole
from ...core.hub import CONFIG, WEIGHTS
from ...core.metrics import format_table, write_confusion_tsv
from ...core.plots import plot_confusion
from ...core.processes import from_first, is_first
from ...core.run_folder import RunFolder, checksums_of, write_manifest
from ...core.terminal import progress_bar, say
from ...core.train import settings_of, train_model
from ..along import Along, along
from ..alphabet import N
from ..annotation import Annotation, read_annotation
from ..annotation_commands import EvalBases, PredictBases, TrainBases
from ..annotation_metrics import BaseFigures
from ..annotation_training import LabelCounts, balanced_weights, count_labels
from ..annotation_training import TrainBases as Task
from ..annotator import DNAAnnotator
from ..binned_track import BinnedTracks
from ..config import PRESETS, DNAAnnotatorConfig
from ..parts import Stretch, describe_parts, divide_genome, parts_given, write_splits_bed
from ..pretraining import Windows
from ..reading.files import files_of
from ..reading.genome import Genome
from ..runs_track import RunsTrack
from ..stored import begin_with, read_start, require_run_folder
from .genome import require_unlike_names, settings_of_genome, window_and_overlap, windows_of_parts

UNIT = 4096  # bases that figures add up by, at most


def train_bases(args: TrainBases) -> None:
    """Train, then measure the best epoch's model on the test part."""
    torch.manual_seed(args.compute.seed)
    start = None if args.init is None else read_start(args.init)
    files = files_of(args.fasta)
    with Genome(files) as genome:
        stretches = from_first(lambda: divide_genome(genome, args.dividing, args.compute.seed))
        annotation = read_annotation(args.labels, genome, args.target, args.classes, stranded=args.stranded)
        inputs = [path for path in (*files, *args.dividing.regions, *args.labels) if path.is_file()]
        run = RunFolder(
            args.output, _settings(args, genome), inputs + (start.files if start else []), resume=args.resume
        )
        say(describe_parts(stretches))
        parts = windows_of_parts(genome, stretches, args.window, args.max_n)
        counts = _counted(annotation, parts["train"], args.stranded)
        if is_first():
            write_splits_bed(run / "splits.bed", genome, stretches)
            write_json(run / "labels.json", dict(enumerate(annotation.classes)))
        mean, scale = _scale(counts) if args.target == "regression" else (0.0, 1.0)
        backbone = start.config if start else PRESETS[args.preset]
        config = DNAAnnotatorConfig(
            backbone=backbone if args.dropout is None else replace(backbone, dropout=args.dropout),
            classes=annotation.classes,
            target=args.target,
            mean=mean,
            scale=scale,
            window=args.window,
            stranded=args.stranded,
            both_strands=args.strands == "both" or (args.strands is None and start is not None and start.both_strands),
        )
        model = DNAAnnotator(config)
        if start is not None:
            lr = args.train.lr / 10 if args.backbone_lr is None else args.backbone_lr
            begin_with(model, start, None if args.freeze else lr / args.train.lr)
        n_parameters = sum(p.numel() for p in model.parameters())
        say(f"model {args.init or args.preset}: {n_parameters:,} parameters; training on {pick_device(args.compute)}")
        task = Task(
            genome,
            annotation,
            parts["train"],
            parts["valid"],
            args.train,
            args.compute.seed,
            model=config,
            class_weights=balanced_weights(counts, args.target, args.balance),
            steps_per_epoch=args.steps_per_epoch,
            rc_augment=args.rc_augment,
            valid_bases=args.valid_bases,
        )
        train_model(model, task, args.train, args.compute, run, resume=args.resume)
        if not is_first():
            return
        test = parts["test"].stretches
        if not test:
            say("no test part: nothing is held out to measure the model on")
            return
        best = _load(run.path, args.compute)
        geometry = _geometry(best, None, args.overlap)
        metrics = _measure(best, genome, annotation, test, geometry, args.train.max_tokens, args.compute)
        _report(run.path, metrics)


def eval_bases(args: EvalBases) -> None:
    """Measure the model of a run folder."""
    require_new_folder(args.output)
    model = _load(args.run, args.compute)
    config = model.config
    files = files_of(args.fasta)
    with Genome(files) as genome:
        stretches = [s for s in parts_given(genome, args.regions) if args.part in (None, s.part)]
        if not stretches:
            raise InputError(f"--part {args.part}: nothing of the genome is of this part")
        names = _labels_of(config)
        annotation = read_annotation(args.labels, genome, config.target, names, stranded=config.stranded)
        metrics = _measure(
            model,
            genome,
            annotation,
            stretches,
            _geometry(model, args.window, args.overlap),
            args.max_tokens,
            args.compute,
        )
    with new_folder(args.output) as folder:
        inputs = [*files, *args.regions, *args.labels, args.run / CONFIG, args.run / WEIGHTS]
        write_manifest(folder, json.loads(json.dumps(asdict(args), default=str)), checksums_of(inputs))
        _report(folder, metrics)


def predict_bases(args: PredictBases) -> None:
    """Write tracks, or regions."""
    suffix = args.output.suffix.lower()
    if suffix not in (".bed", ".bedgraph"):
        raise InputError(f"{args.output}: name it .bed or .bedgraph, which says what is written")
    if args.bin > 1 and suffix == ".bed":
        raise InputError("--bin says what the lines of a .bedgraph are; leave it out")
    require_writable(args.output)
    model = _load(args.run, args.compute)
    config = model.config
    if suffix == ".bed" and config.target == "regression":
        raise InputError(f"{args.output}: values have no regions; name it .bedgraph")
    if args.one_shot and not config.backbone.bidirectional:
        raise InputError(f"--one-shot is of models that see both ways; {args.run} carries its state along a record")
    geometry = _geometry(model, args.window, args.overlap)
    differences = _Differences()
    with ExitStack() as stack:
        genome = stack.enter_context(Genome(files_of(args.fasta)))
        require_unlike_names(genome)
        beside = stack.enter_context(written_whole(args.output))
        file = stack.enter_context(beside.open("w", encoding="utf-8"))
        shown = config.classes[1:] if config.target == "multiclass" else config.classes
        tracks: list[Any] = []
        if suffix == ".bedgraph":
            tracks = [stack.enter_context(TemporaryFile("w+", encoding="utf-8", dir=beside.parent)) for _ in shown]
            writer = BinnedTracks(tracks, shown, args.bin)
        else:
            writer = RunsTrack(file, config)
        stack.enter_context(autocast(args.compute))
        advance = stack.enter_context(progress_bar("predict", genome.n_bases, "bases"))
        for i, contig in enumerate(genome.contigs):
            pieces = _predicted(model, genome, i, 0, contig.length, geometry, args.max_tokens)
            if args.one_shot:
                pieces = differences.of(pieces, model, genome, i, contig.length)
            chosen = pieces if suffix == ".bed" else ((at, p[:, -len(shown) :]) for at, p in pieces)
            writer.write(contig.name, _told(chosen, advance))
        for track in tracks:
            track.seek(0)
            shutil.copyfileobj(track, file)
    if config.backbone.bidirectional:
        say(f"windows of {geometry[0]} bases, overlapping by {geometry[1]}{differences}")


class _Differences:
    """Of predictions over windows from those in one shot."""

    def __init__(self) -> None:
        self.total, self.largest, self.n = 0.0, 0.0, 0

    def of(
        self, pieces: Iterator[tuple[int, np.ndarray]], model: DNAAnnotator, genome: Genome, contig: int, length: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        ((_, whole),) = _predicted(model, genome, contig, 0, length, (length, 0), length)
        for start, predictions in pieces:
            found = np.abs(predictions - whole[start : start + len(predictions)])
            found = found[~np.isnan(found)]
            self.total, self.n = self.total + float(found.sum()), self.n + found.size
            self.largest = max(self.largest, float(found.max(initial=0)))
            yield start, predictions

    def __str__(self) -> str:
        return f"; from one shot {self.total / self.n:.5f} in the mean, {self.largest:.5f} at most" if self.n else ""


def _told(pieces: Iterator[tuple[int, np.ndarray]], advance: Any) -> Iterator[tuple[int, np.ndarray]]:
    for start, predictions in pieces:
        yield start, predictions
        advance(len(predictions))


def _load(run: Path, compute: ComputeConfig) -> DNAAnnotator:
    require_run_folder(run)
    return DNAAnnotator.from_pretrained(run).to(pick_device(compute))


def _labels_of(config: DNAAnnotatorConfig) -> list[str]:
    """The files' labels that a model knows, in their rank."""
    if config.target == "regression":
        return []
    names = config.classes[1:] if config.target == "multiclass" else config.classes
    return list(dict.fromkeys(name[:-3] if config.stranded else name for name in names))


def _geometry(model: DNAAnnotator, window: int | None, overlap: int | None) -> tuple[int, int]:
    """Window and overlap. Raises InputError if they do not fit together, or a causal model is told of them."""
    if not model.config.backbone.bidirectional and (window or overlap):
        raise InputError(
            "--window and --overlap are of models that see both ways; this one carries its state, leave them out"
        )
    return window_and_overlap(window or model.config.window, overlap)


def _predicted(
    model: DNAAnnotator, genome: Genome, contig: int, start: int, end: int, geometry: tuple[int, int], max_tokens: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(start, predictions float64 (n, K)) of consecutive pieces, nan at N."""

    def bases(first: int, last: int) -> np.ndarray:
        return genome.tokens(contig, first, last)[0]

    carried = None if model.config.backbone.bidirectional else model.carried
    what = Along(model, carried, next(model.parameters()).device)
    window, overlap = geometry
    for at, logits in along(what, bases, start, end, window=window, overlap=overlap, max_tokens=max_tokens):
        predictions = model.predictions(logits.double()).numpy()
        predictions[bases(at, at + len(predictions)) == N] = np.nan
        yield at, predictions


def _measure(
    model: DNAAnnotator,
    genome: Genome,
    annotation: Annotation,
    stretches: Sequence[Stretch],
    geometry: tuple[int, int],
    max_tokens: int,
    compute: ComputeConfig,
) -> dict[str, Any]:
    """Figures over the stretches' bases that are no N and, of a regression, have a value."""
    figures = BaseFigures(model.config.classes, model.config.target)
    with autocast(compute), progress_bar("test", sum(s.n_bases for s in stretches), "bases") as advance:
        for stretch in stretches:
            for at, found in _predicted(
                model, genome, stretch.contig, stretch.start, stretch.end, geometry, max_tokens
            ):
                labels = annotation.of(stretch.contig, at, at + len(found))
                for i in range(0, len(found), UNIT):
                    of_unit, truth = found[i : i + UNIT], labels[i : i + UNIT]
                    asked = ~np.isnan(of_unit[:, 0])
                    if annotation.target == "regression":
                        asked &= ~np.isnan(truth)
                    figures.add(stretch.contig, of_unit[asked], truth[asked])
                advance(len(found))
    if not figures.n_bases:
        raise InputError("no base to measure on: all are N, or without a value")
    return figures.metrics(compute.seed)


def _report(folder: Path, metrics: dict[str, Any]) -> None:
    if "confusion" in metrics:
        matrix = np.array(metrics["confusion"])
        write_confusion_tsv(folder / "confusion.tsv", matrix, metrics["classes"])
        plot_confusion(folder / "confusion.png", matrix, metrics["classes"])
    write_json(folder / "metrics.json", metrics)
    print(format_table(metrics))
    print(f"{metrics['bases']:,} bases")


def _counted(annotation: Annotation, train: Windows, stranded: bool) -> LabelCounts:
    """What the train part's bases are, which is said. Raises InputError if a class, or a value, is nowhere there."""
    n_bases = sum(s.n_bases for s in train.stretches)
    with progress_bar("labels", n_bases, "bases") as advance:
        counts = from_first(lambda: count_labels(annotation, train, advance))
    if annotation.n_skipped:
        say(f"{annotation.n_skipped} regions left out: the genome has not their chromosomes")
    if annotation.target == "regression":
        if not counts.n:
            raise InputError("no base of the train part has a value; see --labels")
        say(f"{counts.n:,} of the train part's {n_bases:,} bases have a value")
        return counts
    labels = dict(zip(annotation.classes, counts.of_classes.tolist(), strict=True))
    for name, count in labels.items():
        say(f"{name:<24}{int(count):>16,} bases ({count / counts.n:.3%}) of the train part")
        if not count and not (stranded and any(labels.get(name[:-3] + strand) for strand in ("(+)", "(-)"))):
            raise InputError(
                f"class {name!r}: no base of the train part; leave it out (--classes), or divide otherwise"
            )
    return counts


def _scale(counts: LabelCounts) -> tuple[float, float]:
    """Mean and standard deviation of a regression's values; 1 for the latter if they are all the same."""
    mean, square = counts.of_classes / counts.n
    return float(mean), float(np.sqrt(max(square - mean * mean, 0.0))) or 1.0


def _settings(args: TrainBases, genome: Genome) -> dict[str, Any]:
    return {
        **settings_of_genome(args, genome, settings_of(args.train, args.compute, same_kernels=False)),
        "labels": [str(path) for path in args.labels],
        "init": None if args.init is None else str(args.init),
    }
