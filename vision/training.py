"""Training a classifier of images: the images' side of core/train.py.

A batch is a pure function of (seed, epoch, its images): crops, colours and mixtures are drawn from a generator of its
own, so that a resumed run, or one with other workers, sees the same ones.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from ..core.config import TrainConfig
from ..core.task import Task
from ..core.terminal import progress_bar
from .config import Augmentation
from .dataset import ImageSet
from .images import read_image
from .inference import predict
from .transforms import seeded, train_transform


class TrainImages(Task):
    """Cross-entropy on augmented images; judged by the accuracy on the validation images."""

    same_kernels = True

    def __init__(
        self,
        train: ImageSet,
        valid: ImageSet,
        config: TrainConfig,
        augment: Augmentation,
        view: dict[str, Any],
        seed: int,
    ):
        """view: transforms.data_config of the model."""
        self.train, self.valid, self.config, self.augment, self.seed = train, valid, config, augment, seed
        self.transform, self.size = train_transform(view, augment), view["input_size"]
        n_classes = len(train.classes)
        self.mix = None
        if augment.mixup or augment.cutmix:
            self.mix = Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=n_classes)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Places in the training set of each batch; all images once, batches of equal size but for one image."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train))
        return np.array_split(order, max(1, round(len(order) / self.config.batch_size)))

    def batch(self, description: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and their classes, int64 (B,), or shares of classes (B, K) of mixtures."""
        with seeded(self.seed, epoch, int(description[0])):
            images = [
                self.transform(read_image(self.train.items[i], self.train.names[i], 4 * max(self.size[1:])))
                for i in description.tolist()
            ]
            x, y = torch.stack(images), torch.from_numpy(self.train.labels[description])
            return self._mixed(x, y) if self.mix is not None else (x, y)

    def _mixed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """An image is mixed with another one; of an odd number the last stays as it is."""
        even = len(x) - len(x) % 2
        shares = F.one_hot(y, len(self.train.classes)).float()
        if even and self.mix is not None:
            x[:even], shares[:even] = self.mix(x[:even].clone(), y[:even])
        return x, shares

    def loss(self, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, target = batch
        return F.cross_entropy(model(images).float(), target, label_smoothing=self.augment.smoothing)

    def evaluate(self, model: Any) -> dict[str, float]:
        with progress_bar("validation", len(self.valid), "images") as advance:
            found = predict(model, self.valid, self.config.batch_size, workers=self.config.workers, advance=advance)
        hit = found[np.arange(len(found)), self.valid.labels]
        accuracy = float((found.argmax(axis=1) == self.valid.labels).mean())
        return {"valid_accuracy": accuracy, "valid_loss": float(-np.log(np.maximum(hit, 1e-300)).mean())}
