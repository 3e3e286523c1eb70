"""What the CUDA kernels of a step share: whether a device and tensors are for them, their sources, giving up."""

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..selective_scan import cuda as selective_scan

_FOLDER = Path(__file__).parent / "cuda_kernels"
_COMMON = Path(selective_scan.__file__).parent / "cuda_kernels"
_broken: set[int] = set()  # devices that NVRTC does not serve


def capable(x: Tensor) -> bool:
    """Whether x is on a GPU where a kernel can begin before the last one has ended."""
    return nvrtc.EMULATED or (x.is_cuda and x.get_device() not in _broken and _capable_device(x.get_device()))


@cache
def _capable_device(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0) and nvrtc.loads()


def fits(t: Tensor | None, x: Tensor) -> bool:
    """Whether a weight, if there is one, is bf16, can be read 16 bytes at a time, and is where x is."""
    return t is None or (
        t.dtype == torch.bfloat16 and t.is_contiguous() and t.data_ptr() % 16 == 0 and t.device == x.device
    )


def source(file: str, **macros: int) -> str:
    """The source of cuda_kernels/`file`, for these sizes."""
    parts = [f"#define {name} {value}" for name, value in macros.items()]
    files = (_COMMON / "device.cu", _FOLDER / "device.cu", _COMMON / "numbers.cu", _FOLDER / file)
    return "\n".join([*parts, *(path.read_text() for path in files)]) + "\n"


def addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def give_up(device: int, error: nvrtc.Unavailable) -> None:
    _broken.add(device)
    warnings.warn(f"a step of Mamba blocks runs in Triton, which is slower: {error}", RuntimeWarning, stacklevel=4)
