"""A causal language model over token ids: embedding, backbone, head. What the tokens mean is a modality's matter."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..kernels import WayOut, hand_over, largest, likeliest
from .autocast import autocast_dtype
from .backbone import Backbone, State
from .batching import at_places
from .config import LanguageModelConfig
from .graphed import SHORTEST
from .head_loss import head_loss, is_plain
from .hub import PretrainedModel
from .mamba_at_once import as_made


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
        targets: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """tokens int (B, L) -> logits, or (logits, state) iff return_state. Other options as of `Backbone.forward`.

        logits_at  int64 (B,): only the logits (B, vocab_size) at that place of each row, which saves the others' time
        targets    int64 (B, L): in place of the logits, the mean cross-entropy of these, in nats; -100 is none. Of
                   logits 2^28 at most then exist at once, but where a tracer or a hook would miss them (head_loss.py).
                   ValueError with return_state or logits_at
        """
        out = self.backbone(
            self.embedding(tokens), state, return_state=return_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask
        )
        y = out[0] if isinstance(out, tuple) else out
        if targets is not None:
            if return_state or logits_at is not None:
                raise ValueError("with targets there is a loss alone: give neither return_state nor logits_at")
            return head_loss(self.lm_head, y, targets)
        logits = self.lm_head(y if logits_at is None else at_places(y, logits_at))
        return (logits, out[1]) if isinstance(out, tuple) else logits

    def init_state(self, batch_size: int, max_length: int | None = None) -> State:
        """The state before the first token. See `Backbone.init_state`."""
        return self.backbone.init_state(batch_size, max_length)

    @property
    def forward_is_one_graph(self) -> bool:
        """Whether a forward launches the same kernels whatever the tokens are, and waits for none of them."""
        config = self.config.backbone
        short = config.d_conv <= SHORTEST  # a window longer than the prompt is put together by the host
        return config.mixers <= {"mamba", "mlp"} and short and self.lm_head.weight.dtype != torch.float64

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> Tensor:
        """One token for each sequence: int (B,) -> logits (B, vocab_size); `state` updated in place."""
        return self.lm_head(self.backbone.step(self.embedding(tokens), state))

    @torch.no_grad()
    def step_likeliest(self, tokens: Tensor, state: State, out: WayOut) -> None:
        """`largest` of `step`, handed over: without logits in memory, where nothing would be missed by that."""
        unseen = not all_modules._has_any_global_hook()
        if unseen and self._reads_rows():
            hidden = self.backbone.step(self.embedding.weight, state, rows=tokens)
        else:
            hidden = self.backbone.step(self.embedding(tokens), state)
        if unseen and is_plain(self.lm_head) and autocast_dtype(hidden) == hidden.dtype:
            likeliest(hidden, self.lm_head.weight, out)
        else:
            hand_over(*largest(self.lm_head(hidden)), out)

    def _reads_rows(self) -> bool:
        """Whether the backbone's step may read the embedding's weight by itself, of each token that the head knows."""
        embedding, backbone = self.embedding, self.backbone
        plain = as_made(embedding, kinds=(nn.Embedding,)) and embedding.max_norm is None
        own_step = type(backbone).step is Backbone.step and "step" not in vars(backbone)
        known = getattr(self.lm_head, "weight", None)  # of an adapter, who knows
        return plain and own_step and known is not None and len(known) <= len(embedding.weight)
