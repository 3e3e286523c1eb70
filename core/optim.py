"""Parameter groups, learning-rate schedule and weight averaging."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .sharded import here


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with weight decay; vectors (norms, biases) and what is marked _no_weight_decay without.

    The marked ones are the SSM's A_log, D and dt bias: decayed, they drift from their initial spectrum and training
    becomes unstable (mamba-ssm's advice). What is marked _max_lr, too, is not decayed; groups of its own have a
    "max_lr" that `learning_rate` respects. So have those that are marked _lr_scale, of a part that is to learn more
    slowly: their "lr_scale" multiplies the peak.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            scale, limit = getattr(p, "_lr_scale", 1.0), getattr(p, "_max_lr", None)
            is_decayed = p.dim() >= 2 and limit is None and not getattr(p, "_no_weight_decay", False)
            groups.setdefault((-scale, limit or 0.0, not is_decayed), []).append(p)
    return [
        {
            "params": groups[key],
            "weight_decay": 0.0 if key[2] else weight_decay,
            **({"max_lr": key[1]} if key[1] else {}),
            **({"lr_scale": -key[0]} if key[0] != -1 else {}),
        }
        for key in sorted(groups)
    ]


def learning_rate(group: dict, peak: float, factor: float) -> float:
    """Of a parameter group, where the schedule gives `factor` of the peak."""
    return min(peak * group.get("lr_scale", 1.0), group.get("max_lr", math.inf)) * factor


def warmup_cosine(progress: float, warmup: float) -> float:
    """Factor on the learning rate at `progress` in [0, 1]: linear up to `warmup`, then a half cosine down to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights; young averages forget faster, so that the start does not linger.

    How many were averaged is counted on the CPU (leave it there): to read it from a GPU would be to wait for the step.
    """

    def average(means: list[Tensor], currents: list[Tensor], _: Tensor) -> None:
        n = int(found.n_averaged)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(list(map(here, means)), list(map(here, currents)), weight)  # one launch for all on a GPU

    found = AveragedModel(model, multi_avg_fn=average)  # pyright: ignore[reportArgumentType]
    return found
