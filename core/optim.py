"""Parameter groups, learning-rate schedule and weight averaging."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices with weight decay; vectors (norms, biases) and what is marked _no_weight_decay without.

    The marked ones are the SSM's A_log, D and dt bias: decayed, they drift from their initial spectrum and training
    becomes unstable (mamba-ssm's advice). What is marked _max_lr, too, comes in groups of its own, of no decay, whose
    "max_lr" `learning_rate` respects.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    limits = {id(p): limit for p in parameters if (limit := getattr(p, "_max_lr", None)) is not None}
    free = [p for p in parameters if id(p) not in limits]
    decayed = [p for p in free if p.dim() >= 2 and not getattr(p, "_no_weight_decay", False)]
    ids = {id(p) for p in decayed}
    groups: list[dict] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in free if id(p) not in ids], "weight_decay": 0.0},
    ]
    for limit in sorted(set(limits.values())):
        slow = [p for p in parameters if limits.get(id(p)) == limit]
        groups.append({"params": slow, "weight_decay": 0.0, "max_lr": limit})
    return groups


def learning_rate(group: dict, peak: float, factor: float) -> float:
    """Of a parameter group, where the schedule gives `factor` of the peak."""
    return min(peak, group.get("max_lr", math.inf)) * factor


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
        torch._foreach_lerp_(means, currents, 1 - min(decay, (1 + n) / (10 + n)))  # one launch for all on a GPU

    found = AveragedModel(model, multi_avg_fn=average)  # pyright: ignore[reportArgumentType]
    return found
