"""AudioModel: the next sample of a waveform, by a causal U-Net (unet.py) between codes and a head over codes.

A recording is START and then its codes (codec.py). Where a model has labels, one is added to what enters each rate of
the U-Net, and it is part of the state, so that it goes on with it. One more stands for "no label", which training puts
in place of some: a model that knows both can be guided (arXiv 2207.12598), see `Guided`.

AudioClassifier: which of its labels a recording has, from the mean of what the U-Net's way down makes of it.
Letters: B batch, L length, K labels.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.batching import at_places
from ..core.hub import PretrainedModel
from .codec import values
from .config import N_CODES, AudioConfig, ClassifierConfig
from .unet import UNet, UNetState


class AudioState(NamedTuple):
    """Where recordings stand."""

    label: Tensor  # (B,) int64; K for no label
    unet: UNetState


class CodeEmbedding(nn.Module):
    """Codes, or START, int (B, L) or (B,) -> (.., d_model): a row for each, or a linear map of their values."""

    def __init__(self, config: AudioConfig):
        super().__init__()
        width = config.unet.d_model
        if config.input == "embedding":
            self.table: Any = nn.Embedding(N_CODES + 1, width)
            with torch.no_grad():
                self.table.weight[:N_CODES] = _waves(width)
        else:
            self.linear = nn.Linear(1, width)
            self.values: Any
            self.register_buffer("values", F.pad(values(config.codec), (0, 1)), persistent=False)  # START is silence

    def forward(self, codes: Tensor) -> Tensor:
        if hasattr(self, "table"):
            return self.table(codes)
        return self.linear(self.values[codes][..., None])


def _waves(width: int) -> Tensor:
    """Rows (N_CODES, width) of cosines over the codes, of many frequencies: codes that are near have rows that are.

    That order is what random rows would have to learn; a sinusoidal input does the same in arXiv 2510.02401.
    """
    frequency = torch.exp(torch.rand(width) * math.log(N_CODES / 4))  # 1 to 64 half waves over all codes
    phase = 2 * math.pi * torch.rand(width)
    return math.sqrt(2) * torch.cos(torch.arange(N_CODES)[:, None] / N_CODES * math.pi * frequency + phase)


class AudioModel(PretrainedModel):
    """Logits (B, L, 256) of the next code for codes (B, L)."""

    config_class = AudioConfig
    step_is_one_graph = False  # but a whole period of them is: see writers.py

    def __init__(self, config: AudioConfig):
        super().__init__(config)
        self.embedding = CodeEmbedding(config)
        self.unet = UNet(config.unet)
        self.head = nn.Linear(config.unet.d_model, N_CODES)
        n_labels, rates = len(config.labels), range(len(config.unet.pool) + 1)
        self.label_embeddings: Any = nn.ModuleList(
            nn.Embedding(n_labels + 1, config.unet.width(rate)) for rate in rates if n_labels
        )

    @property
    def no_label(self) -> int:
        return len(self.config.labels)

    def forward(
        self,
        codes: Tensor,
        state: AudioState | None = None,
        *,
        labels: Tensor | None = None,
        return_state: bool = False,
        padding_mask: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> Any:
        """codes int (B, L), or START -> logits, or (logits, state) iff return_state.

        labels     int (B,), `no_label` for none, which is what all rows have if it is left out. With a state they are
                   the state's.
        logits_at  int64 (B,): only the logits (B, 256) at that place of each row
        Other options as of `UNet.forward`.
        """
        if state is not None and labels is not None:
            raise ValueError("labels belong to a recording's begin; a state has them")
        if labels is None:
            labels = codes.new_full((len(codes),), self.no_label) if state is None else state.label
        unet = None if state is None else state.unet
        out = self.unet(
            self.embedding(codes),
            unet,
            condition=self._condition(labels),
            return_state=return_state,
            padding_mask=padding_mask,
        )
        y = out[0] if return_state else out
        logits = self.head(y if logits_at is None else at_places(y, logits_at))
        return (logits, AudioState(labels, out[1])) if return_state else logits

    def init_state(self, batch_size: int, labels: Tensor | None = None) -> AudioState:
        """The state before START; labels int (B,)."""
        unet = self.unet.init_state(batch_size)
        if labels is None:
            labels = torch.full_like(unet.position, self.no_label)
        return AudioState(labels.to(unet.position.device), unet)

    @torch.no_grad()
    def step(self, codes: Tensor, state: AudioState) -> Tensor:
        """One code of each recording: int (B,) -> logits (B, 256); `state` updated in place."""
        return self.head(self.unet.step(self.embedding(codes), state.unet, self._condition(state.label)))

    @torch.no_grad()
    def step_at(self, phase: int, codes: Tensor, state: AudioState) -> Tensor:
        """`step` where all rows stand at this place of the period: see `UNet.step_at`."""
        return self.head(self.unet.step_at(phase, self.embedding(codes), state.unet, self._condition(state.label)))

    def _condition(self, labels: Tensor) -> Sequence[Tensor] | None:
        return [embedding(labels) for embedding in self.label_embeddings] if self.config.labels else None


class GuidedState(NamedTuple):
    wanted: AudioState
    without: AudioState  # the same recordings with no label


class Guided:
    """A model whose labels count for more: logits without + scale (with - without); scale 1 is the model itself.

    It is to generation what a model is; both of its readings are made at every step.
    """

    def __init__(self, model: AudioModel, scale: float):
        self.model, self.scale = model, scale

    def __call__(self, codes: Tensor, state: GuidedState, *, return_state: bool = True, **options: Any) -> Any:
        wanted, state_wanted = self.model(codes, state.wanted, return_state=True, **options)
        without, state_without = self.model(codes, state.without, return_state=True, **options)
        return self._mixed(wanted, without), GuidedState(state_wanted, state_without)

    def step(self, codes: Tensor, state: GuidedState) -> Tensor:
        return self._mixed(self.model.step(codes, state.wanted), self.model.step(codes, state.without))

    def step_at(self, phase: int, codes: Tensor, state: GuidedState) -> Tensor:
        return self._mixed(
            self.model.step_at(phase, codes, state.wanted), self.model.step_at(phase, codes, state.without)
        )

    def init_state(self, batch_size: int, labels: Tensor | None = None) -> GuidedState:
        return GuidedState(self.model.init_state(batch_size, labels), self.model.init_state(batch_size))

    def _mixed(self, wanted: Tensor, without: Tensor) -> Tensor:
        return torch.lerp(without.float(), wanted.float(), self.scale)


def bare_model(model: Any) -> AudioModel:
    """The model itself, guided or not."""
    return model.model if isinstance(model, Guided) else model


class AudioClassifier(PretrainedModel):
    """Logits (B, K) for codes (B, L)."""

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig):
        super().__init__(config)
        self.embedding = CodeEmbedding(config)
        self.unet = UNet(config.unet, only_down=True)
        self.head = nn.Linear(config.unet.width(len(config.unet.pool)), len(config.labels))

    def forward(self, codes: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """codes int (B, L), padded on the right as padding_mask (B, L) says (True = real) -> (B, K)."""
        return self.head(self.features(codes, padding_mask))

    def features(self, codes: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the head sees of each recording: (B, D)."""
        z, mask = self.unet.encode(self.embedding(codes), padding_mask)
        if mask is None:
            return z.mean(1)
        return z.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
