"""Steps of training: a model of some seed, made parallel, and what a step does."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from polymamba.core.averaging import Averaging, average_gradients
from polymamba.core.replayed import Replayed
from polymamba.core.sharded import shard

from .bench import Bench


def parameters(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


def build(bench: Bench, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    with bench.device:
        return make().train()


def parallel(bench: Bench, model: Any, n: int, how: str) -> Any:
    """how: ddp or fsdp."""
    if n == 1:
        return model
    if how == "ddp":
        ids = [bench.device.index] if bench.cuda else None
        return DistributedDataParallel(model, ids, process_group=bench.groups[n])
    shard(model, bench.mesh(n))
    return model


def train_step(
    bench: Bench, model: Any, loss_of: Callable[[Any, Any], torch.Tensor], batches: Sequence[Any] = (None,)
) -> Callable[[], object]:
    """A step over batches whose gradients are added up; loss_of(model, batch)."""
    optimizer = bench.optimizer(model)

    def step() -> None:
        for i, batch in enumerate(batches):
            last = i + 1 == len(batches)
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            with model.no_sync() if hasattr(model, "no_sync") and not last else nullcontext():
                with bench.autocast():
                    loss = loss_of(model, batch) / len(batches)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def recorded_step(
    bench: Bench,
    model: Any,
    loss_of: Callable[[Any, Any], torch.Tensor],
    batches: Sequence[Any],
    n: int,
    *,
    meanwhile: bool,
) -> Callable[[], object]:
    """The same, of which forward and backward are a CUDA graph.

    Gradients of n processes meet after the last one, or, of a single batch, meanwhile: recorded, too.
    """
    optimizer, parameters = bench.optimizer(model), list(model.parameters())
    averaging = Averaging(parameters, bench.groups[n]) if meanwhile and n > 1 else None

    def gradients(batch: Any) -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        with bench.autocast():
            loss = loss_of(model, batch) / len(batches)
        with averaging.on() if averaging else nullcontext():
            loss.backward()
        return [p.grad for p in parameters]

    replayed = Replayed(gradients, bench.device) if bench.cuda else gradients

    def step() -> None:
        total = replayed(batches[0])
        for i, batch in enumerate(batches[1:]):
            total = [g.clone() for g in total] if i == 0 else total
            torch._foreach_add_(total, replayed(batch))
        for p, g in zip(parameters, total, strict=True):
            p.grad = g
        if n > 1 and averaging is None:
            average_gradients(parameters, bench.groups[n])
        optimizer.step()

    return step
