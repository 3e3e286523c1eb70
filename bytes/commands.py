"""`polymamba bytes <verb>`: the flags of each verb. What the verbs do is in verbs/, loaded when one runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from ..core.config import ComputeConfig, MoEConfig, SamplingConfig, SpeculationConfig, TrainConfig
from ..core.flags import OptionalOutput, Output
from ..core.inputs import require_at_least_1, require_files
from .config import Dividing, Mixer, Preset, Windows, preset_config


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a language model on the bytes of any files: text in any script, code, binary. A file is a document."""

    files: Positional[tuple[Path, ...]]
    """Files, and folders with files at any depth; train/, valid/ or test/ in a path, or valid.txt, names a part."""
    output: Output
    """Run folder to make: model, metrics, log, curves and checkpoints."""
    dividing: OmitArgPrefixes[Dividing] = Dividing()
    corpus: Path | None = None
    """Folder for the corpus that is made of the files, which several runs may share; in the run folder if left out."""
    preset: Preset = "tiny"
    """Size of the model, parameters: tiny 0.5, small 5.6, base 27 million; the others as in their papers: moe-mamba-25m
    has 542 million, of which 26 are active for a byte."""
    pattern: Annotated[tuple[Mixer, ...] | None, arg(metavar="MIXER ...")] = None
    """What the layers cycle through: `mamba mamba mamba attention` is a hybrid, `attention mlp` a Transformer, `mamba
    moe` MoE-Mamba and `mamba+moe` its parallel form. The preset gives width and number of layers, and, if this is left
    out, the pattern: mamba, or that of moe-mamba-25m and -100m."""
    moe: OmitArgPrefixes[MoEConfig] = MoEConfig()
    dropout: float = 0.0
    """On what each layer adds; 0.1 to 0.3 helps where a large model sees few files many times."""
    context: int = 512
    """Bytes in a training window."""
    windows: Windows = "packed"
    """packed: cut from all documents end to end, a mark between two; apart: each holds bytes of one document only."""
    resume: bool = False
    """Continue the run in the output folder where it stopped."""
    train: OmitArgPrefixes[TrainConfig] = TrainConfig(epochs=3, batch_size=8, lr=6e-3, warmup=0.05)
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_files(self.files)
        require_at_least_1(context=self.context)
        if self.pattern is not None and not self.pattern:
            raise ValueError("pattern is empty; name at least one mixer")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        backbone = preset_config(self.preset, self.dropout, self.pattern, self.moe).backbone
        if self.moe != MoEConfig() and "moe" not in backbone.mixers:
            raise ValueError("settings of experts are given, but no layer has any; name moe in the pattern, too")


@dataclass(frozen=True, kw_only=True)
class _OnFiles:
    run: Positional[Path]
    """Run folder of the model."""
    files: Positional[tuple[Path, ...]]
    """Files, and folders with files at any depth, hidden ones passed over. A file is a document."""
    chunk: int = 8192
    """Bytes read at a time: the result is the same at any number, memory and speed are not."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_files(self.files)
        require_at_least_1(chunk=self.chunk)


@dataclass(frozen=True, kw_only=True)
class Eval(_OnFiles):
    """Measure a trained model on files: bits per byte and word perplexity, beside order-0 entropy and xz."""

    output: OptionalOutput = None
    """Folder to make, for metrics.json and positions.png, bits per byte against the position in the document; of a
    mixture of experts also routing.tsv, routing_bytes.tsv and routing.png: which expert takes how much, and what."""


@dataclass(frozen=True, kw_only=True)
class Noise(_OnFiles):
    """Measure how a trained model bears spoiled text: dropped, repeated, swapped characters, other case, antspeak."""

    output: OptionalOutput = None
    """File to write the table to (.tsv); it is printed anyway."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Let a trained model write on, to standard output as it goes."""

    run: Positional[Path]
    """Run folder of the model."""
    prompt: str | None = None
    """What to continue; the beginning of a document if left out. It is not printed again."""
    prompt_file: Path | None = None
    """The same from a file, of any bytes and any length; - is standard input."""
    max_new_bytes: int = 500
    """Stop after so many bytes, if the model does not end the document before."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    """Stop before this text; may be repeated."""
    lossless: Annotated[bool, arg(name="bytes")] = False
    """Write the bytes themselves; without it what is no UTF-8 is replaced by U+FFFD."""
    draft: Literal["ngram"] | Path | None = None
    """Let bytes be guessed for the model to check several at a time: by the run folder of a smaller model, or ngram,
    which guesses that what stands there already comes again. On a CPU, faster where guesses are mostly right, as of
    source code or at a low temperature; slower on a GPU, which writes a byte after the other by one graph. The text is
    another one of the same kind."""
    speculation: OmitArgPrefixes[SpeculationConfig] = SpeculationConfig()
    sampling: OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_at_least_1(max_new_bytes=self.max_new_bytes)
        if self.draft is None and self.speculation != SpeculationConfig():
            raise ValueError("draft_length and acceptance say how drafts are judged; give a --draft, too")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure a model's speed here: training, reading a prompt, writing; memory; how near writing is to its limit."""

    model: Positional[Path]
    """Run folder of the model; or the name of a preset, whose weights are then random."""
    batch_size: int = 8
    """Windows in a batch of training."""
    context: int = 512
    """Bytes in a training window."""
    prompt_bytes: int = 8192
    """Length of the prompt that is read."""
    decode_batches: tuple[int, ...] = (1, 64)
    """Sequences that are written at once; a line of the table each."""
    repeats: int = 5
    """Times each thing is done; the median is shown."""
    output: OptionalOutput = None
    """File to write the table to (.json or .md); it is printed anyway."""
    compute: OmitArgPrefixes[ComputeConfig] = ComputeConfig()

    def __post_init__(self) -> None:
        require_at_least_1(
            batch_size=self.batch_size, context=self.context, prompt_bytes=self.prompt_bytes, repeats=self.repeats
        )
        if not self.decode_batches or min(self.decode_batches) < 1:
            raise ValueError(f"decode_batches is {self.decode_batches}; give one or more, each at least 1")
        if self.output is not None and self.output.suffix not in (".json", ".md"):
            raise ValueError(f"output is {self.output}; its ending must be .json or .md")


COMMANDS = {
    "train": (Train, "polymamba.bytes.verbs.train:train"),
    "eval": (Eval, "polymamba.bytes.verbs.evaluate:evaluate"),
    "noise": (Noise, "polymamba.bytes.verbs.evaluate:noise"),
    "generate": (Generate, "polymamba.bytes.verbs.generate:generate"),
    "bench": (Bench, "polymamba.bytes.verbs.bench:bench"),
}
