"""`polymamba doctor`: what is installed, which devices are here, what runs where, and whether it computes right."""

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from polymamba import __version__
from polymamba.core.errors import InputError
from polymamba.flags import Doctor
from polymamba.kernels import info, selective_scan
from polymamba.kernels.backends import INSTALLED

PACKAGES = ("torch", "triton", "numba", "numpy", "accelerate", "safetensors", "tyro", "pysam", "scikit-learn")


def run(args: Doctor) -> None:
    """Print the report on stdout. Raises InputError if a kernel disagrees with its reference."""
    print(f"polymamba {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        print(f"  {package:<14}{_version(package)}")
    print(f"  {'CPU threads':<14}{torch.get_num_threads()}")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"  {f'cuda:{i}':<14}{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print(f"  {'cuda':<14}no CUDA GPU visible")
    elif "CC" not in os.environ and shutil.which("gcc") is None and shutil.which("clang") is None:
        print("  no C compiler: Triton needs one at its first launch; install gcc, set CC, or use --device cpu")
    print("backends")
    for kernel, backend in info().items():
        slow = backend == "torch" and "cpu" in kernel and not INSTALLED["numba"]  # some kernels have no other there
        note = "  (slow: install numba)" if slow else ""
        print(f"  {kernel:<30}{backend}{note}")
    print("self-test")
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        began = time.perf_counter()
        error = _self_test(torch.device(device))
        print(
            f"  selective_scan on {device}: largest error {error:.1e} of float64, {time.perf_counter() - began:.1f} s"
        )
        if not error < 2e-5:
            raise InputError(f"selective_scan on {device} is wrong by {error:.1e}: please report this")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _self_test(device: torch.device) -> float:
    """Largest relative difference between the chosen backend's outputs and gradients and the float64 reference's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 37, 12), (2, 37, 12), (12, 16), (2, 37, 16), (2, 37, 16)]
    u, delta, A, B, C = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    inputs = (u, delta, -A.exp(), B, C)

    def results(dtype: torch.dtype, device: torch.device, backend: str | None) -> list[torch.Tensor]:
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
        y = selective_scan(*leaves, delta_softplus=True, backend=backend)
        assert isinstance(y, torch.Tensor)  # no final state was asked for
        return [y.detach(), *torch.autograd.grad(y.square().mean(), leaves)]

    truth = results(torch.float64, torch.device("cpu"), "reference")
    ours = results(torch.float32, device, None)
    return max(float((o.cpu() - t).abs().max() / t.abs().max()) for o, t in zip(ours, truth, strict=True))
