"""Four ways to write recordings on, sample by sample, one choice between them, and one result.

    FusedWriter   on a CPU: one compiled loop (fused_kernel.py), a thread for each recording
    CudaWriter    on a GPU: the same loop as one kernel (fused_cuda.py), a block of threads for each recording
    GraphWriter   on a GPU, any model: a whole period of the U-Net, with the choice of each code, is one CUDA graph; the
                  host looks at what was written when all of it is there
    EagerWriter   any model, anywhere: a step of the model, a choice, and so on

What is drawn for a recording depends on its own generator alone, by core/sampling.py's rules. Letters: B recordings.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core.config import SamplingConfig
from ..core.replayed import recording
from ..core.sampling import Draws, choose, uniforms
from ..kernels import nvrtc
from ..kernels.backends import INSTALLED
from ..kernels.numba_runtime import parallel
from .fused import FusedModel, can_fuse
from .fused_kernel import run
from .model import AudioModel, Guided, bare_model


class Writer(Protocol):
    """Recordings that are written on. `unread` (B,) is the last code of each, `state` where they stand before it."""

    unread: Tensor

    @property
    def state(self) -> Any: ...

    def write(self, n: int) -> np.ndarray:
        """The next n codes, int64 (B, n); -1 from where the model's predictions were no numbers."""
        ...

    def snapshot(self) -> Any:
        """Where all of them stand."""
        ...

    def restore(self, snapshot: Any, rows: np.ndarray, *, draw_anew: bool = False) -> None:
        """Put these rows, bool (B,), back to where they stood; draw_anew: they will then be written otherwise."""
        ...


