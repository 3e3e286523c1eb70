"""Models for other programs: torch.export's .pt2 with our operators in it, ONNX of ordinary operations only.

The scan of an ONNX file is the doubling of kernels/selective_scan/plain.py: it holds (L, channels, states) for each
image and direction, so that it is for small batches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import written_whole
from ..kernels import plain_operations
from .model import ImageModel


@dataclass(frozen=True)
class Parity:
    """How far another program's logits are from ours."""

    program: str
    images: int
    largest_difference: float  # over the largest logit
    same_class: float  # share of images

    def __str__(self) -> str:
        return (
            f"{self.program}: of {self.images} images, logits differ by {self.largest_difference:.1e} of the largest; "
            f"{self.same_class:.0%} of the same class"
        )


def export_onnx(model: ImageModel, size: tuple[int, ...], path: Path) -> Parity:
    """Write an ONNX file of input `image` (batch, C, H, W) and output `logits`; any batch, this size only.

    Raises InputError if the packages that this needs are not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - what torch.onnx needs
    except ImportError as error:
        raise InputError(f"{path}: ONNX needs {error.name} (pip install 'polymamba[onnx]')") from None
    images = torch.randn(2, *size)
    batch = torch.export.Dim("batch", min=1, max=65536)
    with written_whole(path) as beside:
        with plain_operations(), torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
            onnx = torch.onnx.export(program, input_names=["image"], output_names=["logits"], verbose=False)
        assert onnx is not None  # as it is without a file name
        onnx.save(beside)
        session = onnxruntime.InferenceSession(beside.read_bytes(), providers=["CPUExecutionProvider"])
    return _parity("onnxruntime", model, size, lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0]))


def export_program(model: ImageModel, size: tuple[int, ...], path: Path) -> Parity:
    """Write torch.export's archive, to be loaded with `import polymamba.kernels; torch.export.load(FILE)`."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, *size),), dynamic_shapes={"x": {0: batch}})
    with written_whole(path) as beside, beside.open("wb") as file:
        torch.export.save(program, file)
    return _parity("torch.export", model, size, torch.export.load(path).module())


def _parity(program: str, model: ImageModel, size: tuple[int, ...], run: Any) -> Parity:
    """On random images, in batches of another size than was exported."""
    generator = torch.Generator().manual_seed(0)
    batches: list[Tensor] = [torch.randn(n, *size, generator=generator) for n in (1, 3, 4)]
    with torch.no_grad():
        ours, theirs = (torch.cat([f(x) for x in batches]) for f in (model, run))
    return Parity(
        program=program,
        images=len(ours),
        largest_difference=float((ours - theirs).abs().max() / ours.abs().max()),
        same_class=float((ours.argmax(1) == theirs.argmax(1)).float().mean()),
    )
