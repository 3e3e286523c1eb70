"""`polymamba genomics pretrain`: from genomes to a run folder with a tested language model."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ...core.errors import InputError
from ...core.files import write_json
from ...core.processes import first_alone, from_first, is_first
from ...core.run_folder import RunFolder
from ...core.terminal import say
from ...core.train import autocast, pick_device, settings_of, train_model
from ..baselines import order_bits
from ..caduceus import Caduceus
from ..config import CaduceusConfig, language_model_config
from ..evaluation import score_windows
from ..language_commands import Pretrain
from ..language_model import DNALanguageModel
from ..n_runs import find_n_runs
from ..parts import Stretch, describe_parts, divide_genome, write_splits_bed
from ..pretraining import TrainGenome, Windows, cut_stretches, spread
from ..reading.files import files_of
from ..reading.genome import Genome
from ..terminal import progress_bar
from ..tokenizers import BPE_FILE, CHARACTERS, BytePairs, KMers, Tokenizer, save_tokenizer
from .language import load_reader

BPE_BASES = 10_000_000  # that a byte-pair encoding is learned from


def pretrain(args: Pretrain) -> None:
    """Train, then measure the best epoch's model on the test part."""
    torch.manual_seed(args.compute.seed)
    files = files_of(args.fasta)
    with Genome(files) as genome:
        stretches = from_first(lambda: divide_genome(genome, args.dividing, args.compute.seed))
        inputs = [path for path in (*files, *args.dividing.regions) if path.is_file()]
        run = RunFolder(args.output, _settings(args, genome), inputs, resume=args.resume)
        say(describe_parts(stretches))
        parts = _parts(genome, stretches, args)
        with first_alone():
            write_splits_bed(run / "splits.bed", genome, stretches)
            tokenizer = _tokenizer(genome, parts["train"], args, run)
            save_tokenizer(run.path, tokenizer)
        model = _model(args, tokenizer)
        task = TrainGenome(
            genome,
            parts["train"],
            parts["valid"],
            args.train,
            args.compute.seed,
            objective=args.objective,
            tokenizer=tokenizer,
            length=args.length,
            first_length=args.first_length or args.length,
            steps_per_epoch=args.steps_per_epoch,
            mask_rate=args.mask_rate,
            lower_case_weight=args.lower_case_weight,
            rc_augment=args.rc_augment,
            valid_bases=args.valid_bases,
        )
        n_parameters = sum(p.numel() for p in model.parameters())
        step = f"{task.tokens * args.train.accumulation:,} bases a step"
        say(f"model {args.preset}: {n_parameters:,} parameters; {step}; training on {pick_device(args.compute)}")
        train_model(model, task, args.train, args.compute, run, resume=args.resume)
        if not is_first():
            return
        if not parts["test"].stretches:
            say("no test part: nothing is held out to measure the model on")
            return
        _test(args, genome, parts, task, run)


def _parts(genome: Genome, stretches: Sequence[Stretch], args: Pretrain) -> dict[str, Windows]:
    """The windows of each part; how many are mostly N is said. Raises InputError if train or valid has none left."""
    with progress_bar("letters", sum(s.n_bases for s in stretches)) as advance:
        runs = from_first(lambda: find_n_runs(genome, stretches, advance=advance))
    parts, dropped = {}, []
    for part in ("train", "valid", "test"):
        members = [i for i, stretch in enumerate(stretches) if stretch.part == part]
        parts[part] = Windows([stretches[i] for i in members], [runs[i] for i in members], args.max_n)
        windows, n_dropped = cut_stretches(parts[part], args.length, None)
        dropped.append(f"{n_dropped:,} of {n_dropped + len(windows):,} {part}")
        if not len(windows) and members:
            raise InputError(
                f"all {n_dropped} windows of the {part} part are more than {args.max_n:.0%} N; see --max-n"
            )
    say(f"windows left out, more than {args.max_n:.0%} of their bases being N: {', '.join(dropped)}")
    return parts


def _model(args: Pretrain, tokenizer: Tokenizer) -> DNALanguageModel | Caduceus:
    """A masked model of bases is a Caduceus: Ph, or with rcps PS."""
    reading: Any = {"tokenizer": args.tokenizer, "k": args.k, "vocab_size": tokenizer.vocab_size}
    config = language_model_config(args.preset, args.objective, args.length, args.dropout, **reading)
    if args.objective == "masked" and args.tokenizer == "char":
        return Caduceus(CaduceusConfig(backbone=config.backbone, rcps=args.rcps, window=args.length))
    return DNALanguageModel(config)


def _tokenizer(genome: Genome, train: Windows, args: Pretrain, run: RunFolder) -> Tokenizer:
    """That of the flags; a byte-pair encoding is learned from windows spread over the train part, once."""
    if args.tokenizer == "char":
        return CHARACTERS
    if args.tokenizer == "kmer":
        return KMers(args.k)
    if (learned := run / BPE_FILE).is_file():
        return BytePairs(learned.read_text(encoding="utf-8"))
    windows = spread(cut_stretches(train, args.length, None)[0], BPE_BASES)
    stretches = train.stretches
    sequences = (genome.tokens(stretches[i].contig, at, at + size)[0] for i, at, size in windows.tolist())
    return BytePairs.learned(sequences, args.vocab_size)


def _test(args: Pretrain, genome: Genome, parts: dict[str, Windows], task: TrainGenome, run: RunFolder) -> None:
    """Figures of the test part: of the best epoch's model, and of counting."""
    reader = load_reader(run.path, args.compute)
    test = parts["test"]
    windows = [
        (test.stretches[i].contig, at, size) for i, at, size in cut_stretches(test, args.length, None)[0].tolist()
    ]
    with autocast(args.compute), progress_bar("test", sum(size for _, _, size in windows)) as advance:
        found = score_windows(reader, genome, windows, task.tokens, advance=advance)
    metrics: dict[str, Any] = {
        "bits_per_base": found.bits_per_base,
        "perplexity": found.perplexity,
        "bases": found.n_bases,
        "windows": len(windows),
        "window": args.length,
    }
    if args.baselines:
        train = parts["train"].stretches
        n_bases = sum(s.n_bases for s in (*train, *test.stretches))
        with progress_bar("baselines", n_bases) as advance:
            orders = order_bits(genome, train, test.stretches, advance=advance)
        metrics["order_bits_per_base"] = orders
    write_json(run / "metrics.json", metrics)
    for name in ("bits_per_base", "perplexity"):
        print(f"{name:<22}{metrics[name]:>12.4f}")
    print(f"{'bases':<22}{found.n_bases:>12,}")
    for order, bits in enumerate(metrics.get("order_bits_per_base", [])):
        print(f"{f'order {order}':<22}{bits:>12.4f}")


def _settings(args: Pretrain, genome: Genome) -> dict[str, Any]:
    """What determines the result, beside the files."""
    groups = {"output", "resume", "dividing", "train", "compute", "fasta"}
    dividing = {name: value for name, value in asdict(args.dividing).items() if name != "regions"}
    return {
        **{name: value for name, value in asdict(args).items() if name not in groups},
        **dividing,
        "regions": [str(path) for path in args.dividing.regions],
        **settings_of(args.train, args.compute, same_kernels=args.objective == "next", cuts=True),
        "contigs": len(genome.contigs),
        "bases": genome.n_bases,
    }
