"""What Vim and VMamba share: timm's method set, and a folder that timm and polymamba both read.

Letters: B batch, C channels of the image, H, W its height and width, D channels of the features.
"""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.hub import CONFIG, PretrainedModel, fetch

TIMM_KEYS = ("architecture", "num_features", "pretrained_cfg", "model_args")  # of config.json, beside our fields


class ImageModel(PretrainedModel):
    """A classifier of images, (B, C, H, W) float, normalised -> logits (B, num_classes)."""

    default_architecture: typing.ClassVar[str]  # one of the family's names in timm; `model_args` says the rest
    timm_names: typing.ClassVar[
        dict[str, str]
    ]  # first_conv and classifier, which timm changes for other inputs, classes

    def __init__(self, config: Any):
        super().__init__(config)
        self.gradient_checkpointing = False  # trade one more forward for not keeping each block's activations
        self.pretrained_cfg: dict[str, Any] = {}  # timm's: input_size, mean, std, label_names, ...

    # What the two define

    @property
    def num_features(self) -> int:
        """D, of the last features."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        raise NotImplementedError

    def set_head(self) -> None:
        """Make a fresh head for the config's num_classes and global_pool."""
        raise NotImplementedError

    # What follows from that

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes); pooled features (B, D) where num_classes is 0."""
        return self.forward_head(self.forward_features(x))

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def in_chans(self) -> int:
        return self.config.in_chans

    @property
    def head_hidden_size(self) -> int:
        """Width of forward_head(.., pre_logits=True)."""
        return self.num_features

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for other classes, 0 for none; perhaps with other pooling, "" for none."""
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = dataclasses.replace(self.config, num_classes=num_classes, global_pool=pool)
        weight = next(self.parameters())
        self.set_head()
        self.to(weight.device, weight.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.gradient_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters beside norms and biases that are not to be decayed."""
        return {name for name, p in self.named_parameters() if getattr(p, "_no_weight_decay", False)}

    # Folders

    def describe(self) -> dict[str, Any]:
        """Our fields and timm's: `timm.create_model("local-dir:FOLDER", pretrained=True)` reads the folder, too."""
        ours = json.loads(json.dumps(super().describe()))
        architecture = self.pretrained_cfg.get("architecture") or self.default_architecture
        transient = ("file", "url", "source", "state_dict", "hf_hub_id", "architecture", "custom_load")
        cfg = {k: v for k, v in self.pretrained_cfg.items() if k not in transient and v is not None}
        timms = {
            "architecture": architecture,
            "num_features": self.num_features,
            "pretrained_cfg": {**self.timm_names, **cfg, "num_classes": self.num_classes},
            "model_args": {name: value for name, value in ours.items() if value is not None},
        }
        return ours | timms

    @classmethod
    def from_description(cls, fields: dict[str, Any]) -> Self:
        model = super().from_description({k: v for k, v in fields.items() if k not in TIMM_KEYS})
        model.pretrained_cfg = dict(fields.get("pretrained_cfg") or {})
        model.pretrained_cfg["architecture"] = fields.get("architecture")
        return model


def load_image_model(path_or_hub_id: str | Path) -> ImageModel:
    """The Vim or VMamba in a folder or hub repository, in evaluation mode. Raises InputError if there is none."""
    from .vim import Vim
    from .vmamba import VMamba

    config = fetch(path_or_hub_id, CONFIG, {})
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("model")
    except (ValueError, AttributeError):
        raise InputError(f"{config}: not JSON of a model's configuration") from None
    classes: dict[str, type[ImageModel]] = {"Vim": Vim, "VMamba": VMamba}
    if name not in classes:
        raise InputError(f"{config}: holds {name or 'no polymamba model'}; expected one of {', '.join(classes)}")
    return classes[name].from_pretrained(path_or_hub_id)


def feature_layout(x: Tensor, output_fmt: str) -> Tensor:
    """Features (B, H, W, D) in timm's NCHW or NHWC."""
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NHWC'")
    return x.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else x


def drop_path_rates(config: Any, n_blocks: int) -> list[float]:
    """Of each block: linear from 0 to the config's."""
    return torch.linspace(0, config.drop_path_rate, n_blocks).tolist()
