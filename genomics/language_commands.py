"""`polymamba genomics <verb>` of language models: the flags. What the verbs do is in verbs/, loaded when one runs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from ..core.config import ComputeConfig, SamplingConfig, TrainConfig
from ..core.flags import OptionalOutput, Output
from ..core.inputs import require_at_least_1, require_fractions, require_shares
from .config import LanguagePreset, Objective, TokenizerName


def require_sequence_files(words: tuple[str, ...]) -> None:
    if not words:
        raise ValueError("no sequence file; name one or more")


def require_start(init: Path | None, freeze: bool, backbone_lr: float | None, dropout: float | None) -> None:
    """Raises ValueError for flags of a backbone that --init gave without it, at odds, or out of range."""
    if init is None and (freeze or backbone_lr is not None or dropout is not None):
        raise ValueError("freeze, backbone_lr and dropout are of a backbone that --init gave; give --init, too")
    if freeze and backbone_lr is not None:
        raise ValueError("freeze and backbone_lr: a frozen backbone learns at no rate; give one of them")
    if backbone_lr is not None and not 0 < backbone_lr < math.inf:
        raise ValueError(f"backbone_lr is {backbone_lr}; it must be a number above 0")
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class GenomeDividing:
    """Dividing a genome into train, valid and test. Parts that the files give stay; others are taken from train."""

    regions: tuple[Path, ...] = ()
    """BED files of what to learn from; a column split (train, valid or test), named in a header line, gives parts. All
    of the genome if left out."""
    valid_chromosomes: tuple[str, ...] = ()
    """These make up the validation part."""
    test_chromosomes: tuple[str, ...] = ()
    """These make up the test part."""
    split_by: Literal["block", "chromosome"] = "block"
    """What missing parts are taken from train by: blocks of chromosomes, or whole chromosomes."""
    block: int = 1_000_000
    """Bases of a block."""
    valid_fraction: float = 0.1
    """Share of train's bases to set aside for validation, if there is no validation part."""
    test_fraction: float = 0.1
    """Share of train's bases to set aside for the final test, if there is no test part; 0 for none."""

    def __post_init__(self) -> None:
        require_fractions(self.valid_fraction, self.test_fraction)
        require_at_least_1(block=self.block)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Train a language model on genomes: to tell each base from those before it, or hidden ones from both sides."""

    fasta: Positional[tuple[str, ...]]
    """Genomes: files, folders or quoted globs; train, valid or test in a path, or valid.fa, names a part."""
    output: Output
    """Run folder to make: model, metrics, log, curves and checkpoints."""
    dividing: OmitArgPrefixes[GenomeDividing] = GenomeDividing()
    preset: LanguagePreset = "tiny"
    """Size of the model, in parameters; tiny, of 70 thousand, is for trying things out."""
    objective: Objective = "next"
    """next: each base from those before it, a causal model; masked: hidden bases, a model that sees both ways."""
    rcps: bool = False
    """Of a masked model: read both strands by the same weights (Caduceus-PS), so that it says the same of either."""
    tokenizer: TokenizerName = "char"
    """A token is a base; kmer: --k bases, side by side; bpe: what occurs often (needs the extra polymamba[bpe])."""
    k: int = 1
    """Bases of a k-mer."""
    vocab_size: int = 4096
    """Of bpe: tokens to learn."""
    length: int = 1024
    """Bases in a training window."""
    first_length: int | None = None
    """Bases in a window of the first epoch; they double with each epoch up to --length, at as many bases a step."""
    steps_per_epoch: int | None = None
    """Steps in an epoch, whose windows are drawn from the genome anew; all of the genome if left out."""
    mask_rate: float = 0.15
    """Share of the bases that a masked model is asked for; of these 80 % are hidden, 10 % others, 10 % as they are."""
    lower_case_weight: float = 1.0
    """What a lower-case (soft-masked) base counts for in the training loss; 0.1 is usual where repeats abound."""
    rc_augment: bool = False
    """Train on either strand at random."""
    max_n: float = 0.5
    """Leave out windows of which a larger share is N; how many is said."""
    valid_bases: int = 1_000_000
    """Bases of the validation part to measure each epoch on, in windows spread over all of it."""
    dropout: float = 0.0
    """On what each layer adds; 0.1 helps where a large model sees a small genome many times."""
    baselines: bool = True
    """Also measure what counting k-mers makes of the test part, by orders up to 11."""
    resume: bool = False
    """Continue the run in the output folder where it stopped."""
    train: OmitArgPrefixes[TrainConfig] = TrainConfig(epochs=10, lr=4e-3)
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_sequence_files(self.fasta)
        require_at_least_1(length=self.length, first_length=self.first_length, steps_per_epoch=self.steps_per_epoch)
        require_at_least_1(valid_bases=self.valid_bases)
        require_shares(mask_rate=self.mask_rate, lower_case_weight=self.lower_case_weight, max_n=self.max_n)
        if (self.tokenizer == "kmer") != (self.k > 1) or self.k > 8:
            raise ValueError(f"k is {self.k}; of tokenizer kmer it is 2 to 8, of others it is left out")
        if self.rcps and (self.objective == "next" or self.tokenizer != "char"):
            raise ValueError("rcps is of masked models (--objective masked) whose tokens are bases")
        if self.vocab_size < 20:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at least 20")
        if self.objective == "masked" and not self.mask_rate:
            raise ValueError("mask_rate is 0; a masked model must be asked for some bases")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.first_length is not None:
            n_doublings = (self.length // self.first_length).bit_length() - 1
            if self.first_length << n_doublings != self.length:
                raise ValueError(
                    f"first_length is {self.first_length}; doubled some times it must be length, which is {self.length}"
                )
            if n_doublings >= self.train.epochs:
                raise ValueError(
                    f"first_length is {self.first_length}: {n_doublings} doublings to {self.length} take "
                    f"{n_doublings + 1} epochs, but there are {self.train.epochs}"
                )


@dataclass(frozen=True, kw_only=True)
class _WithLanguageModel:
    """What the verbs of language models share."""

    run: Positional[Path]
    """Run folder of a language model, as `pretrain` makes it."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()


