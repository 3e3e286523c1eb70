"""Which implementation runs: one decision, in one place, and visible (`polymamba doctor` prints `info()`)."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import nvrtc

BACKENDS = ("reference", "torch", "plain", "numba", "triton", "cuda")
IN_PYTORCH = ("reference", "torch", "plain")  # one and the same for the operations that PyTorch has the parts of

_plain = False


# Looked up once, here: torch.compile cannot trace a search for modules.
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("numba", "triton")}
# CUDA C++ of ours, compiled at run time; what it does not take goes to Triton.
INSTALLED["cuda"] = INSTALLED["triton"] and nvrtc.library_path() is not None


@contextmanager
def plain_operations() -> Iterator[None]:
    """Within it, what is not told otherwise runs as ordinary PyTorch operations: to export a model, not to run it."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (for tests: it is slow)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(
    backend: str | None, device: torch.device, dtype: torch.dtype, *, is_complex: bool = False, in_cuda: bool = False,
    complex_in_triton: bool = False,
) -> str:  # fmt: skip
    """The backend for these inputs; `backend` itself if it is given and can take them.

    in_cuda, complex_in_triton: whether this operation has a kernel in CUDA C++, and one in Triton for complex A. Raises
    ValueError if the forced backend is unknown, not installed, or cannot take these inputs.
    """
    if backend is None and _plain:
        backend = "plain"
    if backend is None:
        if dtype == torch.float64 or (is_complex and not (complex_in_triton and device.type == "cuda")):
            return "torch"
        if device.type == "cuda" and INSTALLED["triton"]:
            return "cuda" if in_cuda and INSTALLED["cuda"] and not is_complex else "triton"
        if device.type == "cpu" and INSTALLED["numba"]:
            return "numba"
        return "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "cuda" and not in_cuda:
        raise ValueError("backend='cuda': this operation has no kernel in CUDA C++; use backend='triton'")
    if backend == "cuda" and not INSTALLED["cuda"]:
        raise ValueError("backend='cuda' needs Triton and a PyTorch that is built with CUDA")
    if not INSTALLED.get(backend, True):
        raise ValueError(f"backend={backend!r} is not installed here: pip install {backend}")
    refused = dtype == torch.float64 or (is_complex and not (backend == "triton" and complex_in_triton))
    if backend in ("numba", "triton", "cuda") and refused:
        kind = "complex A" if is_complex else "float64"
        others = "'triton', 'torch'" if dtype != torch.float64 and complex_in_triton else "'torch'"
        raise ValueError(f"backend={backend!r} does not take {kind}: use backend={others} or 'reference'")
    if backend == "plain" and is_complex:
        raise ValueError("backend='plain' does not take complex A: use backend='torch' or 'reference'")
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"backend='numba' runs on the CPU; the inputs are on {device}")
    if backend == "cuda" and device.type != "cuda" and not nvrtc.EMULATED:
        raise ValueError(f"backend='cuda' runs on a CUDA GPU; the inputs are on {device}")
    if backend == "triton" and device.type != "cuda" and not interpreting():
        raise ValueError(
            f"backend='triton' runs on a CUDA GPU; the inputs are on {device} (TRITON_INTERPRET=1 emulates one)"
        )
    return backend


def watched(*tensors: Tensor | None) -> bool:
    """Whether autograd, a compiler or another tracer is to see the operation on these tensors.

    Where nothing watches, an implementation is called by itself, without the operator around it, which costs about
    0.1 ms a call: much of a small model's time.
    """
    return traced(*tensors) or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None))


def traced(*tensors: Tensor | None) -> bool:
    """Whether a compiler or another tracer is to see the operation on these tensors; autograd alone does not count."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode():
        return True
    return any(
        type(x) not in (Tensor, torch.nn.Parameter) or is_batchedtensor(x)  # vmap's look like plain ones
        for x in tensors
        if x is not None
    )


def info() -> dict[str, str]:
    """The backend that each kernel chooses for float32 inputs, by device."""
    found = {}
    for name in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        device = torch.device(name)
        usual = choose(None, device, torch.float32)
        scan = choose(None, device, torch.float32, in_cuda=True)
        if scan == "cuda":
            from .selective_scan.cuda import usable

            scan = scan if usable(torch.cuda.current_device()) else "triton"
        other = usual if usual == "triton" else "torch"  # numba has none: a step by itself, what surrounds experts
        chosen = {
            "selective_scan": scan, "cross_scan": scan, "causal_conv1d": usual, "rms_norm": usual, "layer_norm": usual,
            "mamba_step": usual, "selective_scan_step": other, "causal_conv1d_step": other,
            "route": other, "sort_by_expert": other, "dispatch": other, "combine": other, "largest": other,
            "hand_over": other, "likeliest": other, "linear_cross_entropy": other,
        }  # fmt: skip
        found |= {f"{kernel} on {name}": backend for kernel, backend in chosen.items()}
    return found
