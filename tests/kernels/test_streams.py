"""Work in branches of a CUDA graph: which work becomes one. (What is recorded so, on a GPU: test_mamba_block.py.)"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from polymamba.kernels import streams


@pytest.fixture
def branches(monkeypatch):
    """The numbers of the branches that are begun, as if a graph were recorded."""
    begun = []

    def branch(device, i):
        begun.append(i)
        return SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda stream: None)

    current = SimpleNamespace(record_event=lambda: None, wait_stream=lambda stream: None)
    monkeypatch.setattr(streams, "_branch", branch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return begun


ON_A_GPU = SimpleNamespace(is_cuda=True, device="cuda:0")


def test_aside_is_a_branch(branches):
    assert streams.aside(lambda: "found", ON_A_GPU)() == "found"
    assert branches == [0]


def test_aside_is_none_within_others(branches):
    """All of them would have it in one stream, in which the memory of one is reused while another still reads it."""
    found = streams.side_by_side(lambda i: streams.aside(lambda: i, ON_A_GPU)(), 3, ON_A_GPU, may_branch=True)
    assert (found, branches) == ([0, 1, 2], [1, 2])
    streams.aside(lambda: None, ON_A_GPU)()
    assert branches == [1, 2, 0]


def test_aside_again_after_work_that_failed(branches):
    def fail(i):
        raise ValueError(i)

    with pytest.raises(ValueError, match="0"):
        streams.side_by_side(fail, 2, ON_A_GPU, may_branch=True)
    streams.aside(lambda: None, ON_A_GPU)()
    assert branches == [0]


def test_nothing_branches_where_no_graph_is_recorded(branches, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert streams.side_by_side(lambda i: i, 2, ON_A_GPU, may_branch=True) == [0, 1]
    assert streams.aside(lambda: 2, ON_A_GPU)() == 2
    assert branches == []