@dataclass(frozen=True, kw_only=True)
class Score(_WithLanguageModel):
    """Score the records of sequence files by a language model: log-likelihood and bits per base, of any length.

    A next-nucleotide model carries its state along a record, as if it had read it in one piece. A masked model goes
    over windows that overlap, and is asked for each base while it is hidden.
    """

    fasta: Positional[tuple[str, ...]]
    """Sequence files, folders or quoted globs; - is standard input."""
    output: OptionalOutput = None
    """File to write the table to (.tsv); standard output if left out."""
    track: Path | None = None
    """Also write the bits of each base, a bedGraph file."""
    bin: int = 1
    """Bases whose mean is a line of the --track."""
    chunk: int = 65536
    """Bases in a batch: memory grows with it, and not with the records' length."""
    window: int | None = None
    """Of a masked model: bases that it sees at a time; by default what it was trained on."""
    overlap: int | None = None
    """Of a masked model: bases by which windows overlap; half of the window if left out."""
    one_shot: bool = False
    """Of a masked model: also score each record in one piece, as far as memory goes, and say how far the overlapping
    windows are from that."""

    def __post_init__(self) -> None:
        require_sequence_files(self.fasta)
        require_at_least_1(bin=self.bin, chunk=self.chunk, window=self.window)
        if self.bin > 1 and self.track is None:
            raise ValueError("bin says what the lines of a track are; give --track, too")


@dataclass(frozen=True, kw_only=True)
class Perplexity(_WithLanguageModel):
    """Measure how a language model's perplexity falls with the context that it is given: the same bases, more context.

    Stretches of the genome, spread over its part, are predicted after ever more of the bases that stand before them.
    """

    fasta: Positional[tuple[str, ...]]
    """Genomes: files, folders or quoted globs."""
    output: Output
    """Folder to make, for perplexity.tsv and perplexity.png."""
    regions: tuple[Path, ...] = ()
    """BED files that say what of the genome to take, perhaps the splits.bed of the run; all of it if left out."""
    part: Literal["train", "valid", "test"] | None = None
    """Take only what --regions, or the files' paths, say to be of this part."""
    contexts: tuple[int, ...] = tuple(2**k for k in range(10, 18))
    """Bases before the stretch that is predicted, in rising order."""
    target: int = 1024
    """Bases of a stretch that is predicted."""
    stretches: int = 256
    """How many stretches, at most; each needs the longest of the contexts before it."""

    def __post_init__(self) -> None:
        require_sequence_files(self.fasta)
        require_at_least_1(target=self.target, stretches=self.stretches)
        if not self.contexts or min(self.contexts) < 1 or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts is {self.contexts}; give one or more numbers of at least 1, in rising order")


