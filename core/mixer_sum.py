"""The sum of several mixers: a layer that adds what each makes of the same input (MoE-Mamba's parallel form)."""

from collections.abc import Callable, Collection, Iterable
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor, nn

from .padding import Padding


class MixerSum(nn.Module):
    """(B, L, d_model) -> (B, L, d_model), the sum of the mixers' results. Its state is the tuple of theirs."""

    def __init__(self, mixers: Iterable[nn.Module]):
        super().__init__()
        self.mixers: Any = nn.ModuleList(mixers)

    @property
    def projects_input(self) -> bool:
        return all(mixer.projects_input for mixer in self.mixers)

    def forward(self, hidden: Tensor, **options: Any) -> Any:
        return self._added(self.mixers, hidden, **options)

    def forward_padded(self, hidden: Tensor, padding: Padding, **options: Any) -> Any:
        return self._added([mixer.forward_padded for mixer in self.mixers], hidden, padding, **options)

    def step(self, hidden: Tensor, state: tuple[Any, ...]) -> Tensor:
        return reduce(add, (mixer.step(hidden, own) for mixer, own in zip(self.mixers, state, strict=True)))

    def init_state(self, batch_size: int, max_length: int | None = None) -> tuple[Any, ...]:
        return tuple(mixer.init_state(batch_size, max_length) for mixer in self.mixers)

    def _added(self, runs: Collection[Callable[..., Any]], *inputs: Any, state: Any = None, **options: Any) -> Any:
        """Each run's result added up; `state`, one for each, is passed on where there is one."""
        given = [{}] * len(runs) if state is None else [{"state": own} for own in state]
        outs = [run(*inputs, **own, **options) for run, own in zip(runs, given, strict=True)]
        if not options.get("return_state"):
            return reduce(add, outs)
        return reduce(add, (y for y, _ in outs)), tuple(after for _, after in outs)
