"""Training of a small model on generated sequences, as fast as its GPU lets it, and its test.

Models of two layers are over sooner than Python can launch their kernels. So a whole step (forward, backward, clipping,
AdamW) is captured as one CUDA graph and replayed; sequences are made on the device, for BLOCK steps at a time; the host
looks at the loss once a block. On a CPU the same steps are run one by one.

A block's sequences follow from (seed, step). A checkpoint is one safetensors file, written whole or not at all.
Letters: B sequences, L length, Q answers.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from generators import NONE, Batch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig
from polymamba.core.files import written_whole
from polymamba.core.optim import learning_rate, parameter_groups

BLOCK = 20  # steps
WARM_UPS = 3  # steps before the capture: kernels are compiled and libraries set up in them
SAVE_EVERY = 60  # seconds
PIECE = 1 << 19  # tokens of a batch that are run at once in a test, where the state carries on
PATTERNS = {
    "mamba": ("mamba",),
    "s4d": ("s4d",),
    "lru": ("lru",),
    "attention": ("attention", "mlp"),
    "hybrid": ("mamba", "attention"),
}


def build(
    mixer: str, vocab_size: int, d_model: int, n_layer: int, d_state: int, rope: bool, dropout: float = 0.0
) -> LanguageModel:
    """n_layer layers; one of attention is attention and an MLP, of inner width 2 d_model."""
    pattern = PATTERNS[mixer]
    backbone = BackboneConfig(
        d_model=d_model,
        n_layer=n_layer * (2 if "mlp" in pattern else 1),
        pattern=pattern,
        d_state=d_state,
        n_heads=max(1, d_model // 32),
        rope_theta=10000.0 if rope else None,
        mlp="gelu",
        d_ff=2 * d_model,
        dropout=dropout,
    )
    return LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=vocab_size, tie_embeddings=False))


def answered(model: LanguageModel, batch: Batch, pooled: bool = False) -> Tensor:
    """Logits (B, Q, V) at the places alone: the head is not run over what nobody asks for.

    pooled: not of the hidden state there, but of the mean of all from the first token to there.
    """
    hidden = model.backbone(model.embedding(batch.tokens))
    assert isinstance(hidden, Tensor)
    if pooled:
        up_to = torch.arange(hidden.shape[1], device=hidden.device) <= batch.places[..., None]  # (B, Q, L)
        return model.lm_head(torch.bmm(up_to.to(hidden.dtype), hidden) / (batch.places[..., None] + 1))
    return model.lm_head(hidden.gather(1, batch.places[..., None].expand(-1, -1, hidden.shape[2])))


def answered_in_pieces(model: LanguageModel, batch: Batch, piece: int) -> Tensor:
    """`answered`, not pooled, `piece` tokens of each row at a time: only the state goes on from one to the next."""
    state, hidden = None, None
    for start in range(0, batch.tokens.shape[1], piece):
        y, state = model.backbone(model.embedding(batch.tokens[:, start : start + piece]), state, return_state=True)
        at = batch.places - start
        here = (at >= 0) & (at < y.shape[1])
        found = y.gather(1, at.clamp(0, y.shape[1] - 1)[..., None].expand(-1, -1, y.shape[2]))
        hidden = found if hidden is None else torch.where(here[..., None], found, hidden)
    assert hidden is not None
    return model.lm_head(hidden)


class Training:
    """A model, its optimizer, and where they stand."""

    def __init__(
        self, model: LanguageModel, device: str, *, lr: float, weight_decay: float, bf16: bool, graph: bool, seed: int,
        pooled: bool = False,
    ):  # fmt: skip
        self.model, self.device, self.lr, self.seed, self.pooled = model.to(device), device, lr, seed, pooled
        self.bf16, self.cuda = bf16, device.startswith("cuda")
        self.graphed = graph and self.cuda
        groups = parameter_groups(model, weight_decay)
        for group in groups:  # a number on the device: a captured step reads it anew
            group["lr"] = torch.tensor(lr, device=device) if self.cuda else lr
        options = {"fused": True, "capturable": True} if self.cuda else {}
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), **options)
        self.steps, self.seconds, self.level = 0, 0.0, 0
        self.curve: list[tuple[int, float, float]] = []  # step, loss, accuracy: means of a block
        self._graph: torch.cuda.CUDAGraph | None = None
        self._shape: object = None
        self._sums = torch.zeros(2, device=device)
        self._inputs: Batch | None = None

    def autocast(self) -> torch.autocast:
        return torch.autocast("cuda" if self.cuda else "cpu", torch.bfloat16, enabled=self.bf16)

    def block(self, make: Callable[[int, torch.Generator], Batch], batch_size: int, factor: float) -> float:
        """BLOCK steps at `factor` of the peak learning rate; returns the share of right answers."""
        began = time.monotonic()
        for group in self.optimizer.param_groups:
            lr = learning_rate(group, self.lr, factor)
            group["lr"].fill_(lr) if self.cuda else group.update(lr=lr)
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + self.steps)
        all_of_them = make(BLOCK * batch_size, generator)
        batches = [Batch(*x) for x in zip(*(x.split(batch_size) for x in all_of_them), strict=True)]
        shape = tuple(x.shape for x in batches[0])
        if shape != self._shape:
            self._graph, self._shape = None, shape  # its memory first
            self._inputs = Batch(*(x.clone() for x in batches[0]))
        self._sums.zero_()
        if self.graphed and self._graph is None:
            self._capture(batches[:WARM_UPS])
            batches = batches[WARM_UPS:]
        for batch in batches:
            self._take(batch)
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        loss, accuracy = (self._sums / BLOCK).tolist()
        self.steps += BLOCK
        self.seconds += time.monotonic() - began
        self.curve.append((self.steps, loss, accuracy))
        if not math.isfinite(loss):
            raise SystemExit(f"step {self.steps}: the loss is {loss}")
        return accuracy

    def _take(self, batch: Batch) -> None:
        assert self._inputs is not None
        for mine, given in zip(self._inputs, batch, strict=True):
            mine.copy_(given)

    def _step(self) -> None:
        assert self._inputs is not None
        self.optimizer.zero_grad()
        answers = self._inputs.answers
        with self.autocast():
            logits = answered(self.model, self._inputs, self.pooled).float()
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=NONE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            right = ((logits.argmax(-1) == answers) & (answers != NONE)).sum() / (answers != NONE).sum()
            self._sums.add_(torch.stack((loss.detach(), right)))

    def _capture(self, batches: list[Batch]) -> None:
        """Steps on the first batches, run one by one; then the capture, which runs none."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for batch in batches:
                self._take(batch)
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph

    def save(self, path: Path) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for i, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in kept.items()}
        position = {"steps": self.steps, "seconds": self.seconds, "level": self.level, "curve": self.curve}
        with written_whole(path) as beside:
            save_file({k: v.contiguous() for k, v in tensors.items()}, beside, {"position": json.dumps(position)})

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same settings."""
        weights, kept = {}, {}
        with safe_open(path, "pt", device=self.device) as file:
            position = json.loads(file.metadata()["position"])
            for key in file.keys():  # noqa: SIM118 - this is no dictionary
                part, name = key.split(".", 1)
                if part == "model":
                    weights[name] = file.get_tensor(key)
                else:
                    i, name = name.split(".")
                    kept.setdefault(int(i), {})[name] = file.get_tensor(key)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": kept})
        self.steps, self.seconds, self.level = position["steps"], position["seconds"], position["level"]
        self.curve = [tuple(point) for point in position["curve"]]

    @torch.no_grad()
    def test(self, batch: Batch) -> dict[str, float]:
        """Shares of right answers, and of sequences all of whose answers are right (as greedy decoding would have it:
        every answer stands after right ones)."""
        self.model.eval()
        right, whole, n_answers = 0, 0, 0
        n, length = batch.tokens.shape
        recurrent = not {"attention", "mlp"} & self.model.config.backbone.mixers
        for part in zip(*(x.split(max(1, PIECE // length) if not recurrent else 64) for x in batch), strict=True):
            some = Batch(*part)
            piece = max(64, PIECE // len(some.tokens))
            with self.autocast():
                if recurrent and length > piece and not self.pooled:
                    logits = answered_in_pieces(self.model, some, piece)
                else:
                    logits = answered(self.model, some, self.pooled)
            asked = some.answers != NONE
            is_right = logits.argmax(-1) == some.answers
            right += int((is_right & asked).sum())
            n_answers += int(asked.sum())
            whole += int((is_right | ~asked).all(1).sum())
        self.model.train()
        return {"accuracy": right / n_answers, "whole": whole / n, "sequences": n}

    def state_numbers(self) -> int:
        """Numbers that the model carries from one token to the next, of one sequence; 0 for what grows with it."""
        if "attention" in self.model.config.backbone.mixers:
            return 0
        return sum(x.numel() for layer in self.model.init_state(1) for x in layer)
