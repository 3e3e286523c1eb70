"""`polymamba genomics <verb>`: the flags of each verb. What the verbs do is in verbs/, loaded when one runs.

Letters, everywhere: case is ignored unless --hard-mask is given, U reads as T, an IUPAC ambiguity code as N; any other
letter is an error.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from ..core.config import ComputeConfig, TrainConfig
from ..core.flags import OptionalOutput, Output
from ..core.inputs import require_at_least_1, require_shares
from .annotation_commands import ANNOTATION_COMMANDS
from .config import Preset, Target
from .language_commands import LANGUAGE_COMMANDS, require_start


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the labelled sequences are: --example, --data, --class, --fasta, --table or --regions, one of them.

    Files are FASTA, FASTQ, GenBank or EMBL, plain, .gz or bgzip, told apart by their content; - is standard input.
    The intervals of --data are those of Genomic Benchmarks: a file start,end,strand,... for each class.
    U reads as T, IUPAC ambiguity codes as N, in either case; any other letter is an error.
    """

    example: str | None = None
    """A data set that comes with the package: splice (primate splice junctions)."""
    data: Path | None = None
    """A folder with a file or folder for each class, perhaps below train, valid, test; of intervals with --genome."""
    classes: Annotated[UseAppendAction[tuple[str, ...]], arg(name="class", metavar="NAME=FILE")] = ()
    """A class and its file, folder or quoted glob; may be repeated, also for one class."""
    fasta: tuple[str, ...] = ()
    """Files, folders or quoted globs whose records are labelled by --labels or --label-pattern."""
    labels: Path | None = None
    """TSV or CSV with columns id and label, perhaps split, for the records of --fasta."""
    label_pattern: str | None = None
    """Regular expression for the class in the header of the --fasta records: its group `label`, or its first group."""
    table: Path | None = None
    """TSV or CSV with columns sequence and label, perhaps id and split."""
    regions: tuple[Path, ...] = ()
    """BED (0-based; label in column 4, or named columns) or GFF (1-based) files of labelled stretches of --genome."""
    genome: tuple[str, ...] = ()
    """Sequence files that --regions, or the intervals of --data, refer to."""
    features: tuple[str, ...] = ()
    """Feature types to take from GFF files; all of them if left out."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Cutting long sequences. Figures are then over windows, and their intervals over records, whose windows are alike.

    Of fewer than 10 records the intervals are over blocks of neighbouring windows, and say nothing of other records.
    """

    window: int | None = None
    """Cut sequences into windows of this many bases, the last one moved back to end at the end; whole if left out."""
    stride: int | None = None
    """Bases from one training window's start to the next one's; the window's length if left out, and in other parts.

    Each epoch moves training windows by up to half of it, at random.
    """
    first_window: int | None = None
    """Bases that the first epoch shows of a training window; they double with each epoch, up to all of it."""
    max_n: float = 0.5
    """Leave out sequences (or windows) of which a larger share is N; how many is said."""

    def __post_init__(self) -> None:
        require_at_least_1(window=self.window, stride=self.stride, first_window=self.first_window)
        require_shares(max_n=self.max_n)
        if self.stride is not None and self.window is None:
            raise ValueError("stride says how far apart windows are; give window too")
        if self.first_window is not None and (self.window is None or self.first_window > self.window):
            raise ValueError(f"first_window is {self.first_window}; it must not be more than window, {self.window}")


