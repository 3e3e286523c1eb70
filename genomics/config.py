"""Settings of the DNA models, free of torch so that the command line can be parsed before it loads."""

from dataclasses import dataclass
from typing import Literal

from ..core import inputs
from ..core.config import BackboneConfig

# Of genomics.alphabet, which gives them their ids.
TOKEN_NAMES = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")

# How files and folders call the parts, in lower case.
PART_OF = inputs.PART_OF | {"dev": "valid"}

# What a language model learns: each base from those before it; hidden bases from both sides.
Objective = Literal["next", "masked"]

# A base, k bases, or what occurs often, is a token.
TokenizerName = Literal["char", "kmer", "bpe"]

# What is said of a sequence: one of several classes; any number of labels; a number.
Target = Literal["multiclass", "multilabel", "regression"]


@dataclass(frozen=True, kw_only=True)
class _LabelsConfig:
    """A backbone between a base embedding and a linear head.

    classes       in the order of the outputs; for regression the one name of the value
    mean, scale   regression: the value is mean + scale * output
    both_strands  what is said is the mean of what is said of either strand, by the same weights
    """

    backbone: BackboneConfig
    classes: tuple[str, ...]
    target: Target = "multiclass"
    mean: float = 0.0
    scale: float = 1.0
    both_strands: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON gives a list
        least = 2 if self.target == "multiclass" else 1
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < least:
            raise ValueError(f"classes {self.classes}: at least {least} needed, each with a name of its own")
        if self.target == "regression" and len(self.classes) != 1:
            raise ValueError(f"classes {self.classes}: a regression has one value")


@dataclass(frozen=True, kw_only=True)
class DNAClassifierConfig(_LabelsConfig):
    """What is said of a sequence, from its pooled hidden states, and what the model expects of its input.

    window        bases of the windows that long sequences were cut into for training; None if they were left whole
    hard_mask     lower-case letters of the files are read as N
    last_base     the head sees what the backbone says at the last base alone, where a causal one has read them all
    """

    window: int | None = None
    hard_mask: bool = False
    n_heads: int = 64  # of the attention pooling; 0: the mean over the bases alone, and no places
    head_dropout: float = 0.5
    last_base: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_base and (self.n_heads or self.backbone.bidirectional):
            raise ValueError("last_base is set; it is of causal backbones, and n_heads is then 0")


@dataclass(frozen=True, kw_only=True)
class DNAAnnotatorConfig(_LabelsConfig):
    """What is said of each base. The first class of multiclass is that of bases without a label.

    window        bases of the windows that it was trained on
    stranded      the classes are in pairs, LABEL(+) and LABEL(-), which are exchanged where the other strand is read
    """

    window: int = 4096
    stranded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "regression" and self.stranded:
            raise ValueError(f"classes {self.classes}: a regression's value is of no strand")
        if self.both_strands and not self.backbone.bidirectional:
            raise ValueError("both_strands is set; it is of backbones that see both ways")

    @property
    def other_strand(self) -> list[int]:
        """The class that each class is on the other strand."""
        if not self.stranded:
            return list(range(len(self.classes)))
        swapped = {"(+)": "(-)", "(-)": "(+)"}
        return [
            self.classes.index(name[:-3] + swapped[name[-3:]] if name[-3:] in swapped else name)
            for name in self.classes
        ]


@dataclass(frozen=True, kw_only=True)
class DNALanguageModelConfig:
    """A backbone between a token embedding and a head over the tokens.

    objective   what it was trained for; a masked model's backbone sees both ways, a next-nucleotide model's does not
    window      bases of the windows that it was trained on
    tokenizer   what a token is (tokenizers.py); k of k-mers
    """

    backbone: BackboneConfig
    objective: Objective = "next"
    window: int = 1024
    tokenizer: TokenizerName = "char"
    k: int = 1
    vocab_size: int = 16  # of the tokenizer, rounded up to whole 8s
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if (self.objective == "masked") != self.backbone.bidirectional:
            raise ValueError(f"objective {self.objective}: a masked model has a bidirectional backbone, no other has")


