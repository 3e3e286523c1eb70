"""ByteLM: a language model over raw bytes, with no tokenizer (MambaByte, arXiv 2401.13660).

`core.LanguageModel` with ids of its own (config.py). The paper's checkpoints load by `polymamba convert mambabyte`. B
batch, L length.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.backbone import State
from ..core.config import LanguageModelConfig
from ..core.convert import from_mamba_ssm
from ..core.errors import InputError
from ..core.language_model import LanguageModel
from .config import DOCUMENT, LINE_FEED, N_BYTES, N_IDS


class ByteLM(LanguageModel):
    """Logits (B, L, N_IDS) of the next byte, or of the document's end, for ids (B, L): bytes, or DOCUMENT.

    A model of the bytes alone (vocab_size 256: MambaByte's own) never predicts an end, and where a document begins it
    reads a line feed.

    Raises ValueError for a vocabulary without all bytes, and for a backbone that sees what is to be predicted.
    """

    def __init__(self, config: LanguageModelConfig):
        if config.vocab_size < N_BYTES:
            raise ValueError(f"vocab_size is {config.vocab_size}; the bytes need at least {N_BYTES}")
        if config.backbone.bidirectional:
            raise ValueError("a bidirectional backbone sees the bytes that it should predict; use causal mixers")
        super().__init__(config)

    def forward(self, tokens: Tensor, state: State | None = None, **options: Any) -> Any:
        """ids int (B, L) -> logits, or (logits, state) with return_state=True. Options as of `LanguageModel`.

        Raises ValueError for `targets`: its head has outputs that stand for nothing (training.next_byte_loss leaves
        them out).
        """
        if options.get("targets") is not None:
            raise ValueError(
                "a ByteLM takes no targets; its loss is polymamba.bytes.training.next_byte_loss(model, ids)"
            )
        out = super().forward(self._known(tokens), state, **options)
        return (_of_ids(out[0]), out[1]) if isinstance(out, tuple) else _of_ids(out)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> Tensor:
        """One id for each sequence: int (B,) -> logits (B, N_IDS); `state` updated in place."""
        return _of_ids(super().step(self._known(tokens), state))

    def _known(self, tokens: Tensor) -> Tensor:
        if self.config.vocab_size > N_BYTES:
            return tokens
        return torch.where(tokens == DOCUMENT, LINE_FEED, tokens)


def _of_ids(logits: Tensor) -> Tensor:
    """Logits (.., V) -> (.., N_IDS): what only pads the head, or is not in it, cannot be predicted."""
    return F.pad(logits[..., :N_IDS], (0, max(N_IDS - logits.shape[-1], 0)), value=-torch.inf)


def from_mambabyte(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> ByteLM:
    """An official MambaByte checkpoint: mamba-ssm's keys, 256 ids; `config` is its config.json."""
    if config["vocab_size"] != N_BYTES:
        raise InputError(f"vocab_size is {config['vocab_size']}; a MambaByte model has {N_BYTES} (else: mamba-ssm)")
    converted = from_mamba_ssm(state_dict, config)
    model = ByteLM(converted.config)
    model.load_state_dict(converted.state_dict())
    return model.eval()
