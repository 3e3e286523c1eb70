"""`polymamba genomics <verb>-bases`: the flags. What the verbs do is in verbs/bases.py, loaded when one runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from ..core.config import ComputeConfig, TrainConfig
from ..core.flags import Output
from ..core.inputs import require_at_least_1, require_shares
from .config import Preset, Target
from .language_commands import GenomeDividing, require_sequence_files, require_start


def _require_labels(labels: tuple[Path, ...]) -> None:
    if not labels:
        raise ValueError("no labels; name one or more files, BED, GFF, GTF or bedGraph")


@dataclass(frozen=True, kw_only=True)
class TrainBases:
    """Train a model of single bases: which class, which labels or which number is that of each base of a genome?"""

    fasta: Positional[tuple[str, ...]]
    """Genomes: files, folders or quoted globs; train, valid or test in a path, or valid.fa, names a part."""
    labels: tuple[Path, ...]
    """BED, GFF, GTF or bedGraph files: a base is what the region that covers it is labelled (GFF: its type); a region
    without a label, what its file is named (exons.bed: exons)."""
    output: Output
    """Run folder to make: model, metrics, log, curves and checkpoints."""
    classes: tuple[str, ...] = ()
    """Labels to learn, others being passed over; of several on a base the first counts. All of them if left out."""
    target: Target = "multiclass"
    """multiclass: one class a base, none where no region is; multilabel: those of all regions there; regression: a
    number, such as bedGraph's, where there is one."""
    stranded: bool = False
    """The labels of either strand are classes of their own, LABEL(+) and LABEL(-)."""
    dividing: OmitArgPrefixes[GenomeDividing] = GenomeDividing()
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
    """Of the backbone that --init gave, on what each layer adds; as it was if left out."""
    strands: Literal["one", "both"] | None = None
    """both: read either strand by the same weights and take the mean, in training, too; right of --stranded labels and
    of labels that know no strand. If left out: one, but both if --init gave a Caduceus-PS."""
    window: int = 4096
    """Bases in a training window."""
    overlap: int | None = None
    """Bases by which windows overlap in the final test, in which their inner parts count; half a window if left out."""
    steps_per_epoch: int | None = None
    """Steps in an epoch, whose windows are drawn from the genome anew; all of the genome if left out."""
    balance: Literal["none", "loss"] = "none"
    """loss: against rare classes, weight the loss by the inverse of a class's frequency."""
    rc_augment: bool = False
    """Train on either strand at random, with the labels of its strands exchanged."""
    max_n: float = 0.5
    """Leave out windows of which a larger share is N; how many is said."""
    valid_bases: int = 1_000_000
    """Bases of the validation part to measure each epoch on, in windows spread over all of it."""
    resume: bool = False
    """Continue the run in the output folder where it stopped."""
    train: OmitArgPrefixes[TrainConfig] = TrainConfig(epochs=10, lr=4e-3, ema=0.98)
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_sequence_files(self.fasta)
        _require_labels(self.labels)
        require_at_least_1(window=self.window, steps_per_epoch=self.steps_per_epoch, valid_bases=self.valid_bases)
        require_shares(max_n=self.max_n)
        if self.overlap is not None and not 0 <= self.overlap < self.window:
            raise ValueError(f"overlap is {self.overlap}; it must be at least 0 and less than window, {self.window}")
        if self.target == "regression" and (self.classes or self.stranded or self.balance != "none"):
            raise ValueError("classes, stranded and balance are of labels; leave them out with target regression")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes {self.classes}: name each once")
        require_start(self.init, self.freeze, self.backbone_lr, self.dropout)


@dataclass(frozen=True, kw_only=True)
class _AlongGenome:
    """What the verbs that run a model of bases share. A causal model carries its state along a record."""

    run: Positional[Path]
    """Run folder of `train-bases`."""
    fasta: Positional[tuple[str, ...]]
    """Genomes: files, folders or quoted globs."""
    window: int | None = None
    """Bases that a model that sees both ways sees at a time; by default what it was trained on."""
    overlap: int | None = None
    """Bases by which its windows overlap, whose inner parts count; half a window if left out."""
    max_tokens: int = 65536
    """Most bases in a batch: memory grows with it, and not with the records' length."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_sequence_files(self.fasta)
        require_at_least_1(window=self.window, max_tokens=self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class EvalBases(_AlongGenome):
    """Measure a model of single bases on labelled genomes: metrics with intervals."""

    labels: tuple[Path, ...]
    """As for train-bases."""
    output: Output
    """Folder to make, for metrics.json, the confusion matrix and a manifest."""
    regions: tuple[Path, ...] = ()
    """BED files that say what of the genome to take, perhaps the splits.bed of the run; all of it if left out."""
    part: Literal["train", "valid", "test"] | None = None
    """Take only what --regions, or the files' paths, say to be of this part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_labels(self.labels)


@dataclass(frozen=True, kw_only=True)
class PredictBases(_AlongGenome):
    """Say what each base of sequence files is: a bedGraph track for each class, or the regions of a class as BED."""

    output: Output
    """File to write: .bedgraph (probabilities, or values), or .bed (runs of bases of one class, or with one label)."""
    bin: int = 1
    """Bases whose mean is a line of the bedGraph."""
    one_shot: bool = False
    """Also say it of each record in one piece, as far as memory goes, and say how far the windows are from that."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_1(bin=self.bin)


ANNOTATION_COMMANDS = {
    "train-bases": (TrainBases, "polymamba.genomics.verbs.bases:train_bases"),
    "eval-bases": (EvalBases, "polymamba.genomics.verbs.bases:eval_bases"),
    "predict-bases": (PredictBases, "polymamba.genomics.verbs.bases:predict_bases"),
}
