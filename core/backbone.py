"""The backbone that every modality shares: a stack of pre-norm residual blocks.

    for block:  x = mixer(norm(stream + x))        the residual stream in float32
    y = norm_f(stream + x)

Each add belongs to the norm after it: a block returns what it adds to the stream, and the stream that it was added to.

Parameter names are mamba-ssm's: layers.{i}.norm, layers.{i}.mixer, norm_f. Letters: B batch, L length, S sequences.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import BackboneConfig
from .mamba import BiMamba, Mamba, MambaState
from .norm import NORM_CLASSES

MIXER_CLASSES = {"mamba": Mamba, "bimamba": BiMamba}
State = list[MambaState]  # one entry a layer


class Block(nn.Module):
    """(x, stream) -> (mixer(norm(stream + x)), stream + x): what comes next adds the two."""

    def __init__(self, config: BackboneConfig, mixer: str):
        super().__init__()
        self.norm = NORM_CLASSES[config.norm](config.d_model, config.norm_eps)
        self.mixer: Any = MIXER_CLASSES[mixer](
            config.d_model, config.d_state, config.d_conv, config.expand, dt_rank=config.dt_rank
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, stream: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor, MambaState | None]:
        normed, residual = self.norm(x, stream)
        out = self.mixer(normed, **kwargs)
        out, state = out if isinstance(out, tuple) else (out, None)
        return self.dropout(out), residual, state

    def step(self, x: Tensor, stream: Tensor | None, state: MambaState) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm.step(x, stream)
        return self.mixer.step(normed, state), residual


class Backbone(nn.Module):
    """(B, L, d_model) -> (B, L, d_model): embeddings in, hidden states out. Heads belong to the modalities."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        names = (config.pattern[i % len(config.pattern)] for i in range(config.n_layer))
        self.layers: Any = nn.ModuleList(Block(config, name) for name in names)
        self.norm_f = NORM_CLASSES[config.norm](config.d_model, config.norm_eps)
        self.gradient_checkpointing = False  # trade one more forward for not keeping each block's activations
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """What mamba-ssm's MixerModel does on top of the blocks' own initialisation.

        out_proj.weight   divided by sqrt(n_layer): the residual stream's variance then does not grow with depth
                          (GPT-2's scheme)
        """
        for block in self.layers:
            block.mixer.out_proj.weight /= math.sqrt(self.config.n_layer)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """x (B, L, d_model) -> y of the same shape, or (y, state) iff return_state.

        state         from `init_state` or an earlier call: continues those sequences. It is not changed.
        cu_seqlens    (S + 1,) int32: B = 1 holds S sequences end to end; states are then (S, ...).
        padding_mask  bool (B, L), True = real token; a row's real tokens stand in one run (padded left, right or both).
                      Padding changes no real token's result, its own outputs are zero, and the state returned is that
                      after each row's last real token.

        Raises ValueError for cu_seqlens with padding_mask or B > 1, for a mask with a hole, and for a state with a
        bidirectional mixer.
        """
        if (state is not None or return_state) and self.config.bidirectional:
            raise ValueError("a bidirectional backbone has no state: every output depends on the whole sequence")
        if cu_seqlens is not None and (padding_mask is not None or x.shape[0] != 1):
            raise ValueError(
                f"cu_seqlens packs sequences in a batch of 1 and takes no padding_mask; got batch {x.shape[0]}"
            )
        if padding_mask is not None:
            return self._forward_padded(x, state, return_state, padding_mask)
        stream, states = None, []
        for i, block in enumerate(self.layers):
            options: dict[str, Any] = {"cu_seqlens": cu_seqlens}
            if not self.config.bidirectional:
                options |= {"state": None if state is None else state[i], "return_state": return_state}
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, stream, block_state = checkpoint(block, x, stream, use_reentrant=False, **options)  # pyright: ignore
            else:
                x, stream, block_state = block(x, stream, **options)
            states.append(block_state)
        y, _ = self.norm_f(x, stream)
        return (y, states) if return_state else y

    def _forward_padded(
        self, x: Tensor, state: State | None, return_state: bool, mask: Tensor
    ) -> Tensor | tuple[Tensor, State]:
        """Each row as three packed sequences: padding before, real tokens, padding after. Shapes stay static."""
        batch, length, _ = x.shape
        if tuple(mask.shape) != (batch, length) or mask.dtype != torch.bool:
            raise ValueError(f"padding_mask must be bool {(batch, length)}; got {mask.dtype} {tuple(mask.shape)}")
        n_real = mask.sum(1)
        first = torch.where(n_real > 0, mask.int().argmax(1), 0)
        in_one_run = (mask.diff(dim=1).sum(1) <= 2 - mask[:, 0].int() - mask[:, -1].int()).all()
        if torch.compiler.is_compiling():
            torch._assert_async(in_one_run, "padding_mask has a row whose real tokens are not in one run")
        elif not in_one_run:
            raise ValueError(
                "padding_mask has a row whose real tokens are not in one run: pad rows on the left or right only"
            )
        row_start = torch.arange(batch, device=x.device) * length
        starts = torch.stack((row_start, row_start + first, row_start + first + n_real), dim=1).flatten()
        cu_seqlens = torch.cat((starts, starts.new_full((1,), batch * length))).to(torch.int32)
        if state is not None:
            state = [MambaState(*(_at_real_tokens(s) for s in layer)) for layer in state]
        x = x.masked_fill(~mask[..., None], 0)
        out = self.forward(x.reshape(1, batch * length, -1), state, return_state=return_state, cu_seqlens=cu_seqlens)
        y, states = out if isinstance(out, tuple) else (out, [])
        y = y.view(x.shape).masked_fill(~mask[..., None], 0)
        return (y, [MambaState(*(s[1::3] for s in layer)) for layer in states]) if return_state else y

    def init_state(self, batch_size: int, max_length: int | None = None) -> State:
        """The state before the first token. `max_length` is for mixers whose state grows; Mamba's does not."""
        if self.config.bidirectional:
            raise ValueError("a bidirectional backbone has no state: every output depends on the whole sequence")
        return [block.mixer.init_state(batch_size) for block in self.layers]

    def step(self, x: Tensor, state: State) -> Tensor:
        """One token: x (B, d_model) -> y (B, d_model); `state` updated in place. For inference: no gradients."""
        if self.config.bidirectional:
            raise ValueError("a bidirectional backbone has no step: every output depends on the whole sequence")
        stream = None
        for block, block_state in zip(self.layers, state, strict=True):
            x, stream = block.step(x, stream, block_state)
        return self.norm_f.step(x, stream)[0]


def _at_real_tokens(s: Tensor) -> Tensor:
    """States (B, ...) as those of three sequences a row, of which the middle one is real: (3B, ...)."""
    nothing = torch.zeros_like(s)
    return torch.stack((nothing, s, nothing), dim=1).flatten(0, 1)


def aux_loss(model: nn.Module) -> Tensor | float:
    """Sum of the auxiliary losses that modules left in `module.aux_loss` in this forward; 0.0 if there are none.

    A module assigns its own loss instead of adding to a shared one, so that running its forward again under activation
    checkpointing does not count it twice.
    """
    losses = [getattr(module, "aux_loss", None) for module in model.modules()]
    return sum((loss for loss in losses if isinstance(loss, Tensor)), start=0.0)