def writer_of(
    model: AudioModel | Guided, state: Any, unread: Tensor, config: SamplingConfig, seeds: Sequence[int]
) -> Writer:
    """The fastest writer of this model. `state` is not changed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    bare = bare_model(model)
    if can_fuse(bare) and config.repetition_penalty == 1:
        arguments = model, state, unread, config, generators
        if unread.device.type == "cpu":
            return FusedWriter(*arguments)
        if unread.is_cuda and INSTALLED["cuda"]:
            try:
                return CudaWriter(*arguments)
            except nvrtc.Unavailable as error:
                message = f"recordings are written by CUDA graphs, which is slower: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
    state = pytree.tree_map(torch.clone, state)
    if unread.is_cuda and config.repetition_penalty == 1:
        return GraphWriter(model, state, unread, config, generators)
    return EagerWriter(model, state, unread, config, generators)


class FusedWriter:
    """By the tables of a model (fused.py)."""

    def __init__(
        self,
        model: AudioModel | Guided,
        state: Any,
        unread: Tensor,
        config: SamplingConfig,
        generators: list[torch.Generator],
    ):
        guided = isinstance(model, Guided)
        self.fused = self._tables_of(bare_model(model), len(unread), guided)
        self.guidance = float(model.scale) if guided else 1.0
        of_each = list(state) if guided else [state]
        self.labels = [s.label.clone() for s in of_each]
        self.values = [self.fused.pack(s) for s in of_each]
        self.position, self.unread = of_each[0].unet.position.clone(), unread.clone()
        self.config, self.generators, self.state_class = config, generators, type(state) if guided else None

    def _tables_of(self, model: AudioModel, n_recordings: int, guided: bool) -> Any:
        return FusedModel(model)

    def write(self, n: int, seen: Tensor | None = None) -> np.ndarray:
        """See `Writer`. seen float32 (B, n, 256) gets the logits."""
        uniform = torch.stack([uniforms(g, n) for g in self.generators])
        out = self._run(uniform, seen)
        self.position += n
        self.unread = out[:, -1].clone()
        return out.cpu().numpy()

    def _run(self, uniform: Tensor, seen: Tensor | None) -> Tensor:
        """Codes for uniform (B, n) numbers."""
        fused, config, values = self.fused, self.config, [v.numpy() for v in self.values]
        out, matrices = torch.empty(uniform.shape, dtype=torch.int64), fused.matrices
        parallel(
            run,
            len(out),
            *(values[0], values[1] if len(values) > 1 else np.empty((0, 0), np.float32)),
            fused.weights.numpy(),
            (matrices.view(torch.uint16) if matrices.dtype == torch.bfloat16 else matrices).numpy(),
            *(fused.ops, fused.spans, fused.strides),
            *(self.position.numpy(), self.unread.numpy(), uniform.numpy(), out.numpy()),
            np.empty((0, 0, 0), np.float32) if seen is None else seen.numpy(),
            *(fused.embedding_at, fused.logits_at, fused.width, fused.sizes, np.float32(self.guidance)),
            *(float(config.temperature), config.top_k, float(config.top_p), float(config.min_p)),
        )
        return out

    @property
    def state(self) -> Any:
        pairs = zip(self.values, self.labels, strict=True)
        states = [self.fused.unpack(v, label, self.position) for v, label in pairs]
        return states[0] if self.state_class is None else self.state_class(*states)

    def snapshot(self) -> Any:
        states = [v.clone() for v in self.values], self.position.clone(), self.unread.clone()
        return states, [g.get_state() for g in self.generators]

    def restore(self, snapshot: Any, rows: np.ndarray, *, draw_anew: bool = False) -> None:
        (values, position, unread), draws = snapshot
        which = torch.from_numpy(np.flatnonzero(rows)).to(unread.device)
        pairs = zip((*self.values, self.position, self.unread), (*values, position, unread), strict=True)
        for now, before in pairs:
            now[which] = before[which]
        if not draw_anew:
            _set_back(self.generators, draws, rows)


class CudaWriter(FusedWriter):
    """Raises nvrtc.Unavailable where its kernel cannot be had."""

    def _tables_of(self, model: AudioModel, n_recordings: int, guided: bool) -> Any:
        from .fused_cuda import CudaModel

        return CudaModel(model, n_recordings, guided=guided)

    def _run(self, uniform: Tensor, seen: Tensor | None) -> Tensor:
        uniform = uniform.to(self.unread.device)
        return self.fused.run(self.values, self.position, self.unread, uniform, self.config, self.guidance, seen)


class EagerWriter:
    def __init__(
        self, model: Any, state: Any, unread: Tensor, config: SamplingConfig, generators: list[torch.Generator]
    ):
        self.model, self.state, self.unread = model, state, unread.clone()
        window = config.repetition_window or 256
        recent = None if config.repetition_penalty == 1 else torch.full((len(unread), window), -1, device=unread.device)
        self.draws = Draws(config, generators, recent)

    def write(self, n: int) -> np.ndarray:
        written = []
        for _ in range(n):
            self.unread = self.draws.draw(self.model.step(self.unread, self.state))
            written.append(self.unread)
        return torch.stack(written, 1).cpu().numpy()

    def snapshot(self) -> Any:
        return pytree.tree_map(torch.clone, (self.state, self.unread)), [g.get_state() for g in self.draws.generators]

    def restore(self, snapshot: Any, rows: np.ndarray, *, draw_anew: bool = False) -> None:
        (state, unread), draws = snapshot
        which = torch.from_numpy(np.flatnonzero(rows)).to(unread.device)
        for now, before in zip(pytree.tree_leaves(self.state), pytree.tree_leaves(state), strict=True):
            now[which] = before[which]
        self.unread[which] = unread[which]
        if not draw_anew:
            _set_back(self.draws.generators, draws, rows)


def _set_back(generators: list[torch.Generator], states: list[Tensor], rows: np.ndarray) -> None:
    for generator, state, is_meant in zip(generators, states, rows, strict=True):
        if is_meant:
            generator.set_state(state)


class GraphWriter(EagerWriter):
    """Rows that do not stand at the same place of the period are written one step after another, without a graph."""

    def __init__(
        self, model: Any, state: Any, unread: Tensor, config: SamplingConfig, generators: list[torch.Generator]
    ):
        super().__init__(model, state, unread, config, generators)
        self.config, self.generators = config, generators
        bare = bare_model(model)
        self.period = bare.config.unet.period
        self.phase = self._find_phase()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.uniform = torch.zeros(self.period, len(unread), dtype=torch.float64, device=unread.device)
        self.chosen = torch.zeros(self.period, len(unread), dtype=torch.int64, device=unread.device)

    def restore(self, snapshot: Any, rows: np.ndarray, *, draw_anew: bool = False) -> None:
        super().restore(snapshot, rows, draw_anew=draw_anew)
        self.phase = self._find_phase()

    def _find_phase(self) -> int | None:
        """Where in the period all rows stand; None if they stand at different places."""
        state = self.state.wanted if isinstance(self.model, Guided) else self.state
        places = {position % self.period for position in state.unet.position.tolist()}
        return places.pop() if len(places) == 1 else None

    def write(self, n: int) -> np.ndarray:
        if self.phase is None:
            return super().write(n)
        uniform = torch.stack([uniforms(g, n) for g in self.generators], 1).to(self.unread.device)
        out = torch.empty(n, len(self.unread), dtype=torch.int64, device=self.unread.device)
        done = 0
        while done < n:
            if self.phase == 0 and n - done >= self.period:
                if self.graph is None:
                    self._capture()
                assert self.graph is not None
                self.uniform.copy_(uniform[done : done + self.period])
                self.graph.replay()
                out[done : done + self.period] = self.chosen
                done += self.period
            else:
                out[done] = self._one(self.phase, uniform[done])
                self.phase = (self.phase + 1) % self.period
                done += 1
        return out.mT.cpu().numpy()

    @torch.no_grad()
    def _one(self, phase: int, uniform: Tensor) -> Tensor:
        """Read `unread`, choose the next code; -1 where there is none."""
        tokens, bad = choose(self.model.step_at(phase, self.unread, self.state), self.config, None, uniform)
        self.unread.copy_(tokens)
        return torch.where(bad, -1, tokens)

    def _period(self) -> None:
        for phase in range(self.period):
            self.chosen[phase] = self._one(phase, self.uniform[phase])

    def _capture(self) -> None:
        """One period as a graph, on the memory that the state stands in."""
        before = self.snapshot()
        side = torch.cuda.Stream(self.unread.device)
        side.wait_stream(torch.cuda.current_stream(self.unread.device))
        with torch.cuda.stream(side):
            self._period()  # compiles kernels, sets up libraries
        torch.cuda.current_stream(self.unread.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self.unread.device):
            self._period()
        self.restore(before, np.ones(len(self.unread), bool))
        self.graph = graph
