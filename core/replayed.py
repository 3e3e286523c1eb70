"""A function of tensors as CUDA graphs: what it launches for inputs of one shape is recorded, and then replayed.

A model's forward and backward are a thousand kernels, and where those are short Python takes longer to launch them than
the GPU to run them. A graph is launched as one. It runs on memory that stays where it is: inputs are copied there, and
outputs are read there until the next call. Random numbers go on as they would have without it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WARM_UPS = 2  # calls for a shape before it is recorded: kernels are compiled and libraries set up in them
MOST_GRAPHS = 4  # shapes; each graph keeps its inputs and outputs, and they share the memory for what is in between


class _Graph(NamedTuple):
    inputs: list[Any]
    outputs: Any
    replay: Callable[[], object]


class Replayed:
    """`function`, whose tensors are on a GPU, called as before: its one argument is a tree of tensors and of constants.

    The function must launch the same kernels whenever shapes and constants are the same, and the host may wait for none
    of them. It is called itself, with the inputs on the device, as long as a shape is new, and for all shapes beyond
    the first MOST_GRAPHS; what it changes in place it may find changed by a replay. Outputs of a replay are written
    over by the next call.
    """

    def __init__(self, function: Callable[[Any], Any], device: torch.device):
        self.function, self.device = function, device
        self.calls: Counter[Any] = Counter()
        self.graphs: dict[Any, _Graph] = {}
        self.pool: Any = None

    def __call__(self, inputs: Any) -> Any:
        leaves, structure = pytree.tree_flatten(inputs)
        key = structure, tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        if key not in self.graphs:
            here = [x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for x in leaves]
            self.calls[key] += 1
            if self.calls[key] <= WARM_UPS or len(self.graphs) == MOST_GRAPHS:
                return self.function(pytree.tree_unflatten(here, structure))
            self.graphs[key] = self._recorded([x.clone() if isinstance(x, Tensor) else x for x in here], structure)
        graph = self.graphs[key]
        for there, given in zip(graph.inputs, leaves, strict=True):
            if isinstance(given, Tensor):
                there.copy_(given, non_blocking=True)
        graph.replay()
        return graph.outputs

    def _recorded(self, inputs: list[Any], structure: Any) -> _Graph:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        own = None if current == torch.cuda.default_stream(self.device) else current  # the default one is not recorded
        with recording(graph, self.device, pool=self.pool, stream=own):
            outputs = self.function(pytree.tree_unflatten(inputs, structure))
        self.pool = graph.pool()
        return _Graph(inputs, outputs, graph.replay)


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, device: torch.device, *, stream: Any = None, pool: Any = None
) -> Iterator[None]:
    """In which what is launched on the device goes into the graph.

    In a stream of that device: PyTorch's own for this is of the device that recorded first, and records no other.
    Other threads, such as NCCL's, may ask for their events meanwhile.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = _stream_of(index) if stream is None else stream
    options: Any = {"stream": stream, "pool": pool, "capture_error_mode": "thread_local"}
    with torch.cuda.device(device), torch.cuda.graph(graph, **options):
        yield


@cache
def _stream_of(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work in a stream that can be recorded. A backward can only be where the forwards before it ran in the same one:
    autograd adds up a parameter's gradient in the stream that it remembers."""
    with torch.cuda.device(device):
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            before.wait_stream(stream)
