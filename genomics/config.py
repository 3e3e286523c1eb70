"""Settings of the DNA models, free of torch so that the command line can be parsed before it loads."""

from dataclasses import dataclass
from typing import Literal

from ..core.config import BackboneConfig

# What a language model learns: each base from those before it; hidden bases from both sides.
Objective = Literal["next", "masked"]

# What is said of a sequence: one of several classes; any number of labels; a number.
Target = Literal["multiclass", "multilabel", "regression"]


@dataclass(frozen=True, kw_only=True)
class DNAClassifierConfig:
    """A backbone between a base embedding and a pooled linear head, and what the model expects of its input.

    classes       in the order of the outputs; for regression the one name of the value
    mean, scale   regression: the value is mean + scale * output
    window        bases of the windows that long sequences were cut into for training; None if they were left whole
    hard_mask     lower-case letters of the files are read as N
    """

    backbone: BackboneConfig
    classes: tuple[str, ...]
    target: Target = "multiclass"
    mean: float = 0.0
    scale: float = 1.0
    window: int | None = None
    hard_mask: bool = False
    n_heads: int = 64  # of the attention pooling; 0: the mean over the bases alone, and no places
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON gives a list
        least = 2 if self.target == "multiclass" else 1
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < least:
            raise ValueError(f"classes {self.classes}: at least {least} needed, each with a name of its own")
        if self.target == "regression" and len(self.classes) != 1:
            raise ValueError(f"classes {self.classes}: a regression has one value")


Preset = Literal["tiny", "small", "base"]
PRESETS = {
    "tiny": BackboneConfig(d_model=32, n_layer=1, d_state=8, dropout=0.2, pattern=("bimamba",)),
    "small": BackboneConfig(d_model=128, n_layer=4, d_state=16, dropout=0.2, pattern=("bimamba",)),
    "base": BackboneConfig(d_model=256, n_layer=8, d_state=16, dropout=0.2, pattern=("bimamba",)),
}
