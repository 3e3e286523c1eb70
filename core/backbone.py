"""The backbone that every modality shares: a stack of pre-norm residual blocks.

    for block:  x = mixer(norm(stream + x))        the residual stream in float32
    y = norm_f(stream + x)

Each add belongs to the norm after it: a block returns what it adds to the stream, and the stream that it was added to.

Parameter names are mamba-ssm's: layers.{i}.norm, layers.{i}.mixer, norm_f. Letters: B batch, L length, S sequences.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import mamba_stack_step
from . import parallel
from .attention import Attention
from .config import BackboneConfig
from .lru import LRU
from .mamba import BiMamba, Mamba
from .mixer_sum import MixerSum
from .mlp import MLP
from .moe import MoE
from .norm import NORM_CLASSES, AddNoNorm
from .padding import Padding
from .s4 import S4
from .s4d import S4D

State = list[Any]  # one entry a layer: its mixer's NamedTuple of tensors whose first axis is the batch, or several


def mixer_of(name: str, c: BackboneConfig) -> nn.Module:
    """A mixer maps (B, L, d_model) to the same shape, by `forward`, `forward_padded` and `step`, with a state.

    The last projection, which writes to the residual stream, is called out_proj. `projects_input` says whether its
    forward does nothing with its input but project it.
    """
    if "+" in name:
        return MixerSum(mixer_of(part, c) for part in name.split("+"))
    if name == "attention":
        return Attention(c.d_model, c.heads, c.rope_theta)
    if name == "mlp":
        return MLP(c.d_model, c.ff_width, c.mlp, bias=c.mlp_bias)
    if name == "moe":
        return MoE(c.d_model, c.moe)
    if name == "lru":
        return LRU(c.d_model, c.lru)
    if name == "s4d":
        return S4D(c.d_model, c.s4_state, is_complex=c.s4d_complex)
    if name == "s4":
        return S4(c.d_model, c.s4_state)
    mamba = {"mamba": Mamba, "bimamba": BiMamba}[name]
    return mamba(c.d_model, c.d_state, c.d_conv, c.expand, dt_rank=c.dt_rank)


class Block(nn.Module):
    """(x, stream) -> (mixer(norm(stream + x)), stream + x): what comes next adds the two."""

    def __init__(self, config: BackboneConfig, mixer: str):
        super().__init__()
        self.norm = NORM_CLASSES[config.norm](config.d_model, config.norm_eps)
        self.mixer: Any = mixer_of(mixer, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, stream: Tensor | None, padding: Padding | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Any]:
        if padding is None and type(self.mixer) is Mamba:  # what wraps one may have more to do
            found = self.mixer.forward_with(self.norm, x, stream, **options)
            if found is not None:
                return self.dropout(found[0]), *found[1:]
        normed, residual = self.norm(x, stream, projected=self.mixer.projects_input)
        if padding is None:
            out = self.mixer(normed, **options)
        else:
            out = self.mixer.forward_padded(normed, padding, **options)
        out, state = out if isinstance(out, tuple) else (out, None)
        return self.dropout(out), residual, state

    def step(self, x: Tensor, stream: Tensor | None, state: Any) -> tuple[Tensor, Tensor]:
        at_once = self.mixer.step_with(self.norm, x, stream, state) if hasattr(self.mixer, "step_with") else None
        if at_once is not None:
            return at_once
        normed, residual = self.norm.step(x, stream)
        return self.mixer.step(normed, state), residual


class Backbone(nn.Module):
    """(B, L, d_model) -> (B, L, d_model): embeddings in, hidden states out. Heads belong to the modalities."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        names = (config.pattern[i % len(config.pattern)] for i in range(config.n_layer))
        self.layers: Any = nn.ModuleList(Block(config, name) for name in names)
        self.norm_f = NORM_CLASSES[config.norm](config.d_model, config.norm_eps) if config.final_norm else AddNoNorm()
        self.gradient_checkpointing = False  # trade one more forward for not keeping each block's activations
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """What mamba-ssm's MixerModel does on top of the blocks' own initialisation.

        out_proj.weight   divided by sqrt(n_layer): the residual stream's variance then does not grow with depth
                          (GPT-2's scheme)
        """
        for mixer in self.layers.modules():
            if hasattr(mixer, "out_proj"):
                mixer.out_proj.weight /= math.sqrt(self.config.n_layer)

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

        Inside `context_parallel` x and padding_mask are the pieces of this process, cu_seqlens that of the whole.

        Raises ValueError for cu_seqlens with padding_mask or B > 1, for a mask with a hole, for a state with a
        bidirectional mixer, and for mixers of which the sequence cannot be cut.
        """
        if parallel.current() is not None and not self.config.mixers <= parallel.SPLITTABLE:
            raise ValueError(
                f"context_parallel: {', '.join(sorted(self.config.mixers - parallel.SPLITTABLE))} cannot be cut along "
                f"the sequence; use {', '.join(sorted(parallel.SPLITTABLE))}"
            )
        if (state is not None or return_state) and self.config.bidirectional:
            raise ValueError("a bidirectional backbone has no state: every output depends on the whole sequence")
        if cu_seqlens is not None and (padding_mask is not None or x.shape[0] != 1):
            raise ValueError(
                f"cu_seqlens packs sequences in a batch of 1 and takes no padding_mask; got batch {x.shape[0]}"
            )
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        if padding_mask is not None:
            if padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool:
                raise ValueError(
                    f"padding_mask must be bool {tuple(x.shape[:2])}; got {padding_mask.dtype} "
                    f"{tuple(padding_mask.shape)}"
                )
            options = {"padding": Padding.of(padding_mask)}
            x = x.masked_fill(~padding_mask[..., None], 0)
        stream, states = None, []
        for i, block in enumerate(self.layers):
            if not self.config.bidirectional:
                options |= {"state": None if state is None else state[i], "return_state": return_state}
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, stream, block_state = checkpoint(  # pyright: ignore[reportGeneralTypeIssues]
                    block, x, stream, use_reentrant=False, context_fn=parallel.recomputing, **options
                )
            else:
                x, stream, block_state = block(x, stream, **options)
            states.append(block_state)
        y, _ = self.norm_f(x, stream)
        if padding_mask is not None:
            y = y.masked_fill(~padding_mask[..., None], 0)
        return (y, states) if return_state else y

    def init_state(self, batch_size: int, max_length: int | None = None) -> State:
        """The state before the first token. A state that grows (attention's) gets room for `max_length` tokens."""
        if self.config.bidirectional:
            raise ValueError("a bidirectional backbone has no state: every output depends on the whole sequence")
        return [block.mixer.init_state(batch_size, max_length) for block in self.layers]

    def step(self, x: Tensor, state: State, *, rows: Tensor | None = None) -> Tensor:
        """One token: x (B, d_model) -> y (B, d_model); `state` updated in place. For inference: no gradients.

        rows  int64 (B,): of x, which is then an embedding's weight; they have to be there
        """
        if self.config.bidirectional:
            raise ValueError("a bidirectional backbone has no step: every output depends on the whole sequence")
        if rows is not None and not (x.is_contiguous() and x.data_ptr() % 16 == 0):  # kernels read 16 bytes at a time
            x, rows = F.embedding(rows, x), None
        stream = self._step_at_once(x, state, rows)
        if stream is not None:
            return self.norm_f.step(stream, None)[0]
        x = x if rows is None else F.embedding(rows, x)
        for block, block_state in zip(self.layers, state, strict=True):
            x, stream = block.step(x, stream, block_state)
        return self.norm_f.step(x, stream)[0]

    def _step_at_once(self, x: Tensor, state: State, rows: Tensor | None) -> Tensor | None:
        """The stream after all blocks, where kernels take these as a whole; None, and nothing is done, elsewhere."""
        if not x.is_cuda or self.config.mixers != {"mamba"} or not self.config.final_norm:
            return None
        if not all(type(block) is Block and hasattr(block.mixer, "weights_with") for block in self.layers):
            return None
        weights = [b.mixer.weights_with(b.norm, x, s) for b, s in zip(self.layers, state, strict=True)]
        if None in weights:
            return None
        return mamba_stack_step(x, state, weights, self.config.norm_eps, rows=rows)


def aux_loss(model: nn.Module) -> Tensor | float:
    """Sum of the auxiliary losses that modules left in `module.aux_loss` in this forward; 0.0 if there are none.

    A module assigns its own loss instead of adding to a shared one, so that running its forward again under activation
    checkpointing does not count it twice.
    """
    losses = [getattr(module, "aux_loss", None) for module in model.modules()]
    return sum((loss for loss in losses if isinstance(loss, Tensor)), start=0.0)
