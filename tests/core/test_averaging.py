"""Gradients that are averaged while the backward goes on."""

import gc
import weakref

import torch
from torch import nn

from polymamba.core import averaging, processes
from polymamba.core.averaging import Averaging


def gradients_of(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def largest_error():
    """Of the means, and of what a backward leaves that is not to be averaged."""
    averaging.BUCKET = 30
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1, bias=False))
    model.idle = nn.Parameter(torch.ones(4))  # the loss does not depend on it
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(processes.rank()))
    own = gradients_of(model, x)
    means = [sum(of_all) / processes.count() for of_all in zip(*processes.everyones(own), strict=True)]
    together = Averaging(list(model.parameters()), torch.distributed.group.WORLD)
    again = gradients_of(model, x)
    with together.on():
        found = gradients_of(model, x)
        assert together._sent == len(together.buckets) - 1  # the last waits for the idle parameter
    assert torch.equal(model.idle.grad, torch.zeros(4))
    kept = weakref.ref(model.idle)
    del model, together
    gc.collect()
    assert kept() is None
    return [max((a - b).abs().max() for a, b in zip(*pair, strict=True)) for pair in ((found, means), (again, own))]


def test_means(in_processes):
    for of_means, alone in in_processes(2, largest_error):
        assert of_means < 1e-6
        assert alone == 0