@dataclass(frozen=True, kw_only=True)
class Dividing:
    """Dividing records into train, valid and test. Parts that the files give stay; others are taken from train."""

    splits: Path | None = None
    """The splits.tsv of an earlier run or of `split`: its parts are used."""
    split_by: Literal["record", "cluster", "chromosome"] = "record"
    """What is never torn: copies of a record; records alike (--similarity); a chromosome (name up to coordinates)."""
    valid_fraction: float = 0.1
    """Share of the training records set aside for validation, if the data has no validation part."""
    test_fraction: float = 0.1
    """Share of the training records set aside for the final test, if the data has no test part."""
    valid_chromosomes: tuple[str, ...] = ()
    """With --split-by chromosome: these make up the validation part."""
    test_chromosomes: tuple[str, ...] = ()
    """With --split-by chromosome: these make up the test part."""
    similarity: float = 0.1
    """Records are alike if they share this share of the shorter one's 20-mers, either strand; 0: any at all."""

    def __post_init__(self) -> None:
        require_shares(similarity=self.similarity)  # the fractions depend on the parts that the data have: see divide


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a DNA sequence model: which class, which labels or which number belongs to a sequence?"""

    output: Output
    """Run folder to make: model, metrics, log, curves and checkpoints."""
    source: OmitArgPrefixes[Source] = Source()
    windows: OmitArgPrefixes[Windows] = Windows()
    dividing: OmitArgPrefixes[Dividing] = Dividing()
    target: Target = "multiclass"
    """multiclass: one class a sequence; multilabel: several, separated by ";" ("." for none); regression: a number."""
    hard_mask: bool = False
    """Read lower-case (soft-masked) letters as N. The model remembers it."""
    preset: Preset = "tiny"
    """Size of the model: tiny 25 thousand, small 0.6 and base 4.0 million parameters. Without --init."""
    init: Path | None = None
    """Begin with the backbone of this language model: a run folder of `pretrain`, or a folder that `polymamba convert
    caduceus` made; the head begins anew."""
    backbone_lr: float | None = None
    """Peak learning rate of the backbone that --init gave; a tenth of --lr if left out."""
    freeze: bool = False
    """Leave the backbone that --init gave as it is: the head alone learns."""
    dropout: float | None = None
    """Of the backbone that --init gave, on what each layer adds: 0.2 helps on small data; as it was if left out."""
    heads: int = 64
    """Places of a sequence that the model attends to; 0 for what the mean over all bases shows, such as a species."""
    last_base: bool = False
    """The head sees what a causal backbone (--init) says at the last base alone; --heads is then nothing."""
    strands: Literal["one", "both"] | None = None
    """both: read either strand by the same weights and take the mean, in training, too; wrong for signals that belong
    to one strand, such as splice sites. If left out: one, but both if --init gave a Caduceus-PS."""
    balance: Literal["none", "loss", "sampling"] = "none"
    """Against rare classes: weight the loss by the inverse of a class's frequency, or draw each class equally often."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    mask_rate: float = 0.2
    """Share of the bases that training hides, as N, other ones each time: against learning sequences by heart."""
    rc_augment: bool = False
    """Train on either strand at random. Wrong for signals that belong to one strand, such as splice sites."""
    rc_average: bool = False
    """Average the predictions of both strands in the final test."""
    steps_per_epoch: int | None = None
    """Steps in an epoch, about, whose sequences are drawn anew, each once before any again; all of them once if left
    out."""
    resume: bool = False
    """Continue the run in the output folder where it stopped."""
    train: OmitArgPrefixes[TrainConfig] = TrainConfig(epochs=15, lr=4e-3, ema=0.98)
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_shares(label_smoothing=self.label_smoothing, mask_rate=self.mask_rate)
        require_start(self.init, self.freeze, self.backbone_lr, self.dropout)
        require_at_least_1(steps_per_epoch=self.steps_per_epoch)
        if self.last_base and self.init is None:
            raise ValueError("last_base is of a causal backbone, such as --init gives; give --init, too")
        if self.heads < 0:
            raise ValueError(f"heads is {self.heads}; it must not be negative")
        if self.balance == "sampling" and self.target != "multiclass":
            raise ValueError(f"balance sampling draws each class as often; with target {self.target} use none")
        if self.balance == "loss" and self.target == "regression":
            raise ValueError("balance loss weighs classes; with target regression use none")
        if self.label_smoothing and self.target == "regression":
            raise ValueError("label_smoothing is of classes; leave it out with target regression")


@dataclass(frozen=True, kw_only=True)
class _WithModel:
    """What the verbs that run a model share."""

    run: Positional[Path]
    """Run folder of the model."""
    batch_size: int = 256
    max_tokens: int = 262144
    """Most bases in a batch, padding included; `predict` and `embed` refuse longer records that no --window cuts."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_at_least_1(batch_size=self.batch_size, max_tokens=self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class _Deciding(_WithModel):
    ensemble: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="RUN")] = ()
    """Run folder of one more model, whose predictions are averaged with the first one's; may be repeated."""
    tuned_threshold: bool = False
    """Decide by the thresholds with the best F1 on the validation part (two classes, or several labels), not by 0.5."""
    rc_average: bool = False
    """Average the predictions of both strands."""


