"""Where a model looks: Grad-CAM, the effective receptive field, and the order in which it scans.

Letters: B batch, h, w cells of a feature map, D channels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .class_tokens import split_tokens
from .model import ImageModel
from .vim import Vim
from .vmamba import VMamba


def _watched(model: ImageModel, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """What the last layer that looks across the image is given, how to see it as (B, h, w, D), and the logits.

    Of Vim, whose class token alone goes to the head, that is the last block's normed input: after it a patch reaches
    the token no more. Of VMamba it is the last features, which the head averages.
    """
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    module: Any = model.layers[-1].norm if isinstance(model, Vim) else model.norm  # pyright: ignore
    handle = module.register_forward_hook(keep)
    try:
        logits = model(x)
    finally:
        handle.remove()
    if isinstance(model, Vim):
        grid, token = model.config.grid(*x.shape[-2:]), model.config.class_token
        return kept[0], lambda y: split_tokens(y, token)[1].unflatten(1, grid), logits
    return kept[0], lambda y: y, logits


def grad_cam(model: ImageModel, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Grad-CAM (arXiv 1610.02391, equations 1 and 2) of images (B, C, H, W): maps (B, H, W) from 0 to 1, and classes.

    classes  (B,) int64, those to explain; None: the likeliest ones
    A map is 0 throughout where nothing speaks for the class.
    """
    with torch.enable_grad():
        activations, as_map, logits = _watched(model, x)
        classes = logits.argmax(1) if classes is None else classes
        (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), activations)
    activations, gradients = as_map(activations.detach().float()), as_map(gradients.float())
    weights = gradients.mean(dim=(1, 2), keepdim=True)
    cam = (activations * weights).sum(-1).clamp(min=0)  # (B, h, w)
    cam = cam / cam.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    cam = F.interpolate(cam[:, None], size=x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return cam, classes


def receptive_field(model: ImageModel, x: Tensor) -> Tensor:
    """The effective receptive field (arXiv 1701.04128): mean |d centre / d pixel| over images and channels, (H, W).

    centre  the features of the middle cell of the last map, summed
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        activations, as_map, _ = _watched(model, x)
        cells = as_map(activations)
        (gradient,) = torch.autograd.grad(cells[:, cells.shape[1] // 2, cells.shape[2] // 2].float().sum(), x)
    return gradient.abs().mean(dim=(0, 1))


def scan_order(model: ImageModel, height: int, width: int) -> list[tuple[str, np.ndarray]]:
    """(name, cells (n, 2) as row and column in the order visited) of each direction; a class token is (nan, nan).

    For images of height x width pixels; of VMamba in the last stage, where the cells are fewest.
    """
    if isinstance(model, Vim):
        down, across = model.config.grid(height, width)
    else:
        assert isinstance(model, VMamba)
        reduction = model.config.patch_size * 2 ** (len(model.layers) - 1)
        down, across = -(-height // reduction), -(-width // reduction)
    cells = np.stack(np.meshgrid(np.arange(down), np.arange(across), indexing="ij"), -1)  # (h, w, 2)
    rows = cells.reshape(-1, 2).astype(float)
    if isinstance(model, Vim):
        token = model.config.class_token
        places = {"middle": [len(rows) // 2], "head": [0], "double": [0, len(rows)], "none": []}[token]
        sequence = np.insert(rows, places, np.nan, axis=0)
        return [("forwards", sequence), ("backwards", sequence[::-1])]
    columns = cells.swapaxes(0, 1).reshape(-1, 2).astype(float)
    return [
        ("by rows", rows),
        ("by columns", columns),
        ("by rows, backwards", rows[::-1]),
        ("by columns, backwards", columns[::-1]),
    ]
