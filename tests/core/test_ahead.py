"""What is begun before PyTorch is there: a driver's context, where a GPU may be asked for."""

import ctypes
import sys
from types import SimpleNamespace

import pytest

from polymamba.core import ComputeConfig, ahead


@pytest.fixture
def calls(monkeypatch):
    """The calls of a driver, in their order, and of what Triton does of its library."""
    made = []

    class Driver:
        fails = ""

        def __init__(self, name):
            assert name == "libcuda.so.1"

        def __getattr__(self, name):
            made.append(name)
            return lambda *_: int(name == Driver.fails)

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    cache = SimpleNamespace(triton_key=lambda: made.append("triton_key"))
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", cache)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return made, Driver


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_context_and_then_tritons_key(calls, device):
    thread = ahead.begin(ComputeConfig(device=device))
    assert thread is not None
    thread.join()
    assert calls[0] == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "triton_key"]


def test_a_driver_without_a_gpu_is_left(calls):
    made, driver = calls
    driver.fails = "cuInit"
    ahead.begin(ComputeConfig()).join()
    assert made == ["cuInit"]


def test_no_driver(monkeypatch, calls):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    ahead.begin(ComputeConfig()).join()
    assert calls[0] == []


def test_nothing_where_another_device_is_asked_for(monkeypatch, calls):
    assert ahead.begin(ComputeConfig(device="cpu")) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ahead.begin(ComputeConfig()) is None
    assert calls[0] == []
