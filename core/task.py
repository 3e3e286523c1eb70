"""What the training loop (train.py) asks of a modality, and the optimizer steps of an epoch as a data set."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Task(ABC):
    """What the loop asks of a modality. A batch is whatever `batch` returns: tensors in dicts, tuples or lists."""

    same_kernels = False  # whether `loss` launches the same ones for all batches of a shape, and waits for none
    cuts = False  # whether `loss` may be called in a context of parallel.py, where it is what the own pieces add to it

    @abstractmethod
    def plan(self, epoch: int) -> list[Any]:
        """The batches of an epoch as plain descriptions (indices, say), the same ones at every call."""

    @abstractmethod
    def batch(self, description: Any, epoch: int) -> Any:
        """Make one batch, on the CPU; perhaps in a worker process. Depends on its arguments only."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Any) -> Tensor:
        """Mean loss of a batch."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Validation figures, named valid_*. Called without gradients and in evaluation mode.

        Of several processes all call it, and have to return the same: `processes.each_once` shares the work.
        """

    def score(self, metrics: dict[str, float]) -> float:
        """The one figure that decides which model is best, higher being better: by default the first one."""
        return next(iter(metrics.values()))


class Step(NamedTuple):
    """What one process does in an optimizer step."""

    batches: list[Any]  # or their descriptions
    n_own: int  # those that count: of the last step of an epoch there may be too few for all processes
    n_all: int  # that count, of all processes


class Steps(Dataset):
    """The optimizer steps of (the rest of) an epoch."""

    def __init__(self, task: Task, steps: list[Step], epoch: int):
        self.task, self.steps, self.epoch = task, steps, epoch

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> Step:
        step = self.steps[i]
        return step._replace(batches=[self.task.batch(d, self.epoch) for d in step.batches])


def steps_of_epoch(plan: list[Any], accumulation: int, share: int, shares: int) -> list[Step]:
    """An epoch's batches in groups of `accumulation`, and of each group one of so many shares.

    All shares have as many batches: where the last group does not divide, its last batch comes again, and does not
    count.
    """
    steps = []
    for i in range(0, len(plan), accumulation):
        group = plan[i : i + accumulation]
        own = group[share::shares]
        missing = -(-len(group) // shares) - len(own)
        steps.append(Step([*own, *group[-1:] * missing], len(own), len(group)))
    return steps