@dataclass(frozen=True, kw_only=True)
class Generate(_WithLanguageModel):
    """Let a next-nucleotide model write DNA, as FASTA on standard output."""

    prompt: str = ""
    """Bases to continue; they are written, too."""
    prompts: tuple[str, ...] = ()
    """Sequence files whose records are continued, each by itself."""
    number: int = 1
    """Sequences to write for each prompt."""
    length: int = 1000
    """Bases to write after a prompt."""
    output: OptionalOutput = None
    """FASTA file to write; standard output if left out."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()

    def __post_init__(self) -> None:
        require_at_least_1(number=self.number, length=self.length)
        if self.prompt and self.prompts:
            raise ValueError("prompt and prompts: give one of them")


@dataclass(frozen=True, kw_only=True)
class _AtPlaces(_WithLanguageModel):
    genome: tuple[str, ...]
    """Sequence files that the places are of; an index beside a file (.fai, of bgzip also .gzi) saves time."""
    window: int | None = None
    """Bases that the model sees around a place; by default what it was trained on."""
    both_strands: bool = True
    """Average over both strands; one costs half the time."""
    max_tokens: int = 524288
    """Most bases in a batch: with fewer it takes less memory, and a GPU waits for the processor."""

    def __post_init__(self) -> None:
        require_at_least_1(window=self.window, max_tokens=self.max_tokens)
        if self.window is not None and self.window < 4:
            raise ValueError(f"window is {self.window}; it must be at least 4")
        if not self.genome:
            raise ValueError("no genome; name its file or files")


@dataclass(frozen=True, kw_only=True)
class Variants(_AtPlaces):
    """Score the variants of a VCF file: ln P(allele) - ln P(reference), added to each record, of which none is lost.

    Each allele gets PM_LLR, or in PM_WHY the reason why it has none: NO_CONTIG, OUTSIDE (of the contig), REF_MISMATCH
    (REF is not what the genome has there), N_CONTEXT (too much N around it), AMBIGUOUS (N or such in an allele),
    SYMBOLIC (<DEL>, *, breakends), TOO_LONG (for the window), SAME (as REF).
    """

    vcf: Positional[Path]
    """VCF or BCF file, plain, gzip or bgzip; - is standard input."""
    output: OptionalOutput = None
    """VCF file to write: .vcf, or .vcf.gz, which is bgzip and gets an index; standard output if left out."""
    tag: str = "PM"
    """What the names of the INFO entries begin with."""
    max_n: float = 0.5
    """Do not score where a larger share of the window is N."""
    label_field: str | None = None
    """INFO entry that labels variants: AUROC and AUPRC against it are measured."""
    labels: Path | None = None
    """The same from a TSV or CSV table with columns chrom, pos, ref, alt and label."""
    positive: tuple[str, ...] = ("1",)
    """Labels of the variants that should be less likely than the reference; others are negative, . is none."""
    metrics: Path | None = None
    """File to write AUROC and AUPRC to (.json); they are said anyway."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_shares(max_n=self.max_n)
        if self.labels is not None and self.label_field is not None:
            raise ValueError("labels and label_field both say the labels; give one of them")
        if self.metrics is not None and self.labels is None and self.label_field is None:
            raise ValueError("metrics are measured against labels; give --labels or --label-field, too")


@dataclass(frozen=True, kw_only=True)
class Mutagenesis(_AtPlaces):
    """Change every base of a region to every other one, and show what a language model makes of it."""

    region: Positional[str]
    """What to go over: CHROM:START-END, from 1, both ends included, as genome browsers write it."""
    output: Output
    """Folder to make, for effects.tsv, effects.bedgraph and effects.png."""


LANGUAGE_COMMANDS = {
    "pretrain": (Pretrain, "polymamba.genomics.verbs.pretrain:pretrain"),
    "perplexity": (Perplexity, "polymamba.genomics.verbs.score:perplexity"),
    "score": (Score, "polymamba.genomics.verbs.score:score"),
    "generate": (Generate, "polymamba.genomics.verbs.generate:generate"),
    "variants": (Variants, "polymamba.genomics.verbs.variants:variants"),
    "mutagenesis": (Mutagenesis, "polymamba.genomics.verbs.variants:mutagenesis"),
}
