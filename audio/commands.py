"""`polymamba audio <verb>`: the flags of each verb. What the verbs do is in verbs/, loaded when one runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from ..core.config import ComputeConfig, SamplingConfig, TrainConfig
from ..core.flags import OptionalOutput, Output
from ..core.inputs import require_files
from .config import PRESETS, Codec, Dividing, Layout, Preset, UNetConfig

# To make sound sample by sample: a long recurrence gains nothing by less than float32, and a whole block is one kernel
# only outside autocast.
STEPWISE = ComputeConfig(precision="fp32")


def _at_least(what: object, name: str, least: float) -> None:
    if not getattr(what, name) >= least:
        raise ValueError(f"{name} is {getattr(what, name)}; it must be at least {least:g}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model of raw waveforms on folders of wav, flac, mp3 or ogg files of any rate, mono or stereo."""

    files: Positional[tuple[Path, ...]]
    """Files, and folders with files at any depth; train/, valid/ or test/ in a path, or valid.wav, names a part."""
    output: Output
    """Run folder to make: model, metrics, log, curves and checkpoints."""
    dividing: OmitArgPrefixes[Dividing] = Dividing()
    corpus: Path | None = None
    """Folder for the decoded files, which several runs may share; in the run folder if left out."""
    preset: Preset = "tiny"
    """Size of the model, parameters: tiny 0.5 (for a CPU), youtubemix 3.5, sc09-small 6.1, sc09-large 24.3 million."""
    layout: Layout = "unet"
    """unet: blocks before and after each pool; sashimi: only after."""
    stages: Annotated[tuple[str, ...], arg(metavar="MIXERS ...")] = ("mamba",)
    """What the blocks of each rate are, the outermost rate first, the last one going on inwards: `s4d+mlp mamba` has
    S4D with an MLP at the samples' rate, and Mamba below. Of mamba, s4d, s4, mlp."""
    real: bool = False
    """Let s4d have real states instead of complex ones."""
    sample_rate: int | None = None
    """Hz; files of other rates are resampled. If left out, that of most files."""
    codec: Codec = "mu-law"
    """How a sample becomes one of 256 codes: mu-law is finer where it is quiet."""
    dropout: float = 0.0
    """On what each block adds; helps where a large model hears few files many times."""
    context: int = 8000
    """Samples in a training window."""
    gate: float = -60.0
    """Leave out training windows that are quieter than this, dB below full scale (not of a classifier)."""
    labels: bool = False
    """Learn the folders' names, so that `generate --label` can ask for one."""
    classifier: bool = False
    """Train a classifier of the folders' names instead of a model of the sound."""
    resume: bool = False
    """Continue the run in the output folder where it stopped."""
    train: OmitArgPrefixes[TrainConfig] = TrainConfig(epochs=5, batch_size=16, max_tokens=131072, lr=5e-3, warmup=0.1)
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_files(self.files)
        _at_least(self, "context", 1)
        if self.sample_rate is not None:
            _at_least(self, "sample_rate", 1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if not self.gate <= 0:
            raise ValueError(f"gate is {self.gate}; it must be 0 dB or less")
        if self.labels and self.classifier:
            raise ValueError("labels and classifier exclude each other: a classifier learns the labels anyway")
        if self.classifier and self.gate != Train.gate:
            raise ValueError(
                "gate leaves quiet windows out, and a classifier hears every recording; give one of the two"
            )
        if self.real and not any("s4d" in stage.split("+") for stage in self.stages):
            raise ValueError("real is about s4d, which no stage has")
        self.unet()

    def unet(self) -> UNetConfig:
        """The network's shape. Raises ValueError for stages that there cannot be."""
        return replace(
            PRESETS[self.preset],
            layout=self.layout,
            stages=self.stages,
            s4d_complex=not self.real,
            dropout=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class _OnFiles:
    run: Positional[Path]
    """Run folder of the model."""
    files: Positional[tuple[Path, ...]]
    """Sound files, and folders with some at any depth."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_files(self.files)


@dataclass(frozen=True, kw_only=True)
class Score(_OnFiles):
    """Print what a model makes of sound files: bits per sample of each, and of all."""

    chunk: int = 16384
    """Samples read at a time: the result is the same at any number, memory and speed are not."""
    output: OptionalOutput = None
    """File to write the table to (.tsv); it is printed anyway."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "chunk", 1)


@dataclass(frozen=True, kw_only=True)
class Eval(_OnFiles):
    """Measure a model on held-out files: bits per sample, and how near to them what it makes is."""

    classifier: Annotated[Path | None, arg(metavar="RUN")] = None
    """Run folder of a classifier (train --classifier), for FID, IS, mIS, AM, and how many labels are recognised."""
    n: int = 200
    """How many sounds to make, each label in turn."""
    seconds: float | None = None
    """How long each is; if left out, the files' median."""
    guidance: float = 1.0
    """How much a label counts: see generate."""
    output: OptionalOutput = None
    """Folder to make, for metrics.json with the protocol, table.tsv and made.png."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    compute: OmitArgPrefixes[ComputeConfig] = STEPWISE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be above 0")
        if not 0 <= self.guidance < 1e3:
            raise ValueError(f"guidance is {self.guidance}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class Classify(_OnFiles):
    """Print the label that a classifier gives to each sound file, with one probability a label."""

    output: OptionalOutput = None
    """File to write the table to (.tsv) instead."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Let a trained model make sound: a file, or raw samples on standard output as it goes."""

    run: Positional[Path]
    """Run folder of the model."""
    output: OptionalOutput = None
    """File to write, .wav, .flac, .ogg or .mp3; a picture of its spectrum is put beside it. With --n above 1 the files
    get numbers."""
    stdout: bool = False
    """Write raw samples to standard output as they are made: 16 bits, signed, little-endian, mono."""
    seconds: float = 2.0
    """How much to make, after the prompt."""
    prompt: Path | None = None
    """Sound file to continue, of any rate and length; its sound comes first in the output."""
    prompt_seconds: float | None = None
    """How much of the prompt's beginning to take; all if left out."""
    label: str | None = None
    """What to make, if the model learnt labels."""
    guidance: float = 1.0
    """How much a label counts: 1 as the model says, 0 not at all, more exaggerates (and takes twice the time)."""
    n: int = 1
    """How many to make, side by side."""
    state: Path | None = None
    """Go on from this file of --save-state, instead of a prompt."""
    save_state: Path | None = None
    """File for where the model stands at the end, to go on from."""
    watchdog: bool = True
    """Go back a little where the sound runs away into noise louder than anything in training."""
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig(top_p=0.99)
    compute: OmitArgPrefixes[ComputeConfig] = STEPWISE

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 1e6:
            raise ValueError(f"seconds is {self.seconds}; it must be above 0")
        if self.prompt_seconds is not None and not self.prompt_seconds > 0:
            raise ValueError(f"prompt_seconds is {self.prompt_seconds}; it must be above 0")
        if self.prompt_seconds is not None and self.prompt is None:
            raise ValueError("prompt_seconds says how much of a prompt to take; give a --prompt, too")
        _at_least(self, "n", 1)
        if not 0 <= self.guidance < 1e3:
            raise ValueError(f"guidance is {self.guidance}; it must be 0 or more")
        if self.output is None and not self.stdout:
            raise ValueError("nowhere to write; give -o FILE, or --stdout")
        if self.stdout and self.n > 1:
            raise ValueError(f"stdout carries one sound, not {self.n}; give -o FILE instead")
        if self.guidance != 1 and self.label is None:
            raise ValueError("guidance says how much a label counts; give a --label, too")
        if self.state is not None and (self.prompt is not None or self.label is not None):
            raise ValueError("a state stands after its prompt, and has its label; give neither --prompt nor --label")
        if (self.state is not None or self.save_state is not None) and (self.n > 1 or self.guidance != 1):
            raise ValueError("states are of one sound without guidance; leave --n and --guidance out")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw waveform and spectrum of sound files, beside each other in time."""

    files: Positional[tuple[Path, ...]]
    """Sound files, and folders with some at any depth; 12 at most."""
    output: Output
    """Picture to make (.png)."""
    seconds: float = 10.0
    """How much of each file's beginning to draw."""
    debug: bool = False
    """Show a traceback when something fails."""

    def __post_init__(self) -> None:
        require_files(self.files)
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}; it must be above 0")


COMMANDS = {
    "train": (Train, "polymamba.audio.verbs.train:train"),
    "generate": (Generate, "polymamba.audio.verbs.generate:generate"),
    "eval": (Eval, "polymamba.audio.verbs.evaluate:evaluate"),
    "score": (Score, "polymamba.audio.verbs.score:score"),
    "classify": (Classify, "polymamba.audio.verbs.classify:classify"),
    "plot": (Plot, "polymamba.audio.verbs.plot:plot"),
}
