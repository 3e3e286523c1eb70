"""Decoding on a GPU by CUDA graphs: all kernels of a step, from one token to the next, are launched as one.

A step is hundreds of kernels of a few microseconds each, and Python takes longer to launch them than the GPU to run
them. So a step (the model's, the choice of the token, what that has to remember) is captured once, on memory that stays
where it is, and replayed; or some steps as one, of which the last alone writes the states (mamba_step/journal.py). The
host only looks at what comes out, a replay or two late. Short prompts, of a shape that was seen before, are read in the
same way. Letters: B sequences, L tokens.
"""

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.utils import _pytree as pytree

from ..kernels import Journal, WayOut, backends, hand_over
from ..kernels.nvrtc import Unavailable
from .config import SamplingConfig
from .lti import LTIMixer
from .replayed import recording
from .sampling import Draws, choose, refuse, uniforms, with_token

IN_FLIGHT = 2  # replays that the GPU is given before the host looks at the first of them
BLOCK = 22 * Journal.PERIOD  # steps whose uniform numbers are brought to the GPU at once: those of whole replays
WARM_UPS = 2  # steps before the capture: kernels are compiled and libraries set up in them
ROOM = 256  # a state that grows has room for a multiple of it, so that a graph serves prompts of many lengths
# Prompts that are read by a graph have so many tokens each at least, all of a convolution's window among them, and so
# many together at most: more keep a GPU busy for longer than it takes to launch the kernels, on a slow host, too. Of
# their states the graph keeps so many bytes at most.
SHORTEST, MOST_TOKENS, MOST_BYTES = 16, 32_768, 1 << 30


def serves(device: torch.device) -> bool:
    """Whether steps are decoded by graph there: on a GPU with Triton, where a kernel writes what the host reads."""
    return device.type == "cuda" and backends.choose(None, device, torch.int64) == "triton"


def tells_the_likeliest(model: Any) -> bool:
    """Whether the model has a `step_likeliest`, from where it has its `step`: a class may change that alone."""
    owner = next((owner for owner in (model, *type(model).__mro__) if "step" in vars(owner)), None)
    return owner is not None and "step_likeliest" in vars(owner)  # None: it finds its step in what it wraps


class _StepGraph:
    """A step of a model for B sequences, or PERIOD steps if it keeps a journal, and the memory that they work on."""

    def __init__(
        self, model: Any, batch: int, room: int, config: SamplingConfig, recent: Tensor | None, device: torch.device,
        journaled: bool,
    ):  # fmt: skip
        self.state = model.init_state(batch, room) if room else model.init_state(batch)
        self.leaves = pytree.tree_leaves(self.state)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)  # read by the step, and then its result
        # The same, or -1 where there is nothing to choose from, for each step in flight, where the host reads it.
        self.chosen = torch.zeros(IN_FLIGHT * Journal.PERIOD, batch, dtype=torch.int64, pin_memory=True)
        self.first = torch.zeros(batch, dtype=torch.int64, pin_memory=True)  # likewise, of what stands before a step
        self.turn = torch.zeros(batch, dtype=torch.int64, device=device)  # of `chosen`, for the step to come
        self.uniform = torch.zeros(BLOCK, batch, dtype=torch.float64, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)  # of `uniform`, for the step to come
        self.recent = None if recent is None else torch.empty_like(recent)
        if self.recent is not None:
            self.recent.fill_(-1)

        out = WayOut(self.tokens, self.chosen, self.turn)
        no_logits = config.temperature == 0 and recent is None and tells_the_likeliest(model)

        def step() -> None:
            if no_logits:
                model.step_likeliest(self.tokens, self.state, out)
                return
            logits = model.step(self.tokens, self.state)
            uniform = self.uniform.index_select(0, self.row)[0] if config.temperature else None
            tokens, bad = choose(logits, config, self.recent, uniform)
            if self.recent is not None:
                self.recent.copy_(with_token(self.recent, tokens, config))
            hand_over(tokens, bad, out)
            if config.temperature:
                self.row.add_(1).remainder_(BLOCK)

        self.journal = Journal() if journaled else None  # the graph reads its pages
        self.n_steps = 1
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS - journaled):  # what a journal runs is one, too
                step()
            if self.journal is not None:
                with contextlib.suppress(torch.OutOfMemoryError, Unavailable):
                    self.n_steps = self.journal.run(step)
        if self.n_steps == 1:
            self.journal = None
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph, self.left = torch.cuda.CUDAGraph(), torch.cuda.Event()
        with recording(self.graph, device):
            if self.journal is None:
                step()
            else:
                self.journal.run(step)

    def begin(self, tokens: Tensor, bad: Tensor, state: Any, recent: Tensor | None) -> None:
        """Stand before the next step of other sequences, once those before are through, in whatever stream."""
        torch.cuda.current_stream(tokens.device).wait_event(self.left)
        self.tokens.copy_(tokens)
        self.first.copy_(torch.where(bad, -1, tokens), non_blocking=True)
        self.row.zero_()
        self.turn.zero_()
        if self.recent is not None and recent is not None:
            self.recent.copy_(recent)
        given = pytree.tree_leaves(state)
        # A state that grows may have less room than here.
        pairs = zip(self.leaves, given, strict=True)
        here = [x if x.shape == g.shape else x[tuple(map(slice, g.shape))] for x, g in pairs]
        torch._foreach_copy_(here, given)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """Those of `model.modules()`, in another order and half of the time: at one sequence the GPU waits for it."""
    found: dict[nn.Module, None] = {}
    ahead: list[nn.Module | None] = [model]
    while ahead:
        module = ahead.pop()
        if module is not None and module not in found:
            found[module] = None
            ahead += module._modules.values()
    return list(found)


