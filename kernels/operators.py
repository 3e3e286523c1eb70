"""An implementation as PyTorch sees it: an operator where something traces, as little as may be elsewhere."""

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import traced


@cache
def module(package: str, name: str) -> ModuleType:
    """A module of a kernel's package, looked up once: a search at each call takes a small model's time."""
    return import_module(f".{name}", package)


class Implementations:
    """An operation's modules of `forward` and `backward`, one a backend, imported at their first use."""

    def __init__(self, package: str | None, **modules: str):
        self.package, self.modules = package or "", modules

    def __call__(self, backend: str, function: str) -> Callable[..., Any]:
        return getattr(module(self.package, self.modules[backend]), function)


def of_first_order(gradients: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """An autograd.Function's backward, of one output, that refuses to be differentiated itself."""
    gradients = once_differentiable(gradients)

    @wraps(gradients)
    def backward(ctx: Any, dout: Tensor) -> Any:
        # As once_differentiable sees it, gradients depend on dout alone; but on the inputs, too, they do.
        return gradients(ctx, dout.detach().requires_grad_() if torch.is_grad_enabled() else dout)

    return backward


class Operator:
    """`run`, and around it the operator `polymamba::name` for torch.compile, export and other tracers.

    A call goes through the operator only where it has to: that costs about 0.1 ms, much of a small model's time. Where
    autograd alone looks on, an autograd.Function of the same formulas serves; where nothing does, `run` itself.
    `fake` gives the outputs' shapes; `run` has the annotations that torch.library reads the operator's schema from.
    """

    def __init__(self, name: str, run: Callable[..., Any], fake: Callable[..., Any]):
        self.name, self.run = name, run
        self.operator = torch.library.custom_op(f"polymamba::{name}", _apart(run), mutates_args=())
        self.operator.register_fake(fake)
        self.function: type[torch.autograd.Function] | None = None

    def differentiate(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """The gradient, as torch.library.register_autograd takes it."""
        self.operator.register_autograd(backward, setup_context=setup_context)
        run = self.run

        class Function(torch.autograd.Function):
            # With a setup_context of its own PyTorch would inspect the signature at each call: 0.03 ms.
            @staticmethod
            def forward(ctx, *inputs):
                output = run(*inputs)
                setup_context(ctx, inputs, output)
                return output

        Function.backward = staticmethod(backward)
        Function.__name__ = self.name
        self.function = Function

    def __call__(self, *inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if traced(*tensors):
            return self.operator(*inputs)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self.operator(*inputs) if self.function is None else self.function.apply(*inputs)
        return self.run(*inputs)


def _apart(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, with results that share no memory, as an operator's must: gradients summed together are parts of one."""

    @wraps(run)
    def apart(*inputs: Any) -> Any:
        found = run(*inputs)
        if isinstance(found, Tensor):
            return found
        return tuple(x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for x in found)

    return apart
