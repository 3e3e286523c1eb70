"""`polymamba genomics pretrain`: from genomes to a run folder with a tested language model."""

from typing import Any

import torch

from ...core.device import autocast, pick_device
from ...core.files import write_json
from ...core.processes import first_alone, from_first, is_first
from ...core.run_folder import RunFolder
from ...core.terminal import progress_bar, say
from ...core.train import settings_of, train_model
from ..baselines import order_bits
from ..caduceus import Caduceus
from ..config import CaduceusConfig, language_model_config
from ..evaluation import score_windows
from ..language_commands import Pretrain
from ..language_model import DNALanguageModel
from ..parts import describe_parts, divide_genome, write_splits_bed
from ..pretraining import TrainGenome, Windows, cut_stretches, spread
from ..reading.files import files_of
from ..reading.genome import Genome
from ..tokenizers import BPE_FILE, CHARACTERS, BytePairs, KMers, Tokenizer, save_tokenizer
from .genome import settings_of_genome, windows_of_parts
from .language import load_reader

BPE_BASES = 10_000_000  # that a byte-pair encoding is learned from


def pretrain(args: Pretrain) -> None:
    """Train, then measure the best epoch's model on the test part."""
    torch.manual_seed(args.compute.seed)
    files = files_of(args.fasta)
    with Genome(files) as genome:
        stretches = from_first(lambda: divide_genome(genome, args.dividing, args.compute.seed))
        inputs = [path for path in (*files, *args.dividing.regions) if path.is_file()]
        of_training = settings_of(args.train, args.compute, same_kernels=args.objective == "next", cuts=True)
        settings = settings_of_genome(args, genome, of_training)
        run = RunFolder(args.output, settings, inputs, resume=args.resume)
        say(describe_parts(stretches))
        parts = windows_of_parts(genome, stretches, args.length, args.max_n)
        with first_alone():
            tokenizer = _tokenizer(genome, parts["train"], args, run)
            if is_first():
                write_splits_bed(run / "splits.bed", genome, stretches)
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
    with autocast(args.compute), progress_bar("test", sum(size for _, _, size in windows), "bases") as advance:
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
        with progress_bar("baselines", n_bases, "bases") as advance:
            orders = order_bits(genome, train, test.stretches, advance=advance)
        metrics["order_bits_per_base"] = orders
    write_json(run / "metrics.json", metrics)
    for name in ("bits_per_base", "perplexity"):
        print(f"{name:<22}{metrics[name]:>12.4f}")
    print(f"{'bases':<22}{found.n_bases:>12,}")
    for order, bits in enumerate(metrics.get("order_bits_per_base", [])):
        print(f"{f'order {order}':<22}{bits:>12.4f}")
