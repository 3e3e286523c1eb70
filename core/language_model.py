"""A causal language model over token ids: embedding, backbone, head. What the tokens mean is a modality's matter."""

import torch
from torch import Tensor, nn

from ..kernels import few_rows_head
from .backbone import Backbone, State
from .batching import at_places
from .config import LanguageModelConfig
from .hub import PretrainedModel
from .mamba_at_once import as_made
from .norm import AddLayerNorm, AddRMSNorm


class LanguageModel(PretrainedModel):
    """Logits (B, L, vocab_size) for token ids (B, L)."""

    config_class = LanguageModelConfig

    def __init__(self, config: LanguageModelConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.backbone.d_model)
        self.backbone = Backbone(config.backbone)
        self.lm_head = nn.Linear(config.backbone.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """tokens int (B, L) -> logits, or (logits, state) iff return_state. Other options as of `Backbone.forward`.

        logits_at  int64 (B,): only the logits (B, vocab_size) at that place of each row, which saves the others' time
        """
        out = self.backbone(
            self.embedding(tokens), state, return_state=return_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask
        )
        y = out[0] if isinstance(out, tuple) else out
        logits = self.lm_head(y if logits_at is None else at_places(y, logits_at))
        return (logits, out[1]) if isinstance(out, tuple) else logits

    def init_state(self, batch_size: int, max_length: int | None = None) -> State:
        """The state before the first token. See `Backbone.init_state`."""
        return self.backbone.init_state(batch_size, max_length)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> Tensor:
        """One token for each sequence: int (B,) -> logits (B, vocab_size); `state` updated in place."""
        x, norm = self.embedding(tokens), self.backbone.norm_f
        stream = self.backbone.step_at_once(x, state)
        if stream is None:
            return self.lm_head(self.backbone.step(x, state))
        logits = None
        if as_made(norm, self.lm_head, kinds=(AddRMSNorm, AddLayerNorm, nn.Linear)) and self.lm_head.bias is None:
            bias = norm._parameters.get("bias")
            logits = few_rows_head(stream, norm.weight, bias, self.lm_head.weight, norm.eps)
        return self.lm_head(norm.step(stream, None)[0]) if logits is None else logits
