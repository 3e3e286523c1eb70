"""A new modality on the shared backbone: scikit-learn's 8x8 digits, each read as a sequence of 8 rows of pixels."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from polymamba import cli, core

IMAGES, LABELS = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
IMAGES = IMAGES.float().view(-1, 8, 8) / 16


class DigitClassifier(core.PretrainedModel):
    config_class = core.BackboneConfig

    def __init__(self, config: core.BackboneConfig):
        super().__init__(config)
        self.rows, self.head = torch.nn.Linear(8, config.d_model), torch.nn.Linear(config.d_model, 10)
        self.backbone = core.Backbone(config)

    def forward(self, images):  # (batch, 8 rows, 8 pixels) -> logits (batch, 10)
        return self.head(self.backbone(self.rows(images))[:, -1])


class ReadDigits(core.Task):
    def plan(self, epoch):
        return np.array_split(np.random.default_rng(epoch).permutation(1400), 22)

    def batch(self, description, epoch):
        return IMAGES[description], LABELS[description]

    def loss(self, model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model):  # on the 397 images that are never trained on
        return {"valid_accuracy": (model(IMAGES[1400:]).argmax(1) == LABELS[1400:]).float().mean().item()}


@dataclass(frozen=True)
class Train:
    """Train a classifier of handwritten digits."""

    output: Path
    epochs: int = 15


def train(args: Train) -> None:
    model, run = DigitClassifier(core.BackboneConfig(d_model=32, n_layer=2)), core.RunFolder(args.output, {}, [])
    config, cpu = core.TrainConfig(epochs=args.epochs, lr=5e-3), core.ComputeConfig(device="cpu")
    print(core.train_model(model, ReadDigits(), config, cpu, run, resume=False))


COMMANDS = {"train": (Train, f"{__name__}:train")}  # what a package names in its entry-point group polymamba.commands
if __name__ == "__main__":
    raise SystemExit(cli.main(extra={"digits": f"{__name__}:COMMANDS"}))
