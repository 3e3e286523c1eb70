"""A model over many images, in their order. n images, K classes, D channels of the features."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import processes
from ..core.errors import InputError
from ..core.replayed import Replayed
from ..core.sharded import is_sharded
from .dataset import ImageSet
from .images import Item, read_image
from .model import ImageModel
from .transforms import data_config, eval_transform, shorter_side


class _Images(torch.utils.data.Dataset):
    """(image (3, H, W), "") of each item; (zeros, what is wrong) if it cannot be read."""

    def __init__(self, items: Sequence[Item], names: Sequence[str], config: dict[str, Any]):
        self.items, self.names, self.config = items, names, config
        self.transform, self.enough = eval_transform(config), shorter_side(config)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        try:
            return self.transform(read_image(self.items[i], self.names[i], self.enough)), ""
        except InputError as error:  # told here, for out of a worker it would come with a traceback
            return torch.zeros(self.config["input_size"]), str(error)


def batches(
    items: Sequence[Item], names: Sequence[str], config: dict[str, Any], batch_size: int, *, workers: int = 0,
    bear_unreadable: bool = False,
) -> Iterator[tuple[Tensor, list[str]]]:  # fmt: skip
    """Images (B, 3, H, W) as `config` (data_config) wants them, and what is wrong with each: "" if nothing.

    Raises InputError at the first image that cannot be read, unless bear_unreadable.
    """
    dataset = _Images(items, names, config)
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_size, num_workers=workers, collate_fn=_together, generator=torch.Generator()
    )
    for x, problems in loader:
        first = next(filter(None, problems), None)
        if first is not None and not bear_unreadable:
            raise InputError(first)
        yield x, problems


def _together(rows: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    return torch.stack([image for image, _ in rows]), [problem for _, problem in rows]


@torch.no_grad()
def predict(
    model: ImageModel, images: ImageSet, batch_size: int, *, workers: int = 0,
    advance: Callable[[int], object] = lambda n: None,
) -> np.ndarray:  # fmt: skip
    """Probabilities (n, K) float64; `advance` is told how many images are done.

    Several processes, all of which call it, share the images.
    """
    call, config = for_batches(model, model), data_config(model)
    bounds = [len(images) * i // processes.count() for i in range(processes.count() + 1)]

    def run(part: tuple[int, int]) -> np.ndarray:
        found = [np.zeros((0, model.num_classes))]
        own = images.subset(np.arange(*part))
        for x, _ in batches(own.items, own.names, config, batch_size, workers=workers):
            found.append(probabilities(call(x)))
            advance(len(x))
            processes.moved()
        return np.concatenate(found)

    return np.concatenate(processes.each_once(list(pairwise(bounds)), run))


def for_batches(model: ImageModel, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of images (B, 3, H, W) by the model, on the model's device. Call it without gradients.

    On a GPU batches of one size soon run as a CUDA graph (core/replayed.py): read a result before the next call. Under
    autocast it must not outlive that: the graph reads autocast's own copies of the weights.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and not is_sharded(model):  # FSDP's hooks are none to be recorded
        return Replayed(function, device)
    return lambda x: function(x.to(device))


def probabilities(logits: Tensor) -> np.ndarray:
    """(B, K) -> softmax, float64."""
    return torch.softmax(logits.double(), dim=-1).cpu().numpy()