def _places(modules: list[nn.Module]) -> tuple[Any, ...]:
    """Where a graph reads its weights, and as what; what is called, hooks among it; whether in inference mode."""
    everywhere = all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks
    found: list[Any] = [torch.is_inference_mode_enabled(), *map(tuple, everywhere)]
    for module in modules:
        own = vars(module)
        found += type(module), "forward" in own, "step" in own
        for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
            if hooks:
                found += hooks
        for tensors in (own["_parameters"], own["_buffers"]):
            for tensor in tensors.values():
                if tensor is not None:
                    found += tensor.data_ptr(), tensor.dtype
    return tuple(found)


# Of a model, which leaves of its state grow with the tokens.
_growing: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()


def _tokens_in(state: Any, model: Any) -> int:
    """How many tokens a state that grows with them has room for; 0 if none does."""
    if model not in _growing:
        first = pytree.tree_leaves(model.init_state(1))
        _growing[model] = [i for i, leaf in enumerate(first) if leaf.shape[1:2] == (0,)]
    leaves = pytree.tree_leaves(state) if _growing[model] else []
    return max((leaves[i].shape[1] for i in _growing[model]), default=0)


_sizes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def _bytes_of_state(model: Any) -> int:
    """That of one sequence, before its first token."""
    if model not in _sizes:
        _sizes[model] = sum(x.numel() * x.element_size() for x in pytree.tree_leaves(model.init_state(1)))
    return _sizes[model]


# The last graph of a model, while no decoder works with it: (what it was captured for, the graph).
_graphs: WeakKeyDictionary[Any, tuple[Any, _StepGraph]] = WeakKeyDictionary()


class _ReadingGraph:
    """The reading of prompts of one shape, and the memory that it works on."""

    def __init__(self, model: Any, tokens: Tensor):
        self.tokens = tokens.clone()
        self.graph, self.left = torch.cuda.CUDAGraph(), torch.cuda.Event()
        with recording(self.graph, tokens.device):
            last = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
            outputs = model(self.tokens, return_state=True, logits_at=last)
        self.leaves, self.structure = pytree.tree_flatten(outputs)

    def read(self, tokens: Tensor) -> Any:
        stream = torch.cuda.current_stream(tokens.device)
        stream.wait_event(self.left)  # those before may be read in another one
        self.tokens.copy_(tokens)
        self.graph.replay()
        own = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in self.leaves]  # they are written over
        torch._foreach_copy_(own, self.leaves)
        self.left.record(stream)
        return pytree.tree_unflatten(own, self.structure)


def _are_ours(modules: list[nn.Module]) -> bool:
    """Whether all are PyTorch's or this package's: others, as adapters, are switched by mere attributes."""
    return all(kind.__module__.split(".")[0] in ("torch", "polymamba") for kind in set(map(type, modules)))


# Of a model, the shape of the prompts that it read last and the graph of that, if it read them twice.
_readings: WeakKeyDictionary[Any, tuple[Any, _ReadingGraph | None]] = WeakKeyDictionary()


@torch.no_grad()
def read_by_graph(model: Any, tokens: Tensor) -> tuple[Tensor, Any] | None:
    """int64 (B, L), from the beginning -> (the logits (B, V) after the last token, the state), as the model's forward.

    None, and nothing is done, for a shape that the model has not just read; for a model that does not say, by an
    attribute `forward_is_one_graph`, that its forward launches the same kernels for all tokens, or has parts of others
    than PyTorch and this package; and for too few or too many tokens. The graph keeps the memory that a forward takes,
    until another shape is read.
    """
    if not tokens.is_cuda or not getattr(model, "forward_is_one_graph", False):
        return None
    known, graph = _readings.pop(model, (None, None))
    if (
        tokens.shape[1] < SHORTEST
        or tokens.numel() > MOST_TOKENS
        or len(tokens) * _bytes_of_state(model) > MOST_BYTES
        or not _are_ours(modules := _modules_of(model))
        or model.training
        or torch.is_autocast_enabled("cuda")
        or torch.cuda.is_current_stream_capturing()
        or any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    ):
        return None
    key = tokens.shape, _places(modules)
    if known != key:
        _readings[model] = key, None
        return None
    graph = _ReadingGraph(model, tokens) if graph is None else graph
    outputs = graph.read(tokens)
    _readings[model] = key, graph
    return outputs


