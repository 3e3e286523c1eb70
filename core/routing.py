"""Which token goes to which expert: what is counted while a language model with mixtures of experts runs.

    with recorded_routing(model) as routing:
        ...                                  any forwards and steps, without padding
    write_routing(folder / "routing.tsv", folder / "routing_tokens.tsv", routing.layers, name_of_token)

Letters: V vocabulary, E experts. Entropies are in bits.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import written_whole
from .language_model import LanguageModel
from .moe import MoE, Router, Routes

LIKELIEST = 6  # tokens that are named for an expert


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerRouting:
    """How one layer routed the tokens that it saw."""

    layer: int  # of the backbone, counted from 0 as in the weights' names
    counts: np.ndarray  # int64 (V, E): times that a token went to an expert
    probability: np.ndarray  # float64 (E,): the router's mean probability
    router_entropy: float  # mean of the entropy of the router's probabilities for a token

    @property
    def share(self) -> np.ndarray:
        """float64 (E,): of all tokens routed, the share of each expert."""
        return self.counts.sum(0) / max(self.counts.sum(), 1)

    @property
    def even_share(self) -> float:
        return 1 / self.counts.shape[1]

    @property
    def load_entropy(self) -> float:
        """Entropy of the shares: log2(E) if all experts are used alike."""
        return float(_entropy(self.share))

    @property
    def explained(self) -> float:
        """Bits of the expert's identity that the token alone tells, its context unknown: their mutual information."""
        of_token = self.counts.sum(1)
        within = float(of_token @ _entropy(self.of_token())) / max(of_token.sum(), 1)
        return self.load_entropy - within

    def of_token(self) -> np.ndarray:
        """float64 (V, E): where each token went, as shares; a row of zeros if it did not occur."""
        return self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)

    def summary(self) -> dict[str, Any]:
        """JSON-safe figures. Shares of the least and most used expert are in multiples of the even share."""
        return {
            "layer": self.layer,
            "least_used": float(self.share.min() / self.even_share),
            "most_used": float(self.share.max() / self.even_share),
            "load_entropy": self.load_entropy,
            "router_entropy": self.router_entropy,
            "explained_by_token": self.explained,
            "largest_entropy": float(np.log2(self.counts.shape[1])),
        }


class Routing:
    """The layers' routing so far; empty for a model without mixtures of experts."""

    def __init__(self, model: LanguageModel):
        vocab_size = model.config.vocab_size
        self._tokens: Tensor | None = None  # of the forward that is under way
        self._sums: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # counts, on the device; probabilities, entropy
        self._routers: dict[int, Router] = {}
        for name, module in model.named_modules():
            if isinstance(module, MoE) and (found := re.search(r"\blayers\.(\d+)\b", name)):
                layer, n_experts, device = int(found[1]), module.config.n_experts, module.router.weight.device
                self._routers[layer] = module.router
                counts = torch.zeros(vocab_size * n_experts, dtype=torch.int64, device=device)
                self._sums[layer] = counts, torch.zeros(n_experts).double(), torch.zeros(()).double()

    @property
    def layers(self) -> list[LayerRouting]:
        found = []
        for layer, (counts, probability, entropy) in self._sums.items():
            by_token = counts.view(-1, len(probability)).cpu().numpy()
            n_tokens = max(by_token.sum() / self._routers[layer].top_k, 1)
            found.append(
                LayerRouting(
                    layer=layer,
                    counts=by_token,
                    probability=probability.cpu().numpy() / n_tokens,
                    router_entropy=entropy.item() / n_tokens,
                )
            )
        return found

    def _begin(self, embedding: Any, args: tuple[Tensor], output: Tensor) -> None:
        self._tokens = args[0].flatten()

    def _add(self, layer: int, router: Router, args: tuple[Tensor], routes: Routes) -> None:
        counts, probability, entropy = self._sums[layer]
        n_experts = len(probability)
        assert self._tokens is not None  # the embedding comes first
        pairs = (self._tokens[:, None] * n_experts + routes.experts).flatten()
        counts.index_add_(0, pairs, torch.ones_like(pairs))
        p = routes.probabilities.detach()
        probability += p.sum(0).cpu()
        entropy -= torch.xlogy(p, p).sum().cpu() / np.log(2)


@contextmanager
def recorded_routing(model: LanguageModel) -> Iterator[Routing]:
    """Count where tokens go while the context lasts."""
    routing = Routing(model)

    hooks = [model.embedding.register_forward_hook(routing._begin)] if routing._routers else []
    for layer, router in routing._routers.items():
        hooks.append(router.register_forward_hook(partial(routing._add, layer)))
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()


def write_routing(experts: Path, tokens: Path, layers: list[LayerRouting], name_of: Callable[[int], str]) -> None:
    """Two tables (.tsv): a row for each layer and expert, and one for each layer and token that occurred."""
    _write(experts, _rows_of_experts(layers, name_of))
    _write(tokens, _rows_of_tokens(layers, name_of))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Of the distributions on the last axis."""
    return np.abs(np.sum(p * np.log2(p, out=np.zeros_like(p), where=p > 0), axis=-1))  # abs: no -0


def _rows_of_experts(layers: list[LayerRouting], name_of: Callable[[int], str]) -> Iterator[list[str]]:
    yield ["layer", "expert", "tokens", "share", "times_even_share", "mean_probability", "most_of"]
    for routing in layers:
        for expert, (share, probability) in enumerate(zip(routing.share, routing.probability, strict=True)):
            counts = routing.counts[:, expert]
            likeliest = [token for token in np.argsort(-counts, kind="stable")[:LIKELIEST] if counts[token]]
            most = " ".join(f"{name_of(int(token))}:{counts[token] / counts.sum():.2f}" for token in likeliest)
            figures = (f"{share:.5f}", f"{share / routing.even_share:.3f}", f"{probability:.5f}")
            yield [str(routing.layer), str(expert), str(counts.sum()), *figures, most]


def _rows_of_tokens(layers: list[LayerRouting], name_of: Callable[[int], str]) -> Iterator[list[str]]:
    most = max((routing.counts.shape[1] for routing in layers), default=0)
    yield ["layer", "id", "token", "count", "entropy", *(f"expert_{e}" for e in range(most))]
    for routing in layers:
        shares = routing.of_token()
        for token in np.flatnonzero(routing.counts.sum(1)):
            row = shares[token]
            count = str(routing.counts[token].sum())
            yield [
                *(str(routing.layer), str(token), name_of(int(token)), count, f"{_entropy(row):.3f}"),
                *(f"{share:.4f}" for share in row),
            ]


def _write(path: Path, rows: Iterable[list[str]]) -> None:
    with written_whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None).writerows(rows)
