"""Settings of the DNA models, free of torch so that the command line can be parsed before it loads."""

from dataclasses import dataclass
from typing import Literal

from ..core.config import BackboneConfig


@dataclass(frozen=True, kw_only=True)
class DNAClassifierConfig:
    """A backbone between a base embedding and a pooled linear head."""

    backbone: BackboneConfig
    classes: tuple[str, ...]  # in the order of the logits
    n_heads: int = 64  # of the attention pooling
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON gives a list
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise ValueError(f"classes {self.classes}: at least two are needed, each with a name of its own")


Preset = Literal["tiny", "small", "base"]
PRESETS = {
    "tiny": BackboneConfig(d_model=32, n_layer=1, d_state=8, dropout=0.2, pattern=("bimamba",)),
    "small": BackboneConfig(d_model=128, n_layer=4, d_state=16, dropout=0.2, pattern=("bimamba",)),
    "base": BackboneConfig(d_model=256, n_layer=8, d_state=16, dropout=0.2, pattern=("bimamba",)),
}