class GraphedDecoder:
    """A `generation.Decoder` by graph, for at most `n_new` tokens of each sequence.

    Sequences that have finished are decoded on, unheard: a batch that shrank would need another graph.
    """

    def __init__(self, model: nn.Module, logits: Tensor, state: Any, draws: Draws, n_new: int):
        self.model, self.state, self.draws = model, state, draws
        self.rows = list(range(len(logits)))  # of the graph, that are listened to
        self.logits: Tensor | None = logits  # of the prompts, until the first tokens are drawn from them
        self.n_left = n_new - 1  # steps still to be launched
        self.n_launched = 0
        self.in_flight: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.heard: deque[list[int]] = deque()  # steps of a replay that is through
        self.graph: _StepGraph | None = None
        self.stays = False  # for the next one, when this is done
        self.autocast = torch.is_autocast_enabled("cuda")

    def advance(self) -> list[list[int]]:
        if self.logits is not None:
            self._begin(self.logits)
            self.logits = None
            self._fill()  # before the host waits for the prompts
        if not self.heard:
            buffer, event = self.in_flight.popleft()
            event.synchronize()
            self.heard += buffer.tolist()
            self._fill()
        chosen = self.heard.popleft()
        if min(chosen) < 0:
            self.stays = False
            refuse(torch.tensor(chosen)[self.rows] < 0)
        if len(self.rows) < len(chosen):
            chosen = [chosen[row] for row in self.rows]
        return [[token] for token in chosen]

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]

    def close(self) -> None:
        """Leave the graph to the next one who decodes with this model.

        Not under autocast: the graph reads autocast's own copies of the weights, which end with it. Nor with parts of
        others in the model, which are switched by mere attributes. Nor where logits were not finite, even if nobody has
        listened to them: of a state that grows, some of that would be left behind the next one's tokens.
        """
        if self.in_flight:  # these still write to the host's memory, which may be freed from now on
            self.in_flight[-1][1].synchronize()
        if self.graph is not None and self.stays and self.graph.chosen.min() >= 0:
            self.graph.left.record(torch.cuda.current_stream(self.graph.tokens.device))
            _graphs[self.model] = (self.key, self.graph)

    def _begin(self, logits: Tensor) -> None:
        tokens, bad = self.draws.choose(logits)
        recent, config, modules = self.draws.recent, self.draws.config, _modules_of(self.model)
        n_tokens = _tokens_in(self.state, self.model)
        wanted = n_tokens + self.n_left + Journal.PERIOD - 1  # steps of whole replays
        room = -(-wanted // ROOM) * ROOM if n_tokens else 0
        # Some mixers compute something of these outside of a step, and anew when they change (lti.py).
        dynamics = (p for module in modules if isinstance(module, LTIMixer) for p in module.parameters())
        versions = tuple(p._version for p in dynamics)
        ours = _are_ours(modules)
        self.stays = not self.autocast and ours
        self.key = (len(tokens), room, config, None if recent is None else recent.shape, _places(modules), versions)
        key, graph = _graphs.pop(self.model, (None, None))
        if graph is None or key != self.key or self.autocast:
            graph = None  # its memory first
            # A journal: of models of ours, whose states are read by nothing but their own step, once a token.
            graph = _StepGraph(self.model, len(tokens), room, config, recent, tokens.device, ours)
        self.graph = graph
        graph.begin(tokens, bad, self.state, recent)
        del self.state
        self._await(graph.first[None])

    def _fill(self) -> None:
        while self.n_left and len(self.in_flight) < IN_FLIGHT:
            self._launch()

    def _launch(self) -> None:
        assert self.graph is not None
        if self.n_launched % BLOCK == 0 and self.draws.config.temperature:
            block = torch.stack([uniforms(g, BLOCK) for g in self.draws.generators], 1)
            self.graph.uniform.copy_(block.pin_memory(), non_blocking=True)
        self.graph.graph.replay()
        turn, wanted = self.n_launched % len(self.graph.chosen), min(self.graph.n_steps, self.n_left)
        self._await(self.graph.chosen[turn : turn + wanted])  # whole replays fit there
        self.n_left -= wanted
        self.n_launched += self.graph.n_steps

    def _await(self, buffer: Tensor) -> None:
        """The host's memory (steps, B), which what has been launched up to here fills."""
        assert self.graph is not None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.graph.tokens.device))
        self.in_flight.append((buffer, event))
