"""What the CUDA kernels of a step share: whether a device and tensors are for them, their sources, giving up."""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..selective_scan import cuda as selective_scan

_FOLDER = Path(__file__).parent / "cuda_kernels"
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
# What all kernels of narrow blocks say, alike; and, of these, the sequences up to which states that are written, and
# weights that come by tiles, are the first to leave the L2 cache. Measured, benchmarks/results/gpu_model.md.
SHARED_PERCENT, PASS_UP_TO = 50, 128
_broken: set[int] = set()  # devices that NVRTC does not serve


def capable(x: Tensor) -> bool:
    """Whether x is on a GPU where a kernel can begin before the last one has ended."""
    return nvrtc.EMULATED or (x.is_cuda and x.get_device() not in _broken and _capable_device(x.get_device()))


def has_room(x: Tensor) -> bool:
    """Whether x is on a GPU of whose shared memory a block can have as much as on Hopper GPUs, nearly."""
    return nvrtc.EMULATED or torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin >= 208 * 1024


def tiles_serve(x: Tensor) -> bool:
    """Whether x is on a GPU whose matrix units tiles.cu is for."""
    return nvrtc.EMULATED or torch.cuda.get_device_capability(x.device) == (9, 0)


@cache
def _capable_device(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and nvrtc.loads()


def fits(t: Tensor | None, x: Tensor) -> bool:
    """Whether a weight, if there is one, is bf16, can be read 16 bytes at a time, and is where x is."""
    return t is None or (
        t.dtype == torch.bfloat16 and t.is_contiguous() and t.data_ptr() % 16 == 0 and t.device == x.device
    )


def between_fits(x: Tensor, conv: Tensor, ssm: Tensor, w) -> bool:
    """Whether what the kernels between the projections read is of the kinds that they take."""
    return (
        capable(x)
        and w.A_log.shape[1] == 16
        and 1 < w.conv.shape[1] <= 8  # the windows of some 20 would be more than a block's shared memory
        and x.dtype == conv.dtype == torch.bfloat16
        and ssm.dtype == torch.float32
        and all(fits(t, x) for t in w[3:])
        and all(t.data_ptr() % 16 == 0 and t.device == x.device for t in (conv, ssm))
    )


def between(kernel_for: Callable, uz: Tensor, conv: Tensor, ssm: Tensor, w) -> Tensor | None:
    """uz (B, 2E), what in_proj makes -> y (B, E), what out_proj reads; states in place. None where NVRTC fails.

    kernel_for: of these weights, that of cuda_middle.py or cuda_halves.py.
    """
    device, y = uz.get_device(), uz.new_empty(len(uz), uz.shape[1] // 2)
    with torch.cuda.device_of(uz):
        try:
            kernel = kernel_for(len(uz), w, device)
        except nvrtc.Unavailable as error:
            return give_up(device, error)
        kernel(uz, conv, ssm, w, y)
    return y


def source(*names: str, **macros: int) -> str:
    """The source of these files of cuda_kernels, for these sizes."""
    macros.setdefault("SHARED_PERCENT", SHARED_PERCENT)
    parts = [f"#define {name} {value}" for name, value in macros.items()]
    common = _COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / "gates.cu"
    files = (*common, *(_FOLDER / name for name in names))
    return "\n".join([*parts, *(path.read_text() for path in files)]) + "\n"


def addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def give_up(device: int, error: nvrtc.Unavailable) -> None:
    _broken.add(device)
    warnings.warn(f"decoding runs in Triton, which is slower: {error}", RuntimeWarning, stacklevel=4)
