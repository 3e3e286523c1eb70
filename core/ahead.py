"""What the first kernel on a GPU waits for, made while PyTorch is imported, which keeps one core busy for seconds.

The driver makes the context that PyTorch will use, and Triton reads its own library, of 400 MB: its hash is in the
names under which compiled kernels are kept.
"""

import contextlib
import ctypes
import os
import threading

from .config import ComputeConfig


def begin(compute: ComputeConfig) -> threading.Thread | None:
    """In the background, if a GPU may be asked for; of several processes each has a device of its own: None there."""
    if compute.device not in ("auto", "cuda") or "LOCAL_RANK" in os.environ:
        return None
    thread = threading.Thread(target=_make)  # no daemon: a driver must not be torn down half made
    thread.start()
    return thread


def _make() -> None:
    """What is missing here is silently left; who needs it will tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    ):
        return
    with contextlib.suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()  # it remembers