@dataclass(frozen=True, kw_only=True)
class CaduceusConfig:
    """A masked language model with a bidirectional backbone, that of one strand (Ph) or of both (PS).

    rcps         reverse-complement equivariant by parameter sharing: both strands through the backbone, Caduceus-PS
    vocabulary   the model's tokens by id, by their names in `alphabet`; ids that are left are padding
    n_token      what pretraining showed where a genome has N: fine-tuning begins with its embedding for N
    mirrored     the head reads the hidden states with strands, places and channels all reversed: official PS models of
                 an odd number of layers (see official.py)
    window       bases of the windows that it was trained on
    """

    backbone: BackboneConfig
    rcps: bool = False
    vocab_size: int = 16  # rounded up to whole 8s
    vocabulary: tuple[str, ...] = TOKEN_NAMES
    n_token: str = "N"
    mirrored: bool = False
    window: int = 1024
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))  # JSON gives a list
        missing = {"A", "C", "G", "T", "[MASK]", "[UNK]", "[PAD]", self.n_token} - set(self.vocabulary)
        strange = set(self.vocabulary) - set(TOKEN_NAMES)
        if missing or strange or len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError(
                f"vocabulary {self.vocabulary}: it must have A, C, G, T, [MASK], [UNK], [PAD] and {self.n_token}, each "
                f"once, and beside them only {', '.join(TOKEN_NAMES)}"
            )
        if len(self.vocabulary) > self.vocab_size:
            raise ValueError(f"vocab_size is {self.vocab_size}, for {len(self.vocabulary)} tokens")
        if self.backbone.mixers != {"bimamba"}:
            raise ValueError(f"pattern is {self.backbone.pattern}; Caduceus has bimamba layers")
        if self.mirrored and not self.rcps:
            raise ValueError("mirrored is set, but not rcps: there is no other strand")

    @property
    def objective(self) -> Objective:
        return "masked"


@dataclass(frozen=True, kw_only=True)
class CaduceusClassifierConfig:
    """A Caduceus trunk and a linear head over its pooled hidden states; of both strands, the mean of their logits.

    conjoin   read both strands, also by a trunk that is no rcps model (Caduceus-Ph's post-hoc conjoining)
    """

    trunk: CaduceusConfig
    n_classes: int
    pooling: Literal["mean", "max"] = "mean"
    conjoin: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "max"):
            raise ValueError(f"pooling is {self.pooling!r}; it must be mean or max")


Preset = Literal["tiny", "small", "base"]
PRESETS = {
    "tiny": BackboneConfig(d_model=32, n_layer=1, d_state=8, dropout=0.2, pattern=("bimamba",)),
    "small": BackboneConfig(d_model=128, n_layer=4, d_state=16, dropout=0.2, pattern=("bimamba",)),
    "base": BackboneConfig(d_model=256, n_layer=8, d_state=16, dropout=0.2, pattern=("bimamba",)),
}

# Mamba's DNA models (arXiv 2312.00752, section E.3.2) by their parameters; those that see both ways have a few more.
# The published Caduceus models are 470k, 1.9m and 7m; of PlantCaduceus's, the smaller two are 19m and 41m.
# tiny, of 70 thousand, is for trying things out.
LanguagePreset = Literal["tiny", "250k", "470k", "700k", "1.4m", "1.9m", "3.5m", "7m", "19m", "41m"]
_WIDTH_AND_DEPTH = {"tiny": (64, 2), "250k": (64, 8), "700k": (96, 10), "1.4m": (128, 12), "3.5m": (192, 14)}
_WIDTH_AND_DEPTH |= {"7m": (256, 16), "19m": (384, 20), "41m": (512, 24), "470k": (118, 4), "1.9m": (256, 4)}


def language_model_config(
    preset: LanguagePreset,
    objective: Objective,
    window: int,
    dropout: float = 0.0,
    *,
    tokenizer: TokenizerName = "char",
    k: int = 1,
    vocab_size: int = 16,
) -> DNALanguageModelConfig:
    """The configuration of a `DNALanguageModel` of this size. vocab_size: of the tokenizer, at least."""
    d_model, n_layer = _WIDTH_AND_DEPTH[preset]
    pattern = ("mamba",) if objective == "next" else ("bimamba",)
    backbone = BackboneConfig(d_model=d_model, n_layer=n_layer, pattern=pattern, dropout=dropout)
    vocab_size = -(-vocab_size // 8) * 8
    shape = {"backbone": backbone, "objective": objective, "window": window}
    return DNALanguageModelConfig(**shape, tokenizer=tokenizer, k=k, vocab_size=vocab_size)
