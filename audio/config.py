"""Sizes and settings of the audio models, free of torch: the command line is parsed before it loads."""

import math
from dataclasses import dataclass
from typing import Literal

from ..core.config import BackboneConfig
from ..core.inputs import require_fractions

N_CODES = 256  # a sample is one of 256 codes: see codec.py
START = 256  # stands before a recording's first sample; never predicted

LAYOUTS = ("unet", "sashimi")
CODECS = ("mu-law", "linear")
INPUTS = ("embedding", "float")
# Of core's mixers those that do not see what is to come, and whose state does not grow.
SEQUENTIAL = ("mamba", "s4d", "s4", "mlp")
Preset = Literal["tiny", "sc09-small", "sc09-large", "youtubemix"]
Codec = Literal["mu-law", "linear"]
Layout = Literal["unet", "sashimi"]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a causal U-Net over a sequence: stages of residual blocks at ever lower rates, and back.

    Rate 0 is the samples' own; each pool p makes one step of p and the width `widen` times as large. Where lists hold
    something for each rate, the outermost comes first.
    """

    d_model: int  # width at rate 0
    n_blocks: int  # of each stage
    pool: tuple[int, ...] = (4, 4)
    layout: str = "unet"  # stages before and after each pool; "sashimi": only after, and one skip around each
    stages: tuple[str, ...] = (
        "mamba",
    )  # mixers of each rate's blocks, joined by +: "s4+mlp"; the last goes on inwards
    widen: int = 2
    d_state: int = 16  # of mamba
    d_conv: int = 4
    expand: int = 2
    s4_state: int = 64  # of s4 and s4d, real numbers of a channel's state
    s4d_complex: bool = True
    ff: int = 2  # inner width of mlp / width
    norm: str = "rms"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("pool", "stages"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives a list
        _one_of("layout", self.layout, LAYOUTS)
        if any(p < 2 for p in self.pool):
            raise ValueError(f"pool is {self.pool}; each must be at least 2")
        if not 1 <= len(self.stages) <= len(self.pool) + 1:
            raise ValueError(f"stages is {self.stages}; give 1 to {len(self.pool) + 1} for pool {self.pool}")
        for name in ("n_blocks", "widen", "ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for mixer in (mixer for stage in self.stages for mixer in stage.split("+")):
            _one_of("a mixer of stages", mixer, SEQUENTIAL)
        for rate in range(len(self.pool) + 1):
            self.stage(rate)  # whose own checks speak

    @property
    def period(self) -> int:
        """Samples after which all rates begin a step together."""
        return math.prod(self.pool)

    def width(self, rate: int) -> int:
        return self.d_model * self.widen**rate

    def stage(self, rate: int) -> BackboneConfig:
        """The blocks of one stage at this rate."""
        pattern = tuple(self.stages[min(rate, len(self.stages) - 1)].split("+"))
        return BackboneConfig(
            d_model=self.width(rate),
            n_layer=self.n_blocks * len(pattern),
            pattern=pattern,
            d_state=self.d_state,
            d_conv=self.d_conv,
            expand=self.expand,
            s4_state=self.s4_state,
            s4d_complex=self.s4d_complex,
            mlp="gelu",
            mlp_bias=True,
            d_ff=self.ff * self.width(rate),
            norm=self.norm,
            dropout=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """A model of the next sample."""

    unet: UNetConfig
    sample_rate: int = 16000
    codec: str = "mu-law"
    input: str = "embedding"  # of codes; "float": their values through a linear map
    labels: tuple[str, ...] = ()  # classes that it can be asked for
    loudest: float = 1.0  # RMS of the loudest quarter of a second that it was trained on: for the watchdog

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        _one_of("codec", self.codec, CODECS)
        _one_of("input", self.input, INPUTS)
        if self.sample_rate < 1:
            raise ValueError(f"sample_rate is {self.sample_rate}; it must be at least 1")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels are {self.labels}; each may occur once")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(AudioConfig):
    """A classifier of recordings: the U-Net's way down, and a head over `labels`."""

    window: int = 16000  # most samples of a recording that are looked at

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) < 2:
            raise ValueError(f"labels are {self.labels}; a classifier needs at least two")


PRESETS = {
    "tiny": UNetConfig(d_model=32, n_blocks=2, d_state=8),
    # arXiv 2312.00752, section 4.4 and appendix E.4: 6.1, 24.3 and 3.5 million parameters
    "sc09-small": UNetConfig(d_model=64, n_blocks=8),
    "sc09-large": UNetConfig(d_model=96, n_blocks=15),
    "youtubemix": UNetConfig(d_model=64, n_blocks=3, pool=(16, 16)),
}


@dataclass(frozen=True, kw_only=True)
class Dividing:
    """Dividing recordings into train, valid and test. Parts that paths name stay; others are taken from train."""

    split_by: Literal["recording", "time"] = "recording"
    """Set aside whole files, copies staying together; or the end of each (for few long ones)."""
    valid_fraction: float = 0.1
    """Share of the training files set aside for validation, if no path names a validation part."""
    test_fraction: float = 0.1
    """Share of the training files set aside for the final test, if no path names a test part; 0 for none."""
    channels: Literal["mix", "split"] = "mix"
    """Of files with several channels: their average, or each channel as a recording of its own."""

    def __post_init__(self) -> None:
        require_fractions(self.valid_fraction, self.test_fraction)