@dataclass(frozen=True, kw_only=True)
class _AlongRecords(_WithModel):
    fasta: Positional[tuple[str, ...]]
    """Sequence files, folders or quoted globs; - is standard input."""
    window: int | None = None
    """Cut records into windows of this many bases; by default what the model was trained on."""
    stride: int | None = None
    """Bases from the start of one window to that of the next; the window's length if left out."""
    max_n: float = 0.5
    """Leave out windows of which a larger share is N; how many is said. Whole records are never left out."""

    def __post_init__(self) -> None:
        require_shares(max_n=self.max_n)
        if not self.fasta:
            raise ValueError("no sequence file; name one or more after the run folder, or - for standard input")
        require_at_least_1(window=self.window, stride=self.stride)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Eval(_Deciding):
    """Measure a trained model on labelled sequences, or on windows of them: metrics with intervals.

    The intervals are over records, or of fewer than 10 records over blocks of neighbouring windows.
    """

    output: Output
    """Folder to make, for metrics.json, predictions.tsv, the confusion matrix, the curves and a manifest."""
    source: OmitArgPrefixes[Source] = Source()
    split: Literal["train", "valid", "test"] | None = None
    """Measure on this part of the data alone."""
    window: int | None = None
    """Cut records into windows of this many bases; by default what the model was trained on."""
    max_n: float = 0.5
    """Leave out sequences (or windows) of which a larger share is N; how many is said."""

    def __post_init__(self) -> None:
        require_shares(max_n=self.max_n)
        require_at_least_1(window=self.window)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class Predict(_AlongRecords, _Deciding):
    """Predict for the records of sequence files, in their order: a TSV table, or BED or bedGraph along long records."""

    output: OptionalOutput = None
    """File to write: .tsv, .bed (a line a window) or .bedgraph (a track a class); standard output if left out."""


@dataclass(frozen=True, kw_only=True)
class Embed(_AlongRecords):
    """Embed the records of sequence files, or their windows: the mean of the last hidden states over the bases.

    By a classifier, or by a language model of `pretrain` or `polymamba convert caduceus`.
    """

    output: Output
    """.npy (float32, a row a record or window; names in .names.tsv beside it) or .parquet (id, ..., embedding)."""
    in_record: bool = False
    """See windows in their record, not by themselves: a causal language model carries its state from the record's start
    on, as if it had read it in one piece; one that sees both ways sees half of --overlap more on either side."""
    overlap: int | None = None
    """With --in-record, of a model that sees both ways: bases; as many as in a window if left out."""
    one_shot: bool = False
    """With --in-record, of a model that sees both ways: also embed the windows of each record read in one piece, as far
    as memory goes, and say how far the others are from that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap is not None and (self.overlap < 0 or not self.in_record):
            raise ValueError(f"overlap is {self.overlap}; it must not be negative, and goes with in_record")
        if self.one_shot and not self.in_record:
            raise ValueError("one_shot says how far windows in their record are from one piece; give in_record, too")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Divide labelled sequences, write who is in which part (splits.tsv, for `train --splits`), and report leakage."""

    output: Output
    """Folder to make, for splits.tsv and leakage.json."""
    source: OmitArgPrefixes[Source] = Source()
    dividing: OmitArgPrefixes[Dividing] = Dividing()
    target: Target = "multiclass"
    """As for train."""
    seed: int = 0
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Look at sequences: counts, lengths, composition, N, duplicates, and what the parts share."""

    output: OptionalOutput = None
    """Folder to make, for stats.json and stats.png; the tables alone, on standard output, if left out."""
    source: OmitArgPrefixes[Source] = Source()
    target: Target = "multiclass"
    """As for train."""
    debug: bool = False
    """Show a traceback when something fails."""


COMMANDS = {
    "stats": (Stats, "polymamba.genomics.verbs.explore:stats"),
    "split": (Split, "polymamba.genomics.verbs.explore:split"),
    "train": (Train, "polymamba.genomics.verbs.train:train"),
    "eval": (Eval, "polymamba.genomics.verbs.evaluate:evaluate"),
    "predict": (Predict, "polymamba.genomics.verbs.predict:predict"),
    "embed": (Embed, "polymamba.genomics.verbs.predict:embed"),
    **ANNOTATION_COMMANDS,
    **LANGUAGE_COMMANDS,
}
