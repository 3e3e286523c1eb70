"""`polymamba genomics <verb>`: the flags of each verb. What the verbs do is in verbs.py, loaded when one runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from ..core.config import ComputeConfig, TrainConfig
from .config import Preset

Output = Annotated[Path, arg(aliases=["-o"])]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a DNA sequence classifier on FASTA files.

    Say where the sequences are in one of three ways: --example, --data, or one --class for each class. FASTA may be
    plain, .gz or bgzip. Letter case is ignored, U reads as T, IUPAC ambiguity codes as N; any other letter is an error.
    """

    output: Output
    """Run folder to make: model, metrics, log, curves and checkpoints."""
    example: str | None = None
    """A data set that comes with the package: splice (primate splice junctions)."""
    data: Path | None = None
    """A folder with a FASTA file or a folder of them per class, perhaps below train, valid and test."""
    classes: Annotated[UseAppendAction[tuple[str, ...]], arg(name="class", metavar="NAME=FASTA")] = ()
    """A class and its FASTA file; may be repeated, also for one class."""
    valid_fraction: float = 0.1
    """Share of the training records set aside for validation, if the data has no validation part."""
    test_fraction: float = 0.1
    """Share of the training records set aside for the final test, if the data has no test part."""
    preset: Preset = "tiny"
    """Size of the model: tiny 25 thousand, small 0.6 and base 4.0 million parameters."""
    balance: bool = False
    """Weight each class in the loss by the inverse of its frequency."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes."""
    mask_rate: float = 0.2
    """Share of the bases that training hides, as N, other ones each time: against learning sequences by heart."""
    rc_augment: bool = False
    """Train on either strand at random. Wrong for signals that belong to one strand, such as splice sites."""
    rc_average: bool = False
    """Average the predictions of both strands in the final test."""
    resume: bool = False
    """Continue the run in the output folder where it stopped."""
    train: OmitArgPrefixes[TrainConfig] = TrainConfig(epochs=15, lr=4e-3, ema=0.98)
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()


@dataclass(frozen=True, kw_only=True)
class _Apply:
    """What eval and predict share."""

    ensemble: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="RUN")] = ()
    """Run folder of one more model, whose probabilities are averaged with the first one's; may be repeated."""
    rc_average: bool = False
    """Average the predictions of both strands."""
    batch_size: int = 256
    max_tokens: int = 262144
    """Most bases in a batch, padding included."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()


@dataclass(frozen=True, kw_only=True)
class Eval(_Apply):
    """Measure a trained classifier on labelled FASTA files: accuracy, MCC, macro-F1, AUROC, AUPRC with intervals."""

    run: Positional[Path]
    """Run folder of the model."""
    output: Output
    """Folder to make, for metrics.json, confusion.tsv, confusion.png and predictions.tsv."""
    data: Path | None = None
    """A folder with a FASTA file or a folder of them per class."""
    classes: Annotated[UseAppendAction[tuple[str, ...]], arg(name="class", metavar="NAME=FASTA")] = ()
    """A class and its FASTA file; may be repeated."""
    split: Literal["train", "valid", "test"] | None = None
    """Measure on this part of the folder alone."""


@dataclass(frozen=True, kw_only=True)
class Predict(_Apply):
    """Classify the sequences of FASTA files: a table of id, label and one probability per class, in input order."""

    run: Positional[Path]
    """Run folder of the model."""
    fasta: Positional[tuple[Path, ...]]
    """FASTA files, plain, .gz or bgzip."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """TSV file to write; standard output if left out."""


COMMANDS = {
    "train": (Train, "polymamba.genomics.verbs:train"),
    "eval": (Eval, "polymamba.genomics.verbs:evaluate"),
    "predict": (Predict, "polymamba.genomics.verbs:predict"),
}
