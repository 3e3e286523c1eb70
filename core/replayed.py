"""A function of tensors as CUDA graphs: what it launches for inputs of one shape is recorded, and then replayed.

A model's forward and backward are a thousand kernels, and where those are short Python takes longer to launch them than
the GPU to run them. A graph is launched as one. It runs on memory that stays where it is: inputs are copied there, and
outputs are read there until the next call. Random numbers go on as they would have without it.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            current = torch.cuda.current_stream()
            own = None if current == torch.cuda.default_stream() else current  # the default stream cannot be recorded
            # Other threads, such as NCCL's, may ask for their own events meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=own, capture_error_mode="thread_local"):
                outputs = self.function(pytree.tree_unflatten(inputs, structure))
        self.pool = graph.pool()
        return _Graph(inputs, outputs, graph.replay)


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
